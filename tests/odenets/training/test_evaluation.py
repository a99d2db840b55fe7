import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.training import data
from odenets.training.evaluation import evaluate, evaluate_schemes
from tests.odenets.checks import unchanged
from tests.odenets.training.small import TENS, TWENTY, Restless, tiny


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
