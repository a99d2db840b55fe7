import pytest
import torch
from torch import nn

from lab.networks import resnet9_decoder, vision
from odenets import models


@pytest.mark.parametrize("size", [8, 28, 32, 33])
def test_the_decoder_mirrors_the_encoder(size):
    network = models.resnet9(3, features=8, size=size, depth=1)
    x = torch.rand(2, 3, size, size)
    image = resnet9_decoder(3, features=8, size=size)(network.encoder(x))
    assert image.shape == x.shape
    assert image.min() >= 0
    assert image.max() <= 1
    shapes = [m.kernel_size for m in network.encoder if isinstance(m, nn.Conv2d)]
    assert shapes == [(3, 3), (5, 5)]


def test_a_vgg_halves_its_images_five_times():
    with pytest.raises(ValueError, match="size must be at least 32 for vgg19, got 16"):
        vision("vgg19", 10, size=16)
