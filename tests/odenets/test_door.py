"""Natural mistakes with flows, networks and their files: each error names the argument and what takes its place."""

import pytest
import torch
from torch import nn

import odenets
from odenets import Flow, MLPField, Network, NeuralODE, load_weights, measures, save_weights

X, FIELD = torch.ones(4, 3), MLPField(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Flow(FIELD, method="rk4"), TypeError, "no 'method': that is solver"),
        (lambda: Flow(FIELD, steps=3), TypeError, "no 'steps': that is depth"),
        (lambda: Flow(hidden=3), TypeError, r"no 'hidden': that is one of the field, Flow\(odenets.MLPField"),
        (lambda: Flow([FIELD, FIELD]), TypeError, "field must be a module v.*or a function.*got list"),
        (lambda: Flow(lambda x: -x), TypeError, "field must be a module v.*a function without arguments"),
        (lambda: Flow("conv"), TypeError, "field must be a module v.*got str, 'conv'"),
        (lambda: Flow(FIELD, depth=2.0), TypeError, "depth must be a whole number, got 2.0"),
        (lambda: Flow(FIELD, h="1"), TypeError, "h must be a number, or one for each block, got '1'"),
        (lambda: NeuralODE(FIELD)(X, t=torch.tensor([0.0, 1.0])), TypeError, "takes no 't': that is at"),
        (lambda: Network(Flow(FIELD), nn.Linear(3, 2), nn.Linear(2, 2)), TypeError, "the order is Network"),
        (lambda: Network(nn.Identity(), FIELD, nn.Linear(3, 2)), TypeError, r"got MLPField: odenets.Flow\(field\)"),
        (lambda: Network(nn.Identity(), Flow(FIELD), None), TypeError, r"head must be .* nn.Identity\(\) for none"),
        (lambda: Network(None, Flow(FIELD), nn.Identity()), TypeError, "encoder must be"),
        (lambda: Flow(FIELD).record(X, measures.action), TypeError, r"by a name of their own, record\(x, action="),
        (
            lambda: Network(nn.Identity(), Flow(FIELD), nn.Identity()).record(X, check=False),
            TypeError,
            "'check' is an argument of a Flow's record",
        ),
        (lambda: save_weights("file", Flow(FIELD)), TypeError, r"got str: save_weights\(network, path\)"),
        (lambda: load_weights("file", Flow(FIELD)), TypeError, r"got str: load_weights\(network, path\)"),
        (lambda: odenets.Tolerance, AttributeError, "it is solvers.Tolerance"),
        (lambda: odenets.Trainer, AttributeError, "it is odenets.training.fit"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_file_of_another_kind_is_named(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is no file that odenets.save_weights writes"):
        load_weights(Flow(FIELD), tmp_path / "weights.pt")
