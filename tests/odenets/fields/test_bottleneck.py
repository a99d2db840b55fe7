import pytest
import torch
from torch.nn import functional as F

from odenets import Flow
from odenets.fields import BottleneckField
from tests.odenets.fields.published import check_step_is_block, randomize, take_weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("groups", "width"), [(1, 64), (2, 64)])
def test_an_euler_step_is_the_block_of_torchvision(training, groups, width):
    resnet = pytest.importorskip("torchvision").models.resnet
    block = randomize(resnet.Bottleneck(16, 4, groups=groups, base_width=width)).double().train(training)
    flow = Flow(BottleneckField(16, 4 * groups, groups), solver="euler", h=1.0).double().train(training)
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 16, 5, 4, dtype=torch.float64))


def test_the_pre_activation_branch_is_its_formula():
    field = BottleneckField(8, 4, post_activation=False, norm="layer").double()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    y = x
    for norm, conv in ((field.norm1, field.conv1), (field.norm2, field.conv2), (field.norm3, field.conv3)):
        y = F.group_norm(y, 1, norm.norm.weight, norm.norm.bias).relu()
        y = F.conv2d(y, conv.weight, padding=conv.weight.shape[-1] // 2)
    torch.testing.assert_close(field(0.0, x), y)


def test_without_a_width_it_is_a_quarter_of_the_channels():
    assert [BottleneckField(c).conv2.out_channels for c in (3, 4, 64)] == [1, 1, 16]


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="groups must divide hidden, got 3 and 8"):
        BottleneckField(16, 8, groups=3)
