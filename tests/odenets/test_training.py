import pytest
import torch

from odenets import data, models
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.runs import Run
from odenets.training import DivergedError, evaluate, fit


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
