import pytest
import torch

from odenets import Flow
from odenets.fields import BasicField
from tests.odenets.fields.published import check_step_is_block, randomize, take_weights


@pytest.mark.parametrize("training", [True, False])
def test_an_euler_step_is_the_block_of_torchvision(training):
    resnet = pytest.importorskip("torchvision").models.resnet
    block = randomize(resnet.BasicBlock(6, 6)).double().train(training)
    flow = Flow(BasicField(6), solver="euler", h=1.0).double().train(training)
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 6, 5, 4, dtype=torch.float64))
    assert dict(flow.named_buffers())["blocks.0.fields.0.norm2.running_mean"][0].tolist() == pytest.approx(
        block.bn2.running_mean.tolist()
    )


def test_an_even_kernel_is_named():
    with pytest.raises(ValueError, match="kernel_size must be odd to keep the shape of x, got 4"):
        BasicField(3, kernel_size=4)
