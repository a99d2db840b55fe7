from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from odenets.checkpoints import load_weights, save_weights
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.errors import DivergedError
from odenets.least_action import LeastAction
from odenets.training import data
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy
from odenets.training.runs import Run
from tests.odenets.checks import assert_same
from tests.odenets.training.small import TENS, Migrating, network, on_cpu, settings, sgd, tiny


@pytest.mark.parametrize("kill_after", [1, 2, 3])
def test_killed_and_resumed_ends_with_the_same_weights(parts, tmp_path, kill_after):
    """Across depth edits, the tolerance duplicates at every check, and with the multiplier of its objective."""

    class Kill(AdaptiveDepth):
        def after_epoch(self, training, row):
            super().after_epoch(training, row)
            if training.epoch == kill_after + 1:
                raise InterruptedError

    inputs = data.Batches(parts.validation, 500).inputs
    rule = DepthRule(1e-7, max_depth=4)
    whole = network(parts)
    objectives = [LeastAction(every=4) for _ in range(3)]
    fit(whole, **settings(parts, callbacks=[AdaptiveDepth(rule, inputs)], objective=objectives[0]))
    assert whole.depth == 4
    run = Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(InterruptedError):
        fit(network(parts), **settings(parts, callbacks=[Kill(rule, inputs)], objective=objectives.pop()), run=run)
    torch.manual_seed(123)
    resumed = network(parts)
    run = Run(tmp_path / "run", {"seed": 0}, resume=True)
    settings_ = settings(parts, callbacks=[AdaptiveDepth(rule, inputs)], objective=objectives[1])
    training = fit(resumed, **settings_, run=run)
    assert [row["epoch"] for row in training.rows] == [1, 2, 3, 4]
    assert resumed.flows[0].h == whole.flows[0].h
    assert_same(whole, resumed)
    assert_same(*objectives)


def backwards(net, _):
    return torch.optim.SGD([*net.named_parameters()][::-1], 0.05, momentum=0.9)


def head_first(net, _):
    others = [p for part in (net.encoder, *net.flows) for p in part.parameters()]
    return torch.optim.Adam([{"params": [*net.head.parameters()], "lr": 0.01}, {"params": others}], 0.02)


@pytest.mark.parametrize("make", [backwards, head_first])
def test_an_optimizer_in_another_order_than_the_network_goes_on_as_it_was(tmp_path, make):
    """Also across depth edits, which sort its groups as the network lists its parameters."""
    callback = AdaptiveDepth(DepthRule(1e-9, max_depth=4), TENS.inputs, every=2)
    run, whole, resumed = Run(tmp_path / "run", {}), tiny(solver="bs23"), tiny(solver="bs23")
    training = fit(whole, TENS, epochs=4, optimizer=partial(make, whole), callbacks=[callback])
    begun = tiny(solver="bs23")
    fit(begun, TENS, epochs=2, optimizer=partial(make, begun), callbacks=[callback], run=run)
    fit(resumed, TENS, epochs=4, optimizer=partial(make, resumed), callbacks=[callback], run=run)
    assert whole.depth == 4
    assert_same(whole, resumed)
    for group in training.optimizer.param_groups:
        names = {p: name for name, p in whole.named_parameters()}
        assert group.get("param_names", []) in ([], [names[p] for p in group["params"]])


def test_a_checkpoint_of_another_optimizer_is_named(tmp_path):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    with pytest.raises(ValueError, match=r"checkpoint .*resume.pt: optimizer must be that of .*, SGD, got Adam"):
        fit(tiny(), TENS, epochs=2, optimizer=torch.optim.Adam, run=run)
    with pytest.raises(ValueError, match=r"resume.pt: optimizer must hold the parameters that it held"):
        fit(tiny(), TENS, epochs=2, optimizer=lambda parameters: sgd(parameters[-2:]), run=run)


def test_divergence_is_an_error_that_keeps_the_checkpoint(parts, tmp_path):
    run = Run(tmp_path / "run", {})
    fit(network(parts), **settings(parts, epochs=1), run=run)
    state = run.load_state()

    wild = partial(torch.optim.SGD, lr=1e30)
    with pytest.raises(DivergedError, match="lower the learning rate, refine the steps"):
        fit(network(parts), **settings(parts, optimizer=wild, lr_scheduler=None))
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
    with pytest.warns(UserWarning, match="got objective=CrossEntropy where it has Breaking: "):
        assert fit(network(parts), **settings(parts, batches=whole, **changes), run=run).epoch == 4


def test_a_resumed_training_keeps_its_precision_to_the_last_bit(tmp_path):
    whole = tiny()
    fit(whole, TENS, epochs=3, optimizer=sgd, fabric=on_cpu("64-true"))
    run, resumed = Run(tmp_path / "run", {}), tiny()
    fit(tiny(), TENS, epochs=1, optimizer=sgd, fabric=on_cpu("64-true"), run=run)
    fit(resumed, TENS, epochs=3, optimizer=sgd, fabric=on_cpu("64-true"), run=run)
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match=r"precision of the checkpoint, in which \S+ is torch.float64"):
        fit(tiny(), TENS, epochs=4, optimizer=sgd, run=run)
    with pytest.raises(ValueError, match="lr_scheduler must be that of the checkpoint, which has none"):
        fit(tiny(), TENS, epochs=4, optimizer=sgd, fabric=on_cpu("64-true"), run=run,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))  # fmt: skip


def test_parameters_that_would_not_train_are_named():
    other = tiny()
    with pytest.raises(ValueError, match="optimizer must hold parameters of the network"):
        fit(tiny(), TENS, epochs=1, optimizer=lambda _: sgd(other.parameters()))
    with pytest.warns(UserWarning, match=r"leaves out \d+ of \d+ parameters that require a gradient, encoder") as seen:
        fit(tiny(), TENS, epochs=1, optimizer=lambda parameters: sgd(parameters[-2:]))
    assert [warning.filename for warning in seen] == [__file__]
    frozen = tiny().requires_grad_(False)
    frozen.head.requires_grad_(True)
    fit(frozen, TENS, epochs=1, optimizer=lambda parameters: sgd(parameters[-2:]))

    class NewHead:
        def after_epoch(self, training, row):
            training.network.head = tiny().head

    with pytest.warns(UserWarning, match="leaves out 2 of"):
        fit(tiny(), TENS, epochs=2, optimizer=sgd, callbacks=[NewHead()])

    class Learned(CrossEntropy):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def loss(self, network, batch, output, records):
            return super().loss(network, batch, output * self.scale, records)

    with pytest.warns(UserWarning, match="leaves out 1 of .*scale"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=Learned())


def test_modules_that_migrate_older_states_do_not_migrate_those_of_their_version(tmp_path):
    """Out of a resume state, out of a snapshot and out of a file."""

    def make():
        net = tiny()
        net.head = nn.Sequential(nn.Flatten(), Migrating(256, 10))
        return net

    one, other = make(), make()
    run = Run(tmp_path / "run", {})
    training = fit(one, TENS, epochs=1, optimizer=sgd, run=run)
    fit(other, TENS, epochs=1, optimizer=sgd, run=run)
    assert_same(one, other)
    training.load_state_dict(training.snapshot(), sgd)
    assert_same(one, other)
    load_weights(one, save_weights(one, tmp_path / "net.safetensors"))
    assert_same(one, other)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    state = run.load_state()
    assert state is not None
    run.save_state({key: value for key, value in state.items() if key != "processes"})
    with pytest.raises(ValueError, match=r"checkpoint .*resume.pt must be one that fit of this version has written"):
        fit(tiny(), TENS, epochs=2, optimizer=sgd, run=run)


def test_fewer_epochs_than_are_done_are_warned_of(tmp_path):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=2, optimizer=sgd, run=run)
    with pytest.warns(UserWarning, match=r"resume.pt: 2 epochs are done, got epochs=1"):
        assert len(fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run).rows) == 2


def test_what_callbacks_add_to_a_row_is_kept_as_plain_values(tmp_path):
    def add(training, row):
        row |= {"share": np.float32(0.5), "norm": torch.tensor(2.0)}

    run = Run(tmp_path / "run", {})
    row = fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run, callbacks=[add]).rows[0]
    assert (row["share"], row["norm"]) == (0.5, 2.0)
    with pytest.raises(TypeError, match=r"row\['network'\] must be a number or text, got Network"):
        fit(
            tiny(),
            TENS,
            epochs=1,
            optimizer=sgd,
            callbacks=[lambda training, row: row.update(network=training.network)],
        )


RATES = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("begun", "now", "message"),
    [
        ({}, {"optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9)}, r"got lr=0.7 where it has 0.05: begin"),
        (
            {"lr_scheduler": partial(RATES.CosineAnnealingLR, T_max=3)},
            {"lr_scheduler": partial(RATES.CosineAnnealingLR, T_max=4)},
            "got T_max=4 where it has 3: begin",
        ),
        ({"lr_scheduler": partial(RATES.StepLR, step_size=1)}, {}, None),
        ({"lr_scheduler": RATES.ReduceLROnPlateau}, {}, None),
    ],
)
def test_numbers_that_do_not_hold_after_a_resume_are_warned_of(tmp_path, begun, now, message):
    """And no change that a scheduler made."""
    options = {"optimizer": sgd, "run": Run(tmp_path / "run", {})} | begun
    fit(tiny(), TENS, epochs=1, **options)
    if message is None:
        fit(tiny(), TENS, epochs=2, **options)
        return
    with pytest.warns(UserWarning, match=message) as caught:
        fit(tiny(), TENS, epochs=2, **options | now)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match=message):  # again: they still do not hold
        fit(tiny(), TENS, epochs=3, **options | now)
    fit(tiny(), TENS, epochs=4, **options)


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        ({"features": 5}, {}, r"network must be that of the checkpoint, got a Network: encoder.*\(4, .* and \(5, "),
        ({"norm": "batch"}, {}, "network must be that of the checkpoint, got a Network: .*it lacks"),
        (
            {},
            {"objective": LeastAction()},
            "objective must be that of the checkpoint, got a LeastAction: it lacks .*mult",
        ),
    ],
)
def test_a_checkpoint_of_another_network_or_objective_is_named_with_what_differs(tmp_path, other, options, message):
    run = Run(tmp_path / "run", {})
    fit(tiny(), TENS, epochs=1, optimizer=sgd, run=run)
    with pytest.raises(ValueError, match=f"checkpoint .*resume.pt: {message}"):
        fit(tiny(**other), TENS, epochs=2, optimizer=sgd, run=run, **options)
