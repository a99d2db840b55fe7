import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from odenets import models
from odenets.errors import DivergedError
from odenets.least_action import LeastAction
from odenets.module_wise import fit_modules, split_into_modules, trgl, trgl_multipliers
from odenets.module_wise.loop import move
from odenets.training import data, datasets
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy
from odenets.training.runs import Run
from tests.counting import NoDouble
from tests.odenets.checks import assert_same

DIGITS = datasets.subsample(datasets.load("digits")[0], 120)
BATCHES = data.Batches(DIGITS, 40, seed=0)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def modules_of(K=3, seed=0):
    torch.manual_seed(seed)
    return split_into_modules(models.resnet9(1, 10, features=8, size=8, depth=K), K, DIGITS.x[:4])


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 3},
        {"epochs": 2, "order": "sequential"},
        {"epochs": [1, 2, 1], "order": "sequential", "laps": 2},
        {"epochs": 2, "order": "sequential", "cache": "memory"},
        {"epochs": 3, "order": "checkpointed"},
    ],
)
def test_a_killed_run_ends_with_the_same_weights(tmp_path, options):
    arguments = {"optimizer": SGD, "objective": trgl_multipliers(every=2), **options}
    whole = fit_modules(modules_of(), BATCHES, **arguments)
    assert all(row["train_loss"] > 0 for row in whole.rows)

    run, left = Run(tmp_path / "run", {}), [1, 1]
    with pytest.raises(IndexError):  # when a third epoch is reported
        fit_modules(modules_of(), BATCHES, **arguments, run=run, report=lambda n: left.pop())
    resumed = fit_modules(modules_of(seed=1), BATCHES, **arguments, run=run)
    assert resumed.done == whole.done > 2
    assert_same(resumed.network, whole.network)
    assert resumed.objectives.state_dict() == whole.objectives.state_dict()


def test_modules_are_no_network_to_train_as_a_whole():
    with pytest.raises(TypeError, match=r"as a whole, got ModuleWise: take odenets.module_wise.fit_modules"):
        fit(modules_of(), BATCHES, epochs=1, optimizer=SGD)


def test_modules_train_one_after_another_and_those_before_stand_still():
    network = modules_of()
    seen = []
    fit_modules(network, BATCHES, epochs=[1, 2, 1], optimizer=SGD, order="sequential",
                report=lambda n: seen.append(weights(network)))  # fmt: skip
    before = weights(modules_of())
    for k, after in zip([0, 1, 1, 2], seen, strict=True):
        changed = {int(name.split(".")[1]) for name in after if not torch.equal(after[name], before[name])}
        assert changed == {k}  # buffers of batch norms included
        before = after


def test_optimizers_and_multipliers_go_on_from_lap_to_lap():
    options = {"order": "sequential", "laps": 3, "objective": trgl_multipliers(every=1)}
    training = fit_modules(modules_of(), BATCHES, epochs=1, optimizer=SGD, **options)
    assert [row["module"] for row in training.rows] == [1, 2, 3] * 3
    assert [row["epoch"] for row in training.rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [objective.steps for objective in training.objectives] == [9, 9, 9]


@pytest.mark.parametrize("batches", [BATCHES, data.Batches(DIGITS, 40, seed=0, crop=1)], ids=["plain", "augmented"])
def test_a_cache_changes_nothing_but_the_views(tmp_path, batches):
    arguments = {"epochs": 2, "optimizer": SGD, "order": "sequential", "laps": 2, "objective": trgl(1.0)}
    batches, networks, seen = replace(batches, data=replace(DIGITS, x=DIGITS.x.double())), [], set()
    arguments["report"] = lambda n: seen.update((tmp_path / "states").glob("states*"))
    for cache in (None, "memory", tmp_path / "states"):
        network = modules_of().double()
        views = 4 if cache and batches.augmented else 1
        fit_modules(network, batches, **arguments, cache=cache, views=views, offload=cache is not None)
        networks.append(network)
    assert_same(networks[1], networks[2])
    assert_same(*networks[:2], atol=1e-12)  # four views are those of the four epochs; batches differ
    assert seen
    assert not [*(tmp_path / "states").iterdir()]


def test_every_module_learns_in_every_order():
    validation = data.Batches(datasets.load("digits")[1], 500)
    for options in ({}, {"order": "sequential"}, {"order": "sequential", "laps": 2}):
        fixed = {"epochs": 4, "optimizer": SGD, "objective": trgl(1.0), "validation": validation}
        training = fit_modules(modules_of(), BATCHES, **fixed, **options)
        accuracies = training.network.accuracies(validation)
        assert min(accuracies) > 0.6
        last = {row["module"]: row["validation_accuracy"] for row in training.rows}
        if options.get("laps", 1) == 1:
            assert list(last.values()) == pytest.approx(accuracies)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "random"}, "order must be"),
        ({"laps": 2}, "laps must be"),
        ({"cache": "memory"}, "cache is for the sequential order"),
        ({"order": "sequential", "offload": True}, "offload needs a cache"),
        ({"order": "sequential", "views": 2}, "views are of a cache, got views=2"),
        ({"order": "sequential", "epochs": [1, 2]}, r"one per module \(3\), got \[1, 2\]"),
        ({"order": "sequential", "cache": "memory", "views": 0}, "views must be at least 1"),
        ({"clip_norm": -1}, "clip_norm must be positive, got -1"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        fit_modules(modules_of(), BATCHES, optimizer=SGD, **{"epochs": 1} | options)


def test_batch_norms_need_two_samples():
    few = data.Batches(datasets.subsample(DIGITS, 81), 40)
    with pytest.raises(ValueError, match="at least 2 samples for batch norm, the last one holds 1"):
        fit_modules(modules_of(), few, epochs=1, optimizer=SGD)


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(tmp_path):
    run = Run(tmp_path / "run", {})
    fit_modules(modules_of(), BATCHES, epochs=1, optimizer=SGD, run=run)
    with (
        pytest.warns(UserWarning, match="objective=NotFinite where it has CrossEntropy"),
        pytest.raises(DivergedError, match=r"epoch 2 diverged, with a training loss of \[nan, nan, nan\]"),
    ):
        fit_modules(modules_of(), BATCHES, epochs=2, optimizer=SGD, run=run, objective=lambda k, K: NotFinite())
    state = run.load_state()
    assert state is not None
    assert state["done"] == 1


def test_a_checkpoint_of_modules_is_taken_up_as_it_was_begun(tmp_path):
    run, step = Run(tmp_path / "run", {}), torch.optim.lr_scheduler.StepLR
    options = {"optimizer": SGD, "run": run, "lr_scheduler": partial(step, step_size=1)}
    fit_modules(modules_of(), BATCHES, epochs=1, **options)
    with pytest.warns(UserWarning, match=r"resume.pt: .* got clip_norm=1.0 where it has None, batches.seed=5") as seen:
        fit_modules(modules_of(), replace(BATCHES, seed=5), epochs=2, clip_norm=1.0, **options)
    assert [warning.filename for warning in seen] == [__file__]
    other = options | {"lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5), "clip_norm": 1.0}
    with pytest.raises(ValueError, match="lr_scheduler must be that of the checkpoint, StepLR, got ExponentialLR"):
        fit_modules(modules_of(), replace(BATCHES, seed=5), epochs=3, **other)
    (run.folder / "resume.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"resume.pt is damaged \(it is empty\)"):
        fit_modules(modules_of(), BATCHES, epochs=3, **options)


@pytest.mark.parametrize("order", ["parallel", "sequential", "end-to-end"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, order):
    """The only step of an epoch breaks them after its loss was finite."""
    run, whole = Run(tmp_path / "run", {}), data.Batches(DIGITS, 120)
    arguments = {"epochs": 1, "optimizer": SGD, "order": order, "objective": lambda k, K: Breaking()}
    with pytest.raises(DivergedError, match=r"epoch 1 diverged, .* loss of \[[\d.].*left weights or buffers"):
        fit_modules(modules_of(), whole, run=run, **arguments)
    assert run.load_state() is None


class Breaking(CrossEntropy):
    def after_step(self, network, batch):
        torch.nn.init.constant_(next(network.parameters()), torch.nan)


def test_a_module_moves_where_any_of_it_is_elsewhere():
    """Its weights are there already, but the optimizer's momentum is not."""
    modules = modules_of()
    training = fit_modules(modules, BATCHES, epochs=1, optimizer=SGD, order="sequential", cache="memory")
    module, optimizer = modules.modules_in_order[0], training.optimizers[0]
    module.to("meta")
    move(module, optimizer, torch.device("meta"))
    assert {value["momentum_buffer"].device.type for value in optimizer.state.values()} == {"meta"}


class NotFinite(CrossEntropy):
    def loss(self, network, batch, output, records):
        return super().loss(network, batch, output, records) * torch.nan


FEW = data.Batches(datasets.subsample(DIGITS, 40), 20, seed=0)
ORDERS = [{}, {"order": "sequential"}, {"order": "end-to-end"}, {"order": "checkpointed"}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [*ORDERS, {"order": "sequential", "cache": "memory"}, {"order": "sequential", "cache": "folder"}],
)
def test_networks_of_other_precisions_train_in_every_order(tmp_path, dtype, options):
    """As in float32, to what bfloat16 can tell."""
    rows = []
    for precision in (torch.float32, dtype):
        torch.manual_seed(0)
        network = models.resnet9(1, 10, features=4, size=8, depth=2)
        modules = split_into_modules(network, 2, DIGITS.x[:4], head="linear").to(precision)
        cache = {"cache": tmp_path} if options.get("cache") == "folder" else {}
        training = fit_modules(modules, FEW, epochs=2, optimizer=SGD, objective=trgl_multipliers(every=1),
                               validation=FEW, clip_norm=5.0, **options | cache)  # fmt: skip
        rows.append([row["train_loss"] for row in training.rows])
        assert {p.dtype for p in modules.parameters()} == {precision}
        assert {objective.multiplier.dtype for objective in training.objectives} == {torch.float64}
    assert rows[1] == pytest.approx(rows[0], rel=1e-4 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("options", ORDERS[:3])
def test_a_device_without_float64_trains_modules(options):
    whole = fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, objective=trgl_multipliers(every=1), **options)
    modules = modules_of(2)
    with NoDouble():
        single = fit_modules(modules, FEW, epochs=1, optimizer=SGD, objective=trgl_multipliers(every=1),
                             validation=FEW, **options)  # fmt: skip
    expected = [row["train_loss"] for row in whole.rows]
    assert [row["train_loss"] for row in single.rows] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [*ORDERS, {"order": "sequential", "cache": "memory"}])
def test_frozen_parts_stay_frozen_and_a_network_in_eval_mode_is_trained(options):
    modules = modules_of(2)
    frozen = modules.modules_in_order[0].part.pieces[1].blocks[0].eval()
    before = {name: value.clone() for name, value in frozen.named_buffers()}
    seen = []
    options |= {"report": lambda n: seen.append([module.training for module in frozen.modules()])}
    fit_modules(modules, FEW, epochs=2, optimizer=SGD, validation=FEW, **options)
    assert not any(any(modes) for modes in seen)
    assert all(torch.equal(value, before[name]) for name, value in frozen.named_buffers())
    assert {name for name, module in modules.named_modules() if not module.training} == {
        name for name, module in modules.named_modules() if module in set(frozen.modules())
    }
    fit_modules(modules.eval(), FEW, epochs=1, optimizer=SGD, validation=FEW, **options)
    assert all(module.training for module in modules.modules())
    assert any(not torch.equal(value, before[name]) for name, value in frozen.named_buffers())


def test_a_cache_is_refused_where_training_one_module_changes_another():
    modules = modules_of(2)
    flows = [module.part.flows[0] for module in modules.modules_in_order]
    first, second = (next(m for m in flow.modules() if isinstance(m, nn.Conv2d)) for flow in flows)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"cache is for modules that share no weights, but modules 1 and 2 share"):
        fit_modules(modules, FEW, epochs=1, optimizer=SGD, order="sequential", cache="memory")
    assert fit_modules(modules, FEW, epochs=1, optimizer=SGD, order="sequential").done == 2


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    run = Run(tmp_path / "run", {})
    fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, run=run)
    with pytest.raises(ValueError, match="order must be that of the checkpoint, 'parallel', got 'sequential'"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, order="sequential", run=run)
    with pytest.raises(ValueError, match=r"precision of the checkpoint, in which \S+ is torch.float32"):
        fit_modules(modules_of(2).double(), FEW, epochs=2, optimizer=SGD, run=run)
    with pytest.raises(ValueError, match=r"lr_scheduler must be that of the checkpoint, which has 0 .* got 2"):
        fit_modules(modules_of(2), FEW, epochs=2, optimizer=SGD, run=run,
                    lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))  # fmt: skip
    sequence = {"optimizer": SGD, "order": "sequential", "run": Run(tmp_path / "sequence", {})}
    fit_modules(modules_of(2), FEW, epochs=1, **sequence)
    with pytest.raises(ValueError, match=r"epochs and laps must be those of the checkpoint, \[1, 1\] and 1, got"):
        fit_modules(modules_of(2), FEW, epochs=2, **sequence)


def test_modules_that_would_not_train_are_named():
    with pytest.warns(UserWarning, match=r"leaves out \d+ of \d+ parameters that require a gradient"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=lambda parameters: SGD(list(parameters)[:1]))
    elsewhere = modules_of(2)
    with pytest.raises(ValueError, match="optimizer must hold parameters of the network"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=lambda parameters: SGD(elsewhere.parameters()))


def test_a_frozen_module_that_has_no_epochs_needs_no_optimizer_of_its_own():
    modules = modules_of(2)
    modules.modules_in_order[0].requires_grad_(False)
    before = copy.deepcopy(modules.modules_in_order[0])
    fit_modules(modules, FEW, epochs=[0, 1], optimizer=SGD, order="sequential")
    assert_same(modules.modules_in_order[0], before)
    with pytest.raises(ValueError, match="optimizer must hold parameters of the network that require a gradient"):
        fit_modules(modules, FEW, epochs=1, optimizer=SGD)


def test_modules_share_no_multiplier():
    one, plain = LeastAction(), CrossEntropy()
    with pytest.raises(ValueError, match="objective must make a new LeastAction for each module"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, objective=lambda k, K: one)
    assert fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, objective=lambda k, K: plain).done == 1
    with pytest.raises(TypeError, match="objective must be a function that makes one for each module"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, objective=LeastAction())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="objective must make an odenets Objective of each module, got 1"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, objective=lambda k, K: 1)  # type: ignore[arg-type]


def test_gradients_are_to_be_enabled_and_a_run_is_to_be_one():
    modules = split_into_modules(models.small_network(depth=2), 2, torch.rand(2, 1, 8, 8))
    batches, options = [(torch.rand(4, 1, 8, 8), torch.arange(4))], {"epochs": 1, "optimizer": torch.optim.Adam}
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients must be enabled to train"):
        fit_modules(modules, batches, **options)
    with pytest.raises(TypeError, match=r"run must be an odenets.training.Run, got 'runs/first'"):
        fit_modules(modules, batches, run="runs/first", **options)
