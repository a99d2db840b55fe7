"""Models to adapt: small ones of torchvision's families, and some of few lines."""

import pytest
import torch
from torch import nn

from odenets import measures
from tests.odenets.networks import Unit

tv = pytest.importorskip("torchvision.models")

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = X[:, :, :32, :32].contiguous()
QUANTITIES = {name: getattr(measures, name) for name in ("action", "residue", "cosine", "displacement")}
TINY = X[:, :, :8, :8].contiguous()


def small_resnet(block=tv.resnet.BasicBlock, layers=(1, 1, 1, 1), **options):
    return tv.ResNet(block, list(layers), num_classes=5, **options)


def small_regnet():
    parameters = tv.regnet.BlockParams.from_init_params(depth=5, w_0=16, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return tv.RegNet(parameters, num_classes=5)


def small_convnext():
    setting = [tv.convnext.CNBlockConfig(16, 32, 2), tv.convnext.CNBlockConfig(32, None, 2)]
    return tv.ConvNeXt(setting, num_classes=5, layer_scale=0.5)


def small_vit():
    return tv.VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def small_swin(**options):
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **options)


def small_swin_v2():
    v2 = tv.swin_transformer
    return small_swin(block=v2.SwinTransformerBlockV2, downsample_layer=v2.PatchMergingV2)


FAMILIES = {
    "resnet": (small_resnet, SMALL, (0, 1, 2, 3)),
    "bottleneck": (lambda: small_resnet(tv.resnet.Bottleneck, (2, 1, 1, 1)), SMALL, (0, 2, 3, 4)),
    "resnext": (lambda: small_resnet(tv.resnet.Bottleneck, groups=4, width_per_group=16), SMALL, (0, 1, 2, 3)),
    "wide resnet": (lambda: small_resnet(tv.resnet.Bottleneck, width_per_group=128), SMALL, (0, 1, 2, 3)),
    "regnet": (small_regnet, X, (0, 1, 4)),
    "mobilenet v2": (lambda: tv.mobilenet_v2(num_classes=5, width_mult=0.5), X, (0, 1, 3, 6, 8)),
    "mobilenet v3": (lambda: tv.mobilenet_v3_small(num_classes=5), X, (0, 1, 3, 4)),
    "mnasnet": (lambda: tv.mnasnet0_5(num_classes=5), X, (0, 2, 4, 6, 7)),
    "efficientnet": (lambda: tv.efficientnet_b0(num_classes=5), X, (0, 1, 2, 4, 6)),
    "convnext": (small_convnext, X, (0, 2)),
    "vit": (small_vit, SMALL, (0,)),
    "swin": (small_swin, X, (0, 4)),
    "swin v2": (small_swin_v2, X, (0, 4)),
}


def zero_branches(adapted, *parts):
    """Let every branch, or these parts of it, return 0; projections stay."""
    modules = dict(adapted.model.named_modules())
    projections = {p for block in adapted.blocks if block.projection for p in modules[block.projection].parameters()}
    for block in dict.fromkeys(block.block for block in adapted.blocks):
        for module in [modules[f"{block}.{part}"] for part in parts] or [modules[block]]:
            for p in module.parameters():
                if p not in projections:
                    nn.init.zeros_(p)


def states_of(model, first, last):
    """The input of one module and the output of another for X."""
    states = []

    def look(module, args, output=None):
        states.append((args[0] if output is None else output).clone())

    first, last = model.get_submodule(first), model.get_submodule(last)
    with first.register_forward_pre_hook(look), last.register_forward_hook(look):
        model(X)
    return states


class Repeated(nn.Module):
    """Calls its block as often as it is told, and its other block where it is told to."""

    def __init__(self, times, both=True):
        super().__init__()
        self.block, self.other, self.times, self.both = Unit(3, 3), Unit(3, 3), times, both

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return self.other(x) if self.both else x
