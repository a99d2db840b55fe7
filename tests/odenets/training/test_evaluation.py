import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.training import data
from odenets.training.evaluation import evaluate, evaluate_schemes
from odenets.training.loop import fit
from odenets.training.objectives import Task
from tests.odenets.checks import unchanged
from tests.odenets.training.small import TENS, TWENTY, Restless, tiny


class Judge(nn.Module):
    """A loss with layers that have modes."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, output, y):
        return F.cross_entropy(self.layers(output), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_evaluation_takes_inputs_to_the_network(dtype):
    net = tiny(dtype, solver="bs23")
    with torch.no_grad():
        logits = net(TWENTY.x.to(dtype)).double()
    expected, tolerance = F.cross_entropy(logits, TWENTY.y).item(), 1e-10 if dtype == torch.float64 else 1e-2
    assert evaluate(net, data.Batches(TWENTY, 7)).loss == pytest.approx(expected, rel=tolerance)
    assert set(evaluate_schemes(net, TENS)) == {*net.flows[0].tableau.outputs, "ensemble"}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("look", [evaluate, evaluate_schemes])
def test_evaluation_leaves_a_network_as_it_was(look, fails):
    net = tiny(norm="batch", solver="bs23")
    net.encoder = nn.Sequential(net.encoder, Restless(fails))
    net.flows[0].eval()
    with unchanged(net), pytest.raises(KeyError) if fails else torch.no_grad():
        look(net, TENS)


def test_evaluation_is_of_the_samples_as_they_are():
    net = tiny()
    assert evaluate(net, data.Batches(TWENTY, 10, seed=1, crop=4, flip=True)) == evaluate(net, data.Batches(TWENTY, 10))


def test_more_classes_than_logits_are_named():
    net = tiny()
    net.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match="the network has 5 logits, and the labels of data go up to 9"):
        evaluate(net, TENS)


def test_labels_that_count_for_nothing_are_left_out_of_the_means():
    net, labels = tiny(), torch.where(torch.arange(20) < 13, -100, TWENTY.y)
    batches = [(TWENTY.x[i : i + 9], labels[i : i + 9]) for i in range(0, 20, 9)]
    all_of_them, counted = evaluate(net, batches), evaluate(net, [(TWENTY.x[13:], TWENTY.y[13:])])
    assert (all_of_them.loss, all_of_them.accuracy) == pytest.approx((counted.loss, counted.accuracy))
    still = partial(torch.optim.SGD, lr=1e-12)
    row = fit(net, [(TWENTY.x, labels)], epochs=1, optimizer=still, validation=batches).rows[0]
    assert row["train_loss"] == pytest.approx(counted.loss)
    assert row["validation_loss"] == pytest.approx(counted.loss)
    assert row["train_accuracy"] == row["validation_accuracy"] == pytest.approx(counted.accuracy)


def test_evaluation_leaves_an_objective_as_it_was():
    objective = Task(Judge(nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(0.5))))
    net, judging = tiny(), copy.deepcopy(objective).eval()
    with unchanged(objective):
        loss = evaluate(net, TENS, objective=objective).loss
    assert loss == evaluate(net, TENS, objective=judging).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_half_precision_are_not_rounded_by_the_samples(dtype):
    net, many = tiny(dtype), [(TWENTY.x.repeat(15, 1, 1, 1)[:257], torch.arange(257) % 10)]
    each = lambda output, y: output.new_full((257,), 300.0)  # noqa: E731
    mean = lambda output, y: output.new_full((), 300.0)  # noqa: E731
    for metric in (each, mean):
        evaluation = evaluate(net, many, objective=Task(mean), metric=metric)
        assert evaluation.loss == evaluation.metric == torch.tensor(300.0, dtype=dtype).item()
