import pytest
import torch

from odenets import Flow
from odenets.fields import ConvNeXtField
from tests.odenets.fields.published import check_step_is_block, randomize, take_weights


def test_an_euler_step_is_the_block_of_torchvision():
    published = pytest.importorskip("torchvision").models.convnext
    block = randomize(published.CNBlock(6, 1e-6, 0.0)).double()
    flow = Flow(ConvNeXtField(6), solver="euler", h=1.0).double()
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 6, 5, 4, dtype=torch.float64))


def test_the_scale_begins_where_told_and_may_be_left_out():
    field = ConvNeXtField(4, scale=0.5)
    with torch.no_grad():
        field.scale.scale.fill_(2.0)
    field.reset_parameters()
    assert field.scale.scale.flatten().tolist() == [0.5] * 4
    x = torch.randn(2, 4, 8, 8)
    plain = ConvNeXtField(4, scale=None)
    plain.load_state_dict({name: value for name, value in field.state_dict().items() if name != "scale.scale"})
    torch.testing.assert_close(field(0.0, x), 0.5 * plain(0.0, x))


def test_a_scale_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="scale must be a number, got '1e-6'"):
        ConvNeXtField(4, scale="1e-6")
