import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, Network, adapt, models
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.errors import DivergedError
from odenets.training import data
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.objectives import Objective
from tests.odenets.checks import assert_same
from tests.odenets.training.small import TENS, Restless, answering, network, settings, sgd, tiny


def test_learns(parts):
    training = fit(network(parts), **settings(parts, epochs=15, lr_scheduler=None))
    assert training.rows[-1]["validation_accuracy"] > 0.3
    assert training.rows[-1]["evaluations"] == 15 * 200 * 3
    measured = evaluate(training.network, data.Batches(parts.validation, 500))
    assert measured.accuracy == training.rows[-1]["validation_accuracy"]


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
    with pytest.warns(UserWarning, match=r"Poison acts after epochs \[5\], of 2"):
        training = fit(net, **settings(parts, epochs=2), callbacks=[callback])
    hook.remove()
    assert training.network.flows[0].h == (0.5, 0.5)
    assert "diverged" in training.rows[0]["edits"]


def test_a_lazy_network_is_made_before_its_optimizer(parts):
    net = Network(nn.Flatten(), Flow(), nn.Linear(64, 10))
    training = fit(net, **settings(parts, epochs=1))
    assert len(training.optimizer.param_groups[0]["params"]) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": 0}, "clip_norm must be positive"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"epochs": -1}, "epochs must not be negative"),
        ({"loss_limit": math.nan}, "loss_limit must be a number, infinity for none"),
    ],
)
def test_errors(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(network(parts), **settings(parts, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2.0}, "accumulate must be a whole number, got 2.0"),
        ({"clip_norm": "1"}, "clip_norm must be a number, got '1'"),
        ({"loss_limit": None}, "loss_limit must be a number, got None"),
    ],
)
def test_other_types_than_numbers_are_named(parts, changes, message):
    with pytest.raises(TypeError, match=message):
        fit(network(parts), **settings(parts, **changes))


def test_a_loss_above_the_limit_is_told_with_it(parts):
    with pytest.raises(DivergedError, match=r"its training loss is \d.*, above loss_limit=0.001"):
        fit(network(parts), **settings(parts, loss_limit=1e-3))


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
    net = adapt(nn.Sequential(models.Normalize([0.0], [1.0]), answering(lambda z: z).eval()), blocks=["1.model.1"])
    assert net.training
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert all(module.training for module in net.modules())


def test_rows_of_an_adapted_model_hold_its_steps():
    row = fit(adapt(answering(lambda z: z), blocks=["model.1"]), TENS, epochs=1, optimizer=sgd).rows[0]
    assert (row["depth"], row["h"], row["evaluations"]) == (1, "1", 20)


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


def test_validation_changes_nothing_in_a_training_that_draws():
    nets = []
    for validation in (None, TENS):
        net = tiny()
        net.encoder = nn.Sequential(net.encoder, Restless())
        nets.append(net)
        torch.manual_seed(3)
        fit(net, TENS, epochs=2, optimizer=sgd, validation=validation)
    assert_same(*nets)


def test_the_shape_of_a_lazy_network_is_found_without_a_trace():
    norm = nn.BatchNorm1d(64)
    net = Network(nn.Sequential(nn.Flatten(), norm), Flow(), nn.Linear(64, 10))
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert norm.num_batches_tracked == 2


def test_no_gradients_are_left():
    net = tiny()
    fit(net, TENS, epochs=1, optimizer=sgd)
    assert all(p.grad is None for p in net.parameters())


class OfLogits(Objective):
    """Cross-entropy of what stands first in a tuple, or under "scores"."""

    def loss(self, network, batch, output, records):
        return F.cross_entropy(output["scores"] if isinstance(output, dict) else output[0], batch[1])


@pytest.mark.parametrize("how", [lambda z: (z, None), lambda z: {"scores": z}])
def test_outputs_that_are_no_tensors_are_the_objectives_matter(how):
    def network():
        torch.manual_seed(0)
        return adapt(answering(how), blocks=["model.1"])

    with pytest.raises(TypeError, match=r"must return logits, a floating tensor \(B, classes\), got (tuple|dict)"):
        evaluate(network(), TENS)
    with pytest.raises(TypeError, match="must return logits"):
        fit(network(), TENS, epochs=1, optimizer=sgd)
    with pytest.raises(TypeError, match="must return logits"):
        fit(network(), TENS, epochs=1, optimizer=sgd, objective=OfLogits(), validation=TENS)
    row = fit(network(), TENS, epochs=1, optimizer=sgd, objective=OfLogits()).rows[0]
    assert row["train_loss"] > 0
    assert row["train_accuracy"] != row["train_accuracy"]  # NaN: nobody knows which output is meant


def test_a_loss_function_is_no_objective():
    with pytest.raises(TypeError, match=r"objective must be an odenets Objective, got CrossEntropyLoss\(\)"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=nn.CrossEntropyLoss())  # type: ignore[arg-type]


def test_a_network_that_records_nothing_is_no_network():
    with pytest.raises(TypeError, match=r"records its steps, an odenets.Recorder, got Linear: odenets.adapt makes one"):
        fit(nn.Linear(2, 2), TENS, epochs=1, optimizer=sgd)  # type: ignore[arg-type]
