import pytest
import torch
from torch import nn

from odenets import Flow
from odenets.fields import InvertedField
from tests.odenets.fields.published import check_step_is_block, randomize, take_weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("expansion", [1, 6])
def test_an_euler_step_is_the_block_of_mobilenet_v2(training, expansion):
    published = pytest.importorskip("torchvision").models.mobilenetv2
    block = randomize(published.InvertedResidual(4, 4, 1, expansion)).double().train(training)
    flow = Flow(InvertedField(4, expansion), solver="euler", h=1.0).double().train(training)
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 4, 5, 4, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_with_squeeze_it_is_the_block_of_efficientnet(training, kernel_size):
    published = pytest.importorskip("torchvision").models.efficientnet
    config = published.MBConvConfig(4, kernel_size, 1, 8, 8, 1)
    block = randomize(published.MBConv(config, 0.0, nn.BatchNorm2d)).double().train(training)
    field = InvertedField(8, 4, activation="silu", squeeze=2, kernel_size=kernel_size)
    flow = Flow(field, solver="euler", h=1.0).double().train(training)
    take_weights(flow, block)
    check_step_is_block(flow, flow, block, torch.randn(3, 8, 5, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion": 0}, "expansion must be at least 1, got 0"),
        ({"squeeze": 0}, "squeeze must be at least 1, got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"activation": "swish"}, "activation must be one of relu, .* got 'swish'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InvertedField(4, **options)
