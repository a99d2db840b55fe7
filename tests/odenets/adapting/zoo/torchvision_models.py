"""torchvision's classifiers: every name of ``list_models(module=torchvision.models)`` in torchvision 0.29.

59 add, 9 are chains (AlexNet, VGG), 12 only join features by concatenation. That Inception v3 and GoogLeNet add nothing
is read in their sources: their only sums are those of ``transform_input``, a scale and a shift of each color.
"""

from functools import partial

import pytest

from tests.odenets.adapting.zoo import CONCATENATES, IS_A_CHAIN, Case, pictures

tv = pytest.importorskip("torchvision.models")

# Blocks of each stage, as published, each of which adds once (He et al. 2016, table 1; Xie 2017; Zagoruyko 2016).
RESNETS = {
    "resnet18": 2 + 2 + 2 + 2,
    "resnet34": 3 + 4 + 6 + 3,
    "resnet50": 3 + 4 + 6 + 3,
    "resnet101": 3 + 4 + 23 + 3,
    "resnet152": 3 + 8 + 36 + 3,
    "resnext50_32x4d": 3 + 4 + 6 + 3,
    "resnext101_32x8d": 3 + 4 + 23 + 3,
    "resnext101_64x4d": 3 + 4 + 23 + 3,
    "wide_resnet50_2": 3 + 4 + 6 + 3,
    "wide_resnet101_2": 3 + 4 + 23 + 3,
}

# The same (Radosavovic et al. 2020, figures 16 and 18).
REGNETS = {
    "regnet_x_400mf": 1 + 2 + 7 + 12,
    "regnet_x_800mf": 1 + 3 + 7 + 5,
    "regnet_x_1_6gf": 2 + 4 + 10 + 2,
    "regnet_x_3_2gf": 2 + 6 + 15 + 2,
    "regnet_x_8gf": 2 + 5 + 15 + 1,
    "regnet_x_16gf": 2 + 6 + 13 + 1,
    "regnet_x_32gf": 2 + 7 + 13 + 1,
    "regnet_y_400mf": 1 + 3 + 6 + 6,
    "regnet_y_800mf": 1 + 3 + 8 + 2,
    "regnet_y_1_6gf": 2 + 6 + 17 + 2,
    "regnet_y_3_2gf": 2 + 5 + 13 + 1,
    "regnet_y_8gf": 2 + 4 + 10 + 1,
    "regnet_y_16gf": 2 + 4 + 11 + 1,
    "regnet_y_32gf": 2 + 5 + 12 + 1,
    "regnet_y_128gf": 2 + 7 + 17 + 1,
}


def after_the_first(*repeats: int) -> int:
    """Additions of stages whose first block strides or changes the channels, and so does not add."""
    return sum(n - 1 for n in repeats)


# MobileNet V2, table 2; V3, tables 1 and 2; MnasNet-B1, figure 7; EfficientNet, table 1, repeats times the depth
# coefficient, rounded up; EfficientNetV2, table 4 and the reference code, whose first stage keeps the stem's channels.
INVERTED = {
    "mobilenet_v2": after_the_first(1, 2, 3, 4, 3, 3, 1),
    # rows whose stride is 1 and whose input has as many channels as the output
    "mobilenet_v3_large": 1 + 1 + 2 + 3 + 1 + 2,  # 16, 24, 40, 80, 112, 160 channels
    "mobilenet_v3_small": 0 + 1 + 2 + 1 + 2,  # 16, 24, 40, 48, 96 channels
    **{f"mnasnet{width}": after_the_first(3, 3, 3, 2, 4, 1) for width in ("0_5", "0_75", "1_0", "1_3")},
    "efficientnet_b0": after_the_first(1, 2, 2, 3, 3, 4, 1),
    "efficientnet_b1": after_the_first(2, 3, 3, 4, 4, 5, 2),  # times 1.1
    "efficientnet_b2": after_the_first(2, 3, 3, 4, 4, 5, 2),  # times 1.2
    "efficientnet_b3": after_the_first(2, 3, 3, 5, 5, 6, 2),  # times 1.4
    "efficientnet_b4": after_the_first(2, 4, 4, 6, 6, 8, 2),  # times 1.8
    "efficientnet_b5": after_the_first(3, 5, 5, 7, 7, 9, 3),  # times 2.2
    "efficientnet_b6": after_the_first(3, 6, 6, 8, 8, 11, 3),  # times 2.6
    "efficientnet_b7": after_the_first(4, 7, 7, 10, 10, 13, 4),  # times 3.1
    "efficientnet_v2_s": 2 + after_the_first(4, 4, 6, 9, 15),
    "efficientnet_v2_m": 3 + after_the_first(5, 5, 7, 14, 18, 5),
    "efficientnet_v2_l": 4 + after_the_first(7, 7, 10, 19, 25, 7),
}

CONVNEXTS = {
    "convnext_tiny": 3 + 3 + 9 + 3,
    "convnext_small": 3 + 3 + 27 + 3,
    "convnext_base": 3 + 3 + 27 + 3,
    "convnext_large": 3 + 3 + 27 + 3,
}

# Attention and the layers after it add, once each.
TRANSFORMERS = {
    "vit_b_16": 2 * 12,
    "vit_b_32": 2 * 12,
    "vit_l_16": 2 * 24,
    "vit_l_32": 2 * 24,
    "vit_h_14": 2 * 32,
    "swin_t": 2 * (2 + 2 + 6 + 2),
    "swin_s": 2 * (2 + 2 + 18 + 2),
    "swin_b": 2 * (2 + 2 + 18 + 2),
    "swin_v2_t": 2 * (2 + 2 + 6 + 2),
    "swin_v2_s": 2 * (2 + 2 + 18 + 2),
    "swin_v2_b": 2 * (2 + 2 + 18 + 2),
    "maxvit_t": (1 + 2 + 2)
    * (2 + 2 + 5 + 2),  # convolution; attention in windows and over the grid, each with its layers
}

ADDING = RESNETS | REGNETS | INVERTED | CONVNEXTS | TRANSFORMERS

# Layers that keep the shape, those of the classifier included: one, from 4096 to 4096.
CHAINS = {
    "alexnet": 1 + 1,  # 256 to 256 channels
    **{f"vgg11{norm}": (0 + 0 + 1 + 1 + 2) + 1 for norm in ("", "_bn")},
    **{f"vgg13{norm}": (1 + 1 + 1 + 1 + 2) + 1 for norm in ("", "_bn")},
    **{f"vgg16{norm}": (1 + 1 + 2 + 2 + 3) + 1 for norm in ("", "_bn")},
    **{f"vgg19{norm}": (1 + 1 + 3 + 3 + 4) + 1 for norm in ("", "_bn")},
}

CONCATENATING = (
    "densenet121", "densenet161", "densenet169", "densenet201", "googlenet", "inception_v3", "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1",
)  # fmt: skip

SIZES = {"inception_v3": 80, "vit_h_14": 28, "maxvit_t": 224}
OPTIONS = {
    "maxvit_t": {"input_size": (224, 224)},  # the smallest that windows of 7 divide in all stages
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    **{name: {"image_size": 32} for name in TRANSFORMERS if name.startswith("vit")},
    "vit_h_14": {"image_size": 28},
}


def case(name: str, depth: int | str, **options: object) -> Case:
    size = SIZES.get(name, 32 if name in RESNETS or name.startswith("vit") else 64)
    return Case(partial(getattr(tv, name), num_classes=10, **OPTIONS.get(name, {})), pictures(size), depth, options)


CASES = {
    **{name: case(name, depth) for name, depth in ADDING.items()},
    **{name: case(name, depth, displacement=True) for name, depth in CHAINS.items()},
    **{f"{name} without displacement": case(name, IS_A_CHAIN) for name in ("alexnet", "vgg11_bn")},
    **{name: case(name, CONCATENATES) for name in CONCATENATING},
}
