import pytest
import torch
from torch import nn

from odenets import ConvField


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"norm": "instance"}, "norm must be 'group', 'layer', 'batch' or None, got 'instance'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvField(3, **options)
