import pytest
import torch
from torch import nn

from odenets import ConvField, MLPField
from odenets.fields import field_for


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


@pytest.mark.parametrize("norm", ["group", "layer", "batch", None])
@pytest.mark.parametrize("time", [False, True])
def test_conv_keeps_the_shape_and_reads_the_time_if_told(norm, time):
    field = ConvField(8, 12, norm=norm, time=time)
    x = torch.randn(2, 8, 5, 7)
    assert field(0.0, x).shape == x.shape
    assert torch.equal(field(0.0, x), field(1.0, x)) != time


def test_conv_is_the_branch_of_a_preactivation_block():
    field = ConvField(16, norm="group")
    x = torch.randn(2, 16, 4, 4)
    y = x
    for norm, conv in ((field.norm1, field.conv1), (field.norm2, field.conv2)):
        y = nn.functional.conv2d(
            nn.functional.group_norm(y, 8, norm.norm.weight, norm.norm.bias).relu(), conv.weight, padding=1
        )
    torch.testing.assert_close(field(0.0, x), y)


@pytest.mark.parametrize("shape", [(4, 7), (4, 6, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_field_fits_the_state(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    v = field_for(x)(0.0, x)
    assert (v.shape, v.dtype) == (x.shape, dtype)


def test_reset_draws_anew():
    field = MLPField(3)
    before = field.first.weight.clone()
    field.reset_parameters()
    assert not torch.equal(before, field.first.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPField(3, activation="sine"), "activation must be one of relu, silu, tanh, gelu, got 'sine'"),
        (lambda: ConvField(3, kernel_size=2), "kernel_size must be odd"),
        (lambda: ConvField(3, norm="instance"), "norm must be 'group', 'layer', 'batch' or None, got 'instance'"),
        (lambda: field_for(torch.randn(2, 3, 4)), r"no default field for x of shape \(2, 3, 4\)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
