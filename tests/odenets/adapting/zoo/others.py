"""Transformers of torch, networks of few lines in the styles of the literature, and quantized ones."""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.odenets.adapting.zoo import CONCATENATES, Case, pictures

quantized = pytest.importorskip("torchvision.models.quantization")

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(norm_first: bool, batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def masked_tokens() -> dict[str, Tensor]:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, -2:] = True
    return {"src": TOKENS, "src_key_padding_mask": mask}


class ResidualConvolutions(nn.Module):
    """Norm, activation and convolution, twice, as in the U-Nets of diffusion models."""

    def __init__(self, channels: int, wider: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, wider, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, wider), nn.Conv2d(wider, wider, 3, padding=1)
        self.skip = nn.Identity() if channels == wider else nn.Conv2d(channels, wider, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Two resolutions down and up again; what comes from the other side is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList([ResidualConvolutions(8, 8), ResidualConvolutions(8, 16)])
        self.bottom = ResidualConvolutions(16, 16)
        self.up = nn.ModuleList([ResidualConvolutions(32, 16), ResidualConvolutions(24, 8)])
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, sides = self.first(x), []
        for block in self.down:
            x = block(x)
            sides.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.bottom(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), sides.pop()], 1))
        return self.last(x)


class Mixer(nn.Module):
    """Layers across tokens, layers across channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.across_tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.across_channels = nn.Sequential(nn.Linear(channels, 32), nn.GELU(), nn.Linear(32, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.across_channels(self.norm2(x))


def mlp_mixer() -> nn.Module:
    return nn.Sequential(*[Mixer(5, 16) for _ in range(3)], nn.LayerNorm(16), nn.Linear(16, 4))


class ConditionedBlock(nn.Module):
    """Attention and layers, shifted, scaled and gated by a condition (Peebles and Xie 2023, adaLN-Zero)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False)
        self.layers = nn.Sequential(nn.Linear(channels, 32), nn.GELU(approximate="tanh"), nn.Linear(32, channels))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y, need_weights=False)[0]
        return x + gate2 * self.layers(self.norm2(x) * (1 + scale2) + shift2)


class DiffusionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.classes = nn.Embedding(10, 16)
        self.position = nn.Parameter(torch.randn(5, 16))
        self.blocks = nn.ModuleList([ConditionedBlock(16) for _ in range(3)])
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        condition = self.time(time[:, None])
        if label is not None:
            condition = condition + self.classes(label)
        x = x + self.position
        for block in self.blocks:
            x = block(x, condition)
        return self.last(x)


def dynamically_quantized() -> nn.Module:
    """Linear layers as 8-bit operations, whose packed weights are no parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp_mixer().eval(), {nn.Linear})


def statically_quantized(build: Callable[..., nn.Module]) -> nn.Module:
    """Weights and states of 8 bits, calibrated on noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(weights=None, quantize=True, num_classes=10)


TIME, LABEL = torch.tensor([0.2, 0.7]), torch.tensor([3, 8])

SECOND = "along the first axis of the inputs, and on none along the second"
CASES = {
    "encoder": Case(partial(encoder, False, True), TOKENS, 2 * 3),
    "encoder, norm first": Case(partial(encoder, True, True), TOKENS, 2 * 3),
    "encoder, tokens first": Case(partial(encoder, False, False), TOKENS, 2 * 3, warning=SECOND),
    "encoder, norm and tokens first": Case(partial(encoder, True, False), TOKENS, 2 * 3, warning=SECOND),
    "encoder with a mask": Case(partial(encoder, True, True), masked_tokens(), 2 * 3),
    "U-Net": Case(UNet, pictures(16), 2 + 1 + 2),  # down, bottom, up
    "MLP-Mixer": Case(mlp_mixer, TOKENS, 2 * 3),
    "DiT": Case(DiffusionTransformer, (TOKENS, TIME), 2 * 3),
    "DiT with classes": Case(DiffusionTransformer, {"x": TOKENS, "time": TIME, "label": LABEL}, 2 * 3),
    # additions of torchvision's quantizable networks are modules, FloatFunctional
    "quantizable ResNet-18": Case(
        partial(quantized.resnet18, weights=None, num_classes=10), pictures(32), 2 + 2 + 2 + 2
    ),
    "quantizable ResNet-50": Case(
        partial(quantized.resnet50, weights=None, num_classes=10), pictures(32), 3 + 4 + 6 + 3
    ),
    "quantizable MobileNet V2": Case(
        partial(quantized.mobilenet_v2, weights=None, num_classes=10), pictures(32), 0 + 1 + 2 + 3 + 2 + 2 + 0
    ),
    "quantizable MobileNet V3": Case(
        partial(quantized.mobilenet_v3_large, weights=None, num_classes=10), pictures(32), 1 + 1 + 2 + 3 + 1 + 2
    ),
    "quantizable ShuffleNet V2": Case(
        partial(quantized.shufflenet_v2_x0_5, weights=None, num_classes=10), pictures(32), CONCATENATES
    ),
    # one scale for all samples of a batch
    "dynamically quantized MLP-Mixer": Case(
        dynamically_quantized, TOKENS, 2 * 3, differentiable=False, warning="depend on the other samples"
    ),
    "quantized ResNet-18": Case(
        partial(statically_quantized, quantized.resnet18), pictures(32), 2 + 2 + 2 + 2, differentiable=False
    ),
    "quantized MobileNet V2": Case(
        partial(statically_quantized, quantized.mobilenet_v2),
        pictures(32),
        0 + 1 + 2 + 3 + 2 + 2 + 0,
        differentiable=False,
    ),
}
