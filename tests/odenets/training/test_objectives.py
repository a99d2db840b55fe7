"""Objectives without measures."""

import math
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from odenets import measures, models
from odenets.least_action import ActionPenalty, LeastAction
from odenets.module_wise import greedy, trgl, trgl_multipliers
from odenets.recording import Records
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate
from odenets.training.loop import fit
from odenets.training.metrics import accuracy
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.rand(3, 1, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 2])


def value(objective, output, y):
    return objective.loss(torch.nn.Identity(), (output, y), output, Records({}))


def test_reverse_cross_entropy_is_that_with_reversed_labels():
    # Pang et al.: cross-entropy with the uniform distribution over the other classes, of the negated outputs
    output, y = torch.randn(4, 3, generator=GENERATOR), torch.tensor([0, 1, 2, 1])
    reversed_labels = (1 - F.one_hot(y, 3)) / 2
    torch.testing.assert_close(value(ReverseCrossEntropy(), output, y), F.cross_entropy(-output, reversed_labels))


def test_the_least_reverse_cross_entropy_is_where_the_other_classes_are_equally_likely():
    output = torch.tensor([[40.0, 0.0, 0.0, 0.0]])  # softmax of its negative: 0 for the right class, a third each
    assert value(ReverseCrossEntropy(), output, torch.tensor([0])).item() == pytest.approx(math.log(3))


def test_a_network_trained_by_it_has_its_largest_output_at_the_right_class():
    train, test = datasets.load("digits")
    torch.manual_seed(0)
    network = models.small_network(solver="euler", h=1.0, depth=2)

    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    fit(network, data.Batches(train, 64, seed=0), epochs=4, optimizer=sgd, objective=ReverseCrossEntropy())
    assert evaluate(network, data.Batches(test, 100)).accuracy > 0.85


def test_label_smoothing_is_torch_s():
    output, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(value(CrossEntropy(0.1), output, y), F.cross_entropy(output, y, label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1"):
        CrossEntropy(1.0)


@pytest.mark.parametrize(
    "objective",
    [
        LeastAction(),
        LeastAction(update="after", cost="norm"),
        ActionPenalty(0.1, cost="residue"),
        ActionPenalty(0.1, LeastAction(), cost="residue"),
        trgl(1.0)(0, 2),
        trgl_multipliers(cost="norm")(1, 2),
        Objective({"error": measures.error}),
    ],
)
@pytest.mark.parametrize("recorded", [{}, {"displacement": measures.displacement}])
def test_measures_that_were_not_recorded_are_named(objective, recorded):
    network, (x, y) = models.small_network(solver="euler", h=1.0, depth=2), BATCH
    names = re.escape(str(list(objective.measures)))
    with pytest.raises(ValueError, match=rf"records must hold {names}, which .* reads, got") as error:
        objective.loss(network, (x, y), *network.record(x, **recorded))
    assert "network.record(x, **objective.measures)" in str(error.value)
    with pytest.raises(TypeError, match="records must hold measures by name, got tuple"):
        objective.loss(network, (x, y), network(x), ())


def test_an_objective_without_measures_needs_no_records():
    network, (x, y) = models.small_network(solver="euler", h=1.0, depth=2), BATCH
    assert greedy()(0, 2)(network, x, y) == F.cross_entropy(network(x), y)


@pytest.mark.parametrize("objective", [CrossEntropy(), CrossEntropy(0.1), ReverseCrossEntropy()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_whole_numbers_are_classes(objective, dtype):
    output, y = torch.randn(5, 2, generator=GENERATOR), torch.tensor([0, 1, 1, 0, 1])
    assert torch.equal(value(objective, output, y.to(dtype)), value(objective, output, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shares_of_the_classes_are_labels_of_the_cross_entropy(dtype):
    output = torch.randn(6, 4, generator=GENERATOR).to(dtype)
    shares = torch.rand(6, 4, generator=GENERATOR).softmax(1)
    expected = -(shares.double() * output.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(value(CrossEntropy(), output, shares).double(), expected, rtol=1e-6, atol=1e-6)
    assert accuracy(output, shares).sum() == (output.argmax(1) == shares.argmax(1)).sum()


@pytest.mark.parametrize("objective", [CrossEntropy(), ReverseCrossEntropy()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_in_single(objective, dtype):
    output, y = torch.randn(7, 5, generator=GENERATOR).to(dtype), torch.arange(7) % 5
    torch.testing.assert_close(value(objective, output, y), value(objective, output.float(), y), rtol=0, atol=0)


LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("objective", [CrossEntropy(), ReverseCrossEntropy()])
@pytest.mark.parametrize(
    ("output", "y", "error", "message"),
    [
        ((torch.rand(3, 4), None), LABELS, TypeError, "the network must return logits.* got tuple"),
        ({"logits": torch.rand(3, 4)}, LABELS, TypeError, "the network must return logits.* got dict"),
        (torch.ones(3, 4, dtype=torch.long), LABELS, TypeError, "the network must return logits.* got torch.int64"),
        (torch.rand(3), LABELS, ValueError, r"logits \(B, classes\) of two classes or more, got \(3,\)"),
        (torch.rand(3, 1), LABELS * 0, ValueError, r"of two classes or more, got \(3, 1\)"),
        (torch.rand(3, 4, 2, 2), LABELS, ValueError, r"of two classes or more, got \(3, 4, 2, 2\)"),
        (torch.rand(3, 4), LABELS.float(), ValueError, r"labels must be classes \(B,\), whole numbers, or shares"),
        (torch.rand(3, 4), torch.rand(3, 3), ValueError, r"shares of all classes \(3, 4\), got torch.float32 \(3, 3\)"),
        (torch.rand(3, 4), LABELS[:2], ValueError, r"one class for each of 3 outputs, got \(2,\)"),
        (torch.rand(3, 4), LABELS[:, None], ValueError, r"one class for each of 3 outputs, got \(3, 1\)"),
        (torch.rand(3, 4), [0, 1, 2], TypeError, "labels must be a tensor, got list"),
    ],
)
def test_outputs_and_labels_that_fit_no_cross_entropy_are_named(objective, output, y, error, message):
    with pytest.raises(error, match=message):
        value(objective, output, y)


@pytest.mark.parametrize(("batch", "got"), [(LABELS, "Tensor"), ({"x": 1, "y": 2}, "dict"), ((1, 2, 3), "3 parts")])
def test_a_batch_that_is_no_pair_is_named(batch, got):
    for objective in (CrossEntropy(), ReverseCrossEntropy()):
        with pytest.raises(TypeError, match=rf"batch must be a pair \(inputs, targets\), got {got}"):
            objective.loss(torch.nn.Identity(), batch, torch.rand(3, 4), Records({}))


def test_shares_are_no_labels_of_the_reverse_cross_entropy():
    with pytest.raises(ValueError, match=r"whole numbers, got shares of the classes \(3, 4\)"):
        value(ReverseCrossEntropy(), torch.rand(3, 4), torch.rand(3, 4))
