"""Objectives without measures."""

import math

import pytest
import torch
from torch.nn import functional as F

from odenets import data, models
from odenets.flow import Records
from odenets.objectives import CrossEntropy, ReverseCrossEntropy
from odenets.training import evaluate, fit

GENERATOR = torch.Generator().manual_seed(0)


def value(objective, output, y):
    return objective(torch.nn.Identity(), (output, y), output, Records({}))


def test_reverse_cross_entropy_is_its_sum_written_out():
    output, y = torch.randn(7, 5, generator=GENERATOR), torch.arange(7) % 5
    likely = (-output).softmax(1)
    terms = [-sum(likely[i, c].log() for c in range(5) if c != y[i]) / 4 for i in range(7)]
    torch.testing.assert_close(value(ReverseCrossEntropy(), output, y), torch.stack(terms).mean())  # type: ignore[arg-type]


def test_reverse_cross_entropy_is_that_with_reversed_labels():
    # Pang et al.: cross-entropy with the uniform distribution over the other classes, of the negated outputs
    output, y = torch.randn(4, 3, generator=GENERATOR), torch.tensor([0, 1, 2, 1])
    reversed_labels = (1 - F.one_hot(y, 3)) / 2
    torch.testing.assert_close(value(ReverseCrossEntropy(), output, y), F.cross_entropy(-output, reversed_labels))


def test_the_least_reverse_cross_entropy_is_where_the_other_classes_are_equally_likely():
    output = torch.tensor([[40.0, 0.0, 0.0, 0.0]])  # softmax of its negative: 0 for the right class, a third each
    assert value(ReverseCrossEntropy(), output, torch.tensor([0])).item() == pytest.approx(math.log(3))


def test_a_network_trained_by_it_has_its_largest_output_at_the_right_class():
    train, test = data.load("digits")
    torch.manual_seed(0)
    network = models.small_network(solver="euler", h=1.0, depth=2)

    def sgd(network):
        return torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)

    fit(network, data.Batches(train, 64, seed=0), epochs=4, optimizer=sgd, objective=ReverseCrossEntropy())
    assert evaluate(network, data.Batches(test, 100)).accuracy > 0.85


def test_label_smoothing_is_checked():
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1"):
        CrossEntropy(1.0)
