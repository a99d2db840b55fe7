import pytest
import torch
from torch import nn

from odenets import MLPField


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("time", [False, True])
def test_mlp_is_two_linear_layers(activation, time):
    field = MLPField(3, 8, activation=activation, time=time)
    x = torch.randn(5, 3)
    inputs = torch.cat([x, torch.full((5, 1), 0.25)], 1) if time else x
    hidden = inputs @ field.first.weight.T + field.first.bias
    expected = getattr(nn.functional, activation, torch.tanh)(hidden) @ field.second.weight.T + field.second.bias
    torch.testing.assert_close(field(0.25, x), expected)
    torch.testing.assert_close(field(torch.tensor(0.25), x), expected)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation must be one of relu, silu, tanh, gelu, relu6, got 'sine'"):
        MLPField(3, activation="sine")
