import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from odenets import data, load_weights, models
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.flow import Records
from odenets.least_action import LeastAction
from odenets.objectives import CrossEntropy
from odenets.runs import Run
from odenets.training import DivergedError, evaluate, fit
from tests.odenets import train_in_processes


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def parts():
    train, test = data.load("digits")
    return data.split(train, test, size=250)


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


def test_a_lazy_network_is_made_before_its_optimiser(parts):
    from torch import nn

    from odenets import Flow, Network

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
