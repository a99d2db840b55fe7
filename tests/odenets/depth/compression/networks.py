"""Small networks of residual blocks, to be compressed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Half(nn.Module):
    """An exact step of a linear equation, with a hidden layer to be a block."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weight), len(weight), bias=False, dtype=weight.dtype)
        self.linear.weight.data = weight - torch.eye(len(weight), dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Residual(nn.Module):
    """Blocks of two convolutions with norms, and a ReLU behind the addition or not."""

    def __init__(self, channels: int, relu: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return y.relu() if self.relu else y


def images(depth: int = 5, relu: bool = True) -> nn.Module:
    """A small network of images with statistics of its own."""
    torch.manual_seed(0)
    blocks = [Residual(6, relu) for _ in range(depth)]
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    for _ in range(3):
        network(torch.rand(64, 1, 8, 8))
    return network.eval()


def linear_flow(depth: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    step = torch.matrix_exp(0.3 * torch.randn(5, 5, dtype=dtype) / depth)
    return nn.Sequential(*(Half(step) for _ in range(depth)), nn.Linear(5, 3, dtype=dtype))
