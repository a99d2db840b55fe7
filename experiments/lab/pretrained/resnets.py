"""ResNets for CIFAR-10 of 20 to 56 layers, as the ResNet paper has them (He et al. 2016, section 4.2).

Weights are those of akamaster/pytorch_resnet_cifar10 as safetensors, a file ``resnet20.safetensors`` and so on in a
folder, names and values as published. On the whole test set they are right on 91.73, 92.63, 93.10 and 93.39 % of the
images, as their author has them, who chose the epoch there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from odenets import models

__all__ = ["DEPTHS", "BasicBlock", "ResNet", "load_resnet"]

DEPTHS = (20, 32, 44, 56)
"""Layers of the networks that there are weights of."""
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Mean and standard deviation by which their images were normalized."""


class BasicBlock(nn.Module):
    """Two convolutions with batch norm; the addition, then the last ReLU.

    Where the shape changes, x0 is every second pixel of the input with channels of zeros on both sides.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.zeros = stride, (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The state after the block."""
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.zeros, self.zeros))
        return functional.relu(x + branch)


class ResNet(nn.Module):
    """Three stages of blocks.

    Args:
        blocks: of each stage; depth is six times as many layers and two.
        widths: channels of the stages.
        channels: of the images.
        normalize: mean and standard deviation per channel; images are pixels in [0, 1].
        classes: of the labels.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, ...] = (16, 32, 64),
        *,
        channels: int = 3,
        normalize: tuple[list[float], list[float]] = IMAGENET,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.normalize = models.Normalize(*normalize)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        width = widths[0]
        self.stages = [f"layer{i}" for i in range(1, len(widths) + 1)]
        for name, wide in zip(self.stages, widths, strict=True):
            layers = [BasicBlock(width, wide, 1 if wide == width else 2)]
            self.add_module(name, nn.Sequential(*layers, *(BasicBlock(wide, wide) for _ in range(blocks - 1))))
            width = wide
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(x.mean((2, 3)))


def load_resnet(depth: int, weights: Path) -> ResNet:
    """The trained network of so many layers, in eval mode; its weights are in a file, or in the folder of all of them.

    Raises:
        ValueError: there are no weights of such a depth.
        FileNotFoundError: the file is not there.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
    path = Path(weights)
    path = path if path.suffix else path / f"resnet{depth}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: it must hold the weights of pytorch_resnet_cifar10")
    with torch.random.fork_rng(devices=[]):
        network = ResNet((depth - 2) // 6)
    network.load_state_dict(load_file(path))
    return network.eval()
