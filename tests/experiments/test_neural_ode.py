from itertools import islice

import pytest
import torch
from neural_ode import EXPERIMENT, Meter, cost_of_action, parts_of, step, step_memory
from neural_ode_setup import Config, build

from lab.experiment import run
from lab.plotting import cost_of_solves, solves_while_training
from odenets import measures
from odenets.least_action import ActionPenalty
from odenets.training.data import Batches
from odenets.training.objectives import CrossEntropy
from odenets.training.runs import read_metrics, read_summary

WAYS = ("odeint bosh3", "odeint dopri5", "adjoint bosh3", "adjoint dopri5", "flow bs23", "flow dopri5")
TINY = {"seeds": (0,), "epochs": 2, "train_size": 100, "test_size": 50, "features": 4, "workers": 1, "probes": 1}
TINY_WAYS = ("odeint bosh3", "adjoint bosh3", "flow bs23")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(EXPERIMENT, Config(**TINY, ways=TINY_WAYS, output=folder))
    return folder


@pytest.fixture(scope="module")
def parts():
    return parts_of(Config(train_size=100))


@pytest.fixture
def batch(parts):
    return parts.train.x[:8], parts.train.y[:8]


def network(parts, way, tolerance=1e-6):
    return build(Config(features=4, rtol=tolerance, atol=tolerance), parts.train, way, seed=0)


def test_the_run_folder_holds_everything(folder):
    rows = read_summary(folder)["results"]["rows"]
    assert [(row["way"], row["action"]) for row in rows] == [(w, a) for a in (False, True) for w in TINY_WAYS]
    text = (folder / "table.md").read_text()
    assert all(text.count(f"| {way} ") == 2 for way in TINY_WAYS)
    assert "flow bs23 beside odeint bosh3" in text
    assert len(read_metrics(folder)) == 2 * 2 * 3
    assert {path.name for path in (folder / "figures").iterdir()} == {"cost.png", "training.png"}
    for row in rows:
        assert row["peak_memory"] > 0
        assert row["epoch_seconds"] > 0
        assert row["action_error"] < 0.05
        assert (row["backward"] > 0) == row["way"].startswith("adjoint")
        if row["way"].startswith("flow"):
            assert row["cost"]["evaluations"] == 0


def test_the_loop_counts_the_same_evaluations(folder):
    """Those of the flow, per sample, and the meter's, per batch of 64 and of 16."""
    for row in read_metrics(folder):
        mean = float(row["evaluations"]) / 80 / int(row["epoch"])
        assert abs(mean - float(row["forward"])) < 4


def test_figures_show_the_run(folder):
    rows = read_summary(folder)["results"]["rows"]
    bars = cost_of_solves(rows).axes[1].patches
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(sorted(row["epoch_seconds"] for row in rows))
    assert len(solves_while_training(read_metrics(folder)).axes[0].lines) == 6


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_same_network(parts, batch, way):
    reference = network(parts, "flow dopri5", 1e-7)
    found = network(parts, way)
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), reference.parameters(), strict=True))
    output, records = found.record(batch[0], action=measures.action)
    expected, expected_records = reference.record(batch[0], action=measures.action)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(records["action"].sum(0), expected_records["action"].sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["odeint dopri5", "adjoint dopri5"])
def test_gradients_of_the_action_agree(parts, batch, way):
    """Those of the quadrature by stages are those of the extra state."""
    gradients = []
    for net in (network(parts, "flow dopri5"), network(parts, way)):
        step(net, batch, ActionPenalty(1.0))
        gradients.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_the_meter_counts_calls_forward_and_in_backward(parts, batch, way):
    net = network(parts, way, 1e-4)
    calls = []
    with Meter(net, "cpu") as meter:
        hook = net.flows[0].field.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(2):
            net(batch[0]).sum().backward()
        found = meter.take()
        hook.remove()
        assert found["forward"] == net.evaluations
        assert found["forward"] + found["backward"] == len(calls) / 2
        assert (found["backward"] > 0) == way.startswith("adjoint")
        net.eval()(batch[0])
        net.train()(batch[0])
        assert meter.take()["forward"] == found["forward"]
    net(batch[0])
    assert meter.calls == {"forward": 0, "backward": 0}


def test_the_action_costs_evaluations_only_as_an_extra_state(parts):
    """At an absolute tolerance well below the relative one: the extra state begins at 0."""
    config = Config(features=4)
    batches = list(islice(Batches(parts.train, 32).epoch(0), 1))
    cost = {way: cost_of_action(build(config, parts.train, way, 0), batches) for way in ("odeint dopri5", "flow bs23")}
    assert cost["flow bs23"]["evaluations"] == 0
    assert cost["odeint dopri5"]["evaluations"] > 0.1


def test_the_adjoint_needs_the_least_memory(parts, batch):
    peak = {way: step_memory(network(parts, way, 1e-4), batch, CrossEntropy()) for way in WAYS}
    assert peak["adjoint bosh3"] < peak["flow bs23"] < peak["odeint bosh3"]


def test_torchdiffeq_says_what_it_cannot_do(parts, batch):
    net = network(parts, "odeint bosh3")
    with pytest.raises(ValueError, match="gives the solution and the action, not \\['error'\\]"):
        net.record(batch[0], error=measures.error)
    with pytest.raises(NotImplementedError, match="does not show its steps"):
        list(net.steps(batch[0]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rtol": -1.0}, "rtol must be finite and not negative, got -1.0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"weight": -0.1}, "weight must not be negative, got -0.1"),
        ({"ways": ()}, "ways must hold at least one"),
        ({"ways": ("odeint rk4",)}, "ways must be among odeint bosh3, .*, got odeint rk4"),
    ],
)
def test_a_wrong_argument_is_rejected(wrong, message):
    with pytest.raises(ValueError, match=message):
        Config(**wrong)
