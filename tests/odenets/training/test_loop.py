import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from odenets import Flow, Network, adapt, load_weights, models
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.errors import DivergedError
from odenets.least_action import ActionPenalty, LeastAction
from odenets.recording import Records
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate, evaluate_schemes
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.runs import Run
from tests.odenets.training import train_in_processes


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def parts():
    train, test = datasets.load("digits")
    return datasets.split(train, test, size=250)


def network(parts, depth=1, **options):
    torch.manual_seed(0)
    normalize = models.Normalize(list(parts.train.mean), list(parts.train.std))
    return models.small_network(features=8, depth=depth, normalize=normalize, **options)


def settings(parts, **changes):
    return {
        "batches": data.Batches(parts.train, 64, seed=0),
        "epochs": 4,
        "optimizer": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        "schedule": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4),
        "validation": data.Batches(parts.validation, 500),
    } | changes


def test_learns(parts):
    training = fit(network(parts), **settings(parts, epochs=15, schedule=None))
    assert training.rows[-1]["validation_accuracy"] > 0.3
    assert training.rows[-1]["evaluations"] == 15 * 200 * 3
    measured = evaluate(training.network, data.Batches(parts.validation, 500))
    assert measured.accuracy == training.rows[-1]["validation_accuracy"]


@pytest.mark.parametrize("kill_after", [1, 2, 3])
def test_killed_and_resumed_ends_with_the_same_weights(parts, tmp_path, kill_after):
    """Across depth edits: the tolerance duplicates at every check."""

    class Kill(AdaptiveDepth):
        def after_epoch(self, training, row):
            super().after_epoch(training, row)
            if training.epoch == kill_after + 1:
                raise Killed

    inputs = data.Batches(parts.validation, 500).inputs
    rule = DepthRule(1e-7, max_depth=4)
    whole = network(parts)
    fit(whole, **settings(parts, callbacks=[AdaptiveDepth(rule, inputs)]))
    assert whole.depth == 4
    run = Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(Killed):
        fit(network(parts), **settings(parts, callbacks=[Kill(rule, inputs)]), run=run)
    torch.manual_seed(123)
    resumed = network(parts)
    run = Run(tmp_path / "run", {"seed": 0}, resume=True)
    training = fit(resumed, **settings(parts, callbacks=[AdaptiveDepth(rule, inputs)]), run=run)
    assert [row["epoch"] for row in training.rows] == [1, 2, 3, 4]
    assert resumed.flows[0].h == whole.flows[0].h
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_divergence_is_an_error_that_keeps_the_checkpoint(parts, tmp_path):
    run = Run(tmp_path / "run", {})
    fit(network(parts), **settings(parts, epochs=1), run=run)
    state = run.load_state()

    def wild(net):
        return torch.optim.SGD(net.parameters(), 1e30)

    with pytest.raises(DivergedError, match="lower the learning rate, refine the steps"):
        fit(network(parts), **settings(parts, optimizer=wild, schedule=None))
    assert run.load_state()["epoch"] == state["epoch"] == 1


@pytest.mark.parametrize(
    ("value", "validated", "message"),
    [(float("nan"), False, "weights that are not finite"), (3e38, True, "its validation loss is")],
)
def test_what_a_broken_epoch_leaves_is_not_saved(parts, tmp_path, value, validated, message):
    """The second epoch's only step breaks the weights after its loss was finite."""

    class Breaking(CrossEntropy):
        steps = 0

        def after_step(self, network, batch):
            self.steps += 1
            if self.steps == 2:
                torch.nn.init.constant_(network.head[-1].weight, value)

    run = Run(tmp_path / "run", {})
    changes = {} if validated else {"validation": None}
    whole = data.Batches(parts.train, len(parts.train))
    with pytest.raises(DivergedError, match=message):
        fit(network(parts), **settings(parts, batches=whole, objective=Breaking(), **changes), run=run)
    state = run.load_state()
    assert state["epoch"] == 1
    assert all(value.isfinite().all() for value in state["network"].values())
    assert fit(network(parts), **settings(parts, batches=whole, **changes), run=run).epoch == 4


def test_adaptive_depth_recovers_from_divergence(parts):
    net = network(parts)
    poisoned = [True]

    class Poison(AdaptiveDepth):
        def on_divergence(self, training):
            recovered = super().on_divergence(training)
            poisoned[0] = False
            return recovered

    hook = net.head.register_forward_hook(lambda m, i, out: out * float("nan") if poisoned[0] and m.training else out)
    callback = Poison(DepthRule(0.1), data.Batches(parts.validation, 500).inputs, every=5)
    training = fit(net, **settings(parts, epochs=2), callbacks=[callback])
    hook.remove()
    assert training.network.flows[0].h == (0.5, 0.5)
    assert "diverged" in training.rows[0]["edits"]


def test_a_lazy_network_is_made_before_its_optimizer(parts):
    net = Network(nn.Flatten(), Flow(), nn.Linear(64, 10))
    training = fit(net, **settings(parts, epochs=1))
    assert len(training.optimizer.param_groups[0]["params"]) == 6


def trained(parts, epochs=2, **changes):
    net = network(parts, depth=2, solver="euler", h=1.0).to(parts.train.x.dtype)
    sgd = {"optimizer": lambda net: torch.optim.SGD(net.parameters(), 0.02), "schedule": None}
    return fit(net, **settings(parts, epochs=epochs, **sgd | changes))


def in_double(parts):
    """What two ways of one training make of these is the same, whatever order sums are taken in."""
    return replace(parts, **{name: replace(part, x=part.x.double()) for name, part in vars(parts).items()})


def assert_same_weights(one, two, tolerance=1e-6):
    for p, q in zip(one.network.parameters(), two.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [2, 5, 1000])
def test_batches_in_parts_give_the_same_weights(parts, accumulate):
    parts = in_double(parts)
    whole, in_parts = trained(parts), trained(parts, accumulate=accumulate)
    assert_same_weights(whole, in_parts)
    assert in_parts.rows[-1]["train_loss"] == pytest.approx(whole.rows[-1]["train_loss"], rel=1e-6)
    assert in_parts.evaluations == whole.evaluations


def test_gradients_are_clipped_to_the_norm(parts):
    batches = data.Batches(parts.train, len(parts.train))
    start = torch.nn.utils.parameters_to_vector(network(parts, depth=2, solver="euler", h=1.0).parameters())
    clipped = trained(parts, 1, batches=batches, clip_norm=0.01)
    moved = torch.nn.utils.parameters_to_vector(clipped.network.parameters()) - start
    assert moved.norm().item() == pytest.approx(0.02 * 0.01, rel=1e-2)
    assert_same_weights(trained(in_double(parts), 1), trained(in_double(parts), 1, clip_norm=1e9))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_what_eager_is(parts, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    parts = in_double(parts)
    compiled = trained(parts, compile=True)
    assert_same_weights(trained(parts), compiled)
    assert "record" not in vars(compiled.network)


def test_mixed_precision_trains_with_measures_in_float32(parts):
    seen = []

    class Seeing(LeastAction):
        def forward(self, network, batch, output, records):
            seen.append({records["action"].dtype, output.dtype})
            return super().forward(network, batch, output, records)

    calls = []

    def optimizer(net):
        net.flows[0].blocks[0].fields[0].conv1.register_forward_hook(lambda m, i, out: calls.append(out.dtype))
        return torch.optim.SGD(net.parameters(), 0.02)

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    objective = Seeing(update="after")
    half = trained(parts, 2, objective=objective, fabric=fabric, optimizer=optimizer, validation=None)
    full = trained(parts, 2, objective=LeastAction(update="after"))
    assert seen[0] == {torch.float32}
    assert set(calls) == {torch.bfloat16}
    assert not torch.equal(next(half.network.parameters()), next(full.network.parameters()))
    assert all(p.dtype == torch.float32 for p in half.network.parameters())
    assert half.rows[-1]["train_loss"] == pytest.approx(full.rows[-1]["train_loss"], rel=0.05)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have written what came out."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("train_in_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    subprocess.run(launch, check=True, capture_output=True, timeout=1200)
    return folder


@pytest.mark.slow
def test_two_processes_find_what_one_does(two_processes, tmp_path):
    """Shares of a batch and the last batch of an epoch are of several sizes."""
    train_in_processes.main(tmp_path, Fabric(accelerator="cpu", devices=1))
    networks = []
    for folder in (two_processes, tmp_path):
        net = models.small_network(features=8, solver="euler", h=1.0, depth=2).double()
        networks.append(load_weights(net, folder / "weights.safetensors"))
    for p, q in zip(*(net.parameters() for net in networks), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    two, one = ([float(v) for v in (folder / "found.txt").read_text().split()] for folder in (two_processes, tmp_path))
    assert two[:3] == pytest.approx(one[:3], rel=1e-3)
    assert two[3] == one[3]


@pytest.mark.slow
def test_two_processes_edit_alike_and_go_on_from_one_checkpoint(two_processes):
    """With batch norms, whose statistics each process takes of its own shares."""
    found = [json.loads((two_processes / f"adaptive_{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert [depth for depth, _ in found[0]] == [2, 4, 8, 8]
    one, two = (
        load_weights(train_in_processes.two_flows(4), two_processes / f"adaptive_{rank}.safetensors").state_dict()
        for rank in range(2)
    )
    for (name, p), q in zip(one.items(), two.values(), strict=True):
        assert torch.equal(p, q), name


def test_label_smoothing_is_torch_s(parts):
    output, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    found = CrossEntropy(0.1)(torch.nn.Identity(), (output, y), output, Records({}))
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(output, y, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": 0}, "clip_norm must be positive"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"epochs": -1}, "epochs must not be negative"),
    ],
)
def test_errors(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(network(parts), **settings(parts, **changes))


# -- the network's dtype and device ---------------------------------------------------------------------------------

IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TWENTY = data.TensorData("x", IMAGES, torch.arange(20) % 10, 10, (0.0,), (1.0,))
TENS = data.Batches(TWENTY, 10, seed=0)
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def tiny(dtype=torch.float32, **options):
    torch.manual_seed(1)
    options = {"features": 4, "solver": "euler", "h": 1.0, "depth": 2} | options
    return models.small_network(**options).to(dtype)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def on_cpu(precision):
    return Fabric(accelerator="cpu", devices=1, precision=precision)


@pytest.mark.parametrize(
    ("precision", "objective"),
    [
        ("64-true", lambda: LeastAction(update="after", every=2)),
        ("bf16-true", LeastAction),
        ("16-true", lambda: LeastAction(update="after", every=2)),
        ("16-true", lambda: ActionPenalty(0.1, cost="norm")),
    ],
)
def test_true_precisions_train_and_validate_as_a_network_of_that_dtype_does(precision, objective):
    """With parts of batches, clipping and validation; once converted by Fabric, once given in the dtype."""
    converted, given = tiny(norm="batch"), tiny(DTYPES[precision], norm="batch")
    options = {"epochs": 2, "optimizer": sgd, "validation": TENS, "clip_norm": 1.0, "accumulate": 2}
    found = [fit(converted, TENS, **options, objective=objective(), fabric=on_cpu(precision)),
             fit(given, TENS, **options, objective=objective())]  # fmt: skip
    assert found[0].rows[1]["train_loss"] == pytest.approx(found[1].rows[1]["train_loss"], rel=1e-3)
    assert found[0].rows[1]["validation_loss"] < found[0].rows[0]["train_loss"]
    for p, q in zip(converted.parameters(), given.parameters(), strict=True):
        assert p.dtype == q.dtype == DTYPES[precision]
        torch.testing.assert_close(p, q, rtol=0, atol=0.02 if precision != "64-true" else 1e-12)


@pytest.mark.parametrize("fabric", [None, "64-true"])
def test_a_training_in_float64_is_one_throughout(fabric):
    """Outputs, losses and costs in float32 would show at 1e-8."""
    one, two = tiny(torch.float64 if fabric is None else torch.float32), tiny(torch.float64)
    objective = ActionPenalty(0.5)
    fit(one, TENS, epochs=2, optimizer=sgd, objective=objective, fabric=fabric and on_cpu(fabric))
    optimizer = sgd(two)
    for x, y in (batch for epoch in range(2) for batch in TENS.epoch(epoch)):
        x = x.double()
        cost = sum((step.x1 - step.x0).square().mean() for step in two.steps(x))
        optimizer.zero_grad()
        (F.cross_entropy(two(x), y) + 0.5 * cost).backward()
        optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_evaluation_takes_inputs_to_the_network(dtype):
    net = tiny(dtype, solver="bs23")
    with torch.no_grad():
        logits = net(TWENTY.x.to(dtype)).double()
    expected, tolerance = F.cross_entropy(logits, TWENTY.y).item(), 1e-10 if dtype == torch.float64 else 1e-2
    assert evaluate(net, data.Batches(TWENTY, 7)).loss == pytest.approx(expected, rel=tolerance)
    assert set(evaluate_schemes(net, TENS)) == {*net.flows[0].tableau.outputs, "ensemble"}


def test_mixed_precision_of_a_float64_network_is_refused():
    with pytest.raises(ValueError, match="precision 'bf16-mixed' mixes float32 weights"):
        fit(tiny(torch.float64), TENS, epochs=1, optimizer=sgd, fabric=on_cpu("bf16-mixed"))


def test_a_resumed_training_keeps_its_precision_to_the_last_bit(tmp_path):
    whole = tiny()
    fit(whole, TENS, epochs=3, optimizer=sgd, fabric=on_cpu("64-true"))
    run, resumed = Run(tmp_path / "run", {}), tiny()
    fit(tiny(), TENS, epochs=1, optimizer=sgd, fabric=on_cpu("64-true"), run=run)
    fit(resumed, TENS, epochs=3, optimizer=sgd, fabric=on_cpu("64-true"), run=run)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"precision of the checkpoint, in which \S+ is torch.float64"):
        fit(tiny(), TENS, epochs=4, optimizer=sgd, run=run)
    with pytest.raises(ValueError, match="schedule must be that of the checkpoint, which has none"):
        fit(tiny(), TENS, epochs=4, optimizer=sgd, fabric=on_cpu("64-true"), run=run,
            schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))  # fmt: skip


class NoDouble(TorchDispatchMode):
    """A device that has no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(output)):
            raise TypeError("the device does not support float64")
        return output


@pytest.mark.parametrize("update", ["before", "after"])
def test_a_device_without_float64_trains_and_validates(update):
    outside, objective = LeastAction(update=update), LeastAction(update=update)
    expected = fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=outside, validation=TENS)
    with NoDouble():
        found = fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=objective, validation=TENS)
    assert objective.multiplier.dtype == torch.float32
    assert objective.multiplier.item() == pytest.approx(outside.multiplier.item(), rel=1e-5)
    for name in ("train_loss", "validation_loss", "validation_accuracy"):
        assert found.rows[0][name] == pytest.approx(expected.rows[0][name], rel=1e-5)


# -- modes, statistics, random state --------------------------------------------------------------------------------


def test_a_part_in_eval_mode_keeps_its_statistics_and_a_network_in_eval_mode_is_trained():
    net = tiny(norm="batch")
    first = net.flows[0].blocks[0].eval()
    before = {name: value.clone() for name, value in first.named_buffers()}
    fit(net, TENS, epochs=2, optimizer=sgd, validation=TENS)
    assert net.training
    assert not any(module.training for module in first.modules())
    assert all(torch.equal(value, before[name]) for name, value in first.named_buffers())
    second = net.flows[0].blocks[1].fields[0].norm1
    assert second.batches.tolist() == [4]
    fit(net.eval(), TENS, epochs=1, optimizer=sgd)
    assert all(module.training for module in net.modules())
    assert second.batches.tolist() == [6]


def test_a_network_in_eval_mode_within_a_new_module_is_trained():
    net = adapt(nn.Sequential(models.Normalize([0.0], [1.0]), Answering(lambda z: z).eval()), ["1.model.1"])
    assert net.training
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert all(module.training for module in net.modules())


def test_a_callback_that_leaves_eval_mode_does_not_thaw_or_freeze():
    class Looking:
        def after_epoch(self, training, row):
            training.network.eval()

    net = tiny(norm="batch")
    net.flows[0].blocks[0].eval()
    fit(net, TENS, epochs=3, optimizer=sgd, callbacks=[Looking()])
    counts = [block.fields[0].norm1.batches.item() for block in net.flows[0].blocks]
    assert counts == [0, 6]
    assert [block.training for block in net.flows[0].blocks] == [False, True]


class Restless(nn.Module):
    """Draws and counts in whatever mode, and fails where it is told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls + 1
        if self.fails:
            raise KeyError("failed")
        return F.dropout(x, 0.5)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("look", [evaluate, evaluate_schemes])
def test_evaluation_leaves_a_network_as_it_was(look, fails):
    net = tiny(norm="batch", solver="bs23")
    net.encoder = nn.Sequential(net.encoder, Restless(fails))
    net.flows[0].eval()
    modes, state = [m.training for m in net.modules()], {n: v.clone() for n, v in net.state_dict().items()}
    random = torch.get_rng_state()
    with pytest.raises(KeyError) if fails else torch.no_grad():
        look(net, TENS)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_validation_changes_nothing_in_a_training_that_draws():
    nets = []
    for validation in (None, TENS):
        net = tiny()
        net.encoder = nn.Sequential(net.encoder, Restless())
        nets.append(net)
        torch.manual_seed(3)
        fit(net, TENS, epochs=2, optimizer=sgd, validation=validation)
    for p, q in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(p, q)


def test_the_shape_of_a_lazy_network_is_found_without_a_trace():
    norm = nn.BatchNorm1d(64)
    net = Network(nn.Sequential(nn.Flatten(), norm), Flow(), nn.Linear(64, 10))
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert norm.num_batches_tracked == 2


def test_evaluation_is_of_the_samples_as_they_are():
    net = tiny()
    assert evaluate(net, data.Batches(TWENTY, 10, seed=1, crop=4, flip=True)) == evaluate(net, data.Batches(TWENTY, 10))


@pytest.mark.parametrize("fails", [False, True])
def test_a_record_of_ones_own_is_there_after_compiling(fails, monkeypatch):
    class Failing(CrossEntropy):
        def forward(self, *args):
            raise KeyError("failed")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    net = tiny()
    own = net.record = lambda x, **measures: Network.record(net, x, **measures)
    with pytest.raises(KeyError) if fails else torch.enable_grad():
        fit(net, TENS, epochs=1, optimizer=sgd, compile=True, objective=Failing() if fails else None)
    assert vars(net)["record"] is own


def test_no_gradients_are_left():
    net = tiny()
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert all(p.grad is None for p in net.parameters())


# -- outputs, labels, optimizers ------------------------------------------------------------------------------------


class Answering(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(1, 4, 3), Residual(), nn.Flatten(), nn.Linear(144, 10))
        self.how = how

    def forward(self, x):
        return self.how(self.model(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class OfLogits(Objective):
    """Cross-entropy of what stands first in a tuple, or under "logits"."""

    def forward(self, network, batch, output, records):
        return F.cross_entropy(output["logits"] if isinstance(output, dict) else output[0], batch[1])


@pytest.mark.parametrize("how", [lambda z: (z, None), lambda z: {"logits": z}])
def test_outputs_that_are_no_tensors_are_the_objectives_matter(how):
    def network():
        torch.manual_seed(0)
        return adapt(Answering(how), ["model.1"])

    with pytest.raises(TypeError, match=r"must return logits, a floating tensor \(B, classes\), got (tuple|dict)"):
        evaluate(network(), TENS)
    with pytest.raises(TypeError, match="must return logits"):
        fit(network(), TENS, epochs=1, optimizer=sgd)
    with pytest.raises(TypeError, match="must return logits"):
        fit(network(), TENS, epochs=1, optimizer=sgd, objective=OfLogits(), validation=TENS)
    row = fit(network(), TENS, epochs=1, optimizer=sgd, objective=OfLogits()).rows[0]
    assert row["train_loss"] > 0
    assert row["train_accuracy"] != row["train_accuracy"]  # NaN: nobody knows which output is meant


def test_more_classes_than_logits_are_named():
    net = tiny()
    net.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match="the network has 5 logits, and the labels of x go up to 9"):
        evaluate(net, TENS)


def test_parameters_that_would_not_train_are_named():
    other = tiny()
    with pytest.raises(ValueError, match="optimizer must hold parameters of the network"):
        fit(tiny(), TENS, epochs=1, optimizer=lambda net: sgd(other))
    with pytest.warns(UserWarning, match=r"leaves out \d+ of \d+ parameters that require a gradient, encoder"):
        fit(tiny(), TENS, epochs=1, optimizer=lambda net: sgd(net.head))
    frozen = tiny().requires_grad_(False)
    frozen.head.requires_grad_(True)
    fit(frozen, TENS, epochs=1, optimizer=lambda net: sgd(net.head))

    class NewHead:
        def after_epoch(self, training, row):
            training.network.head = tiny().head

    with pytest.warns(UserWarning, match="leaves out 2 of"):
        fit(tiny(), TENS, epochs=2, optimizer=sgd, callbacks=[NewHead()])

    class Learned(CrossEntropy):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, network, batch, output, records):
            return super().forward(network, batch, output * self.scale, records)

    with pytest.warns(UserWarning, match="leaves out 1 of .*scale"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=Learned())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda loss: loss.item(), TypeError, "Wrong returns float"),
        (lambda loss: loss.expand(2), ValueError, r"Wrong returns a loss of shape \(2,\)"),
        (lambda loss: loss.detach(), ValueError, "the loss of Wrong depends on no parameter"),
    ],
)
def test_losses_that_train_nothing_are_named(value, error, message):
    class Wrong(CrossEntropy):
        def forward(self, *args):
            return value(super().forward(*args))

    with pytest.raises(error, match=message):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=Wrong())


def test_a_loss_function_is_no_objective():
    with pytest.raises(TypeError, match=r"objective must be an odenets Objective, got CrossEntropyLoss\(\)"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=nn.CrossEntropyLoss())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_objective_of_ones_own_may_look_again(wrapped):
    """Its pass counts for no running statistic and draws for nobody else, be it the objective or the task of one."""

    class Looking(CrossEntropy):
        needs_second_forward = True  # type: ignore[assignment]
        seen = 0

        def after_step(self, network, batch):
            network.record(batch[0])
            self.seen += 1

    states = []
    for task in (CrossEntropy(), looking := Looking()):
        net = tiny(norm="batch")
        net.head = nn.Sequential(nn.Dropout2d(0.2), net.head)
        torch.manual_seed(0)
        fit(net, TENS, epochs=2, optimizer=sgd, objective=ActionPenalty(0.1, task) if wrapped else task)
        states.append(net.state_dict())
    assert looking.seen == 4
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(one, other)
