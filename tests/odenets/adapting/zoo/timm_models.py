"""timm: a network of each family of timm 1.0, its smallest, with how its additions are counted.

Where the count is a matter of definition, the comment says what the definition in ``zoo`` gives and why.
"""

from functools import partial

import pytest

from tests.odenets.adapting.zoo import CONCATENATES, IS_A_CHAIN, SUMS_LINEAR_MAPS, Case, pictures

timm = pytest.importorskip("timm")

# Blocks of each stage times the additions of each block.
DEPTHS = {
    # ResNets and their relatives: a block adds once, with a projection where the shape changes
    "resnet26": 2 + 2 + 2 + 2,
    "resnetv2_50x1_bit": 3 + 4 + 6 + 3,
    "resnest14d": 1 + 1 + 1 + 1,
    "res2net50_14w_8s": 3 + 4 + 6 + 3,  # sums of slices lie within the blocks
    "skresnet18": 2 + 2 + 2 + 2,
    "tresnet_m": 3 + 4 + 11 + 3,
    "botnet26t_256": 2 + 2 + 2 + 2,
    "halonet26t": 2 + 2 + 2 + 2,
    "lambda_resnet26t": 2 + 2 + 2 + 2,
    "resnext26ts": 2 + 2 + 2 + 2,
    "regnetz_b16": 1 + 5 + 11 + 1,  # 2, 6, 12, 2 blocks, the first of a stage has no skip
    "nf_regnet_b0": 1 + 3 + 6 + 6,
    "regnetx_002": 1 + 1 + 4 + 7,
    "legacy_xception": 3 + 8 + 1,  # entry, middle and exit flow
    "xception41": 3 + 8 + 1,  # the last of the 13 blocks has no skip
    "xception41p": 3 + 8 + 1,  # of the normalized, activated input
    "darknet53": 1 + 2 + 8 + 8 + 4,
    "cs3darknet_s": 1 + 3 + 4 + 1,  # int(0.5 * n) of (3, 6, 9, 3); stages join two halves by concatenation
    "cspnext_tiny": 1 + 1 + 1,  # round(0.167 * n) of (3, 6, 6, 3); those of the last stage do not add
    "inception_resnet_v2": 10 + 20 + 10,
    "dla46_c": 2 + 4 + 4 + 2,  # two blocks a tree of one level, four of two; roots concatenate
    # 3 + 4 + 6 + 3 blocks; the first of each stage has a norm and an activation of its own before its projection, so
    # what it adds to is no linear map of the state: 4 fewer
    "dpn48b": 2 + 3 + 5 + 2,
    # one bottleneck, then 2 blocks a branch in stages of 2, 3 and 4 branches, then one bottleneck a branch in the head;
    # sums over branches are those of states neither of which comes from the other
    "hrnet_w18_small": 1 + 2 * 2 + 2 * 3 + 2 * 4 + 4,
    "ese_vovnet39b": 0 + 0 + 1 + 1,  # 1, 1, 2, 2 blocks, the first of a stage does not add
    "hgnetv2_b2": 0 + 0 + 2 + 0,  # the same of 1, 1, 3, 1
    # inverted residuals: those that keep channels and resolution
    "mobilenetv2_035": 0 + 1 + 2 + 3 + 2 + 2 + 0,
    "mobilenetv3_small_100": 0 + 1 + 2 + 1 + 2,
    "efficientnet_lite0": 0 + 1 + 1 + 2 + 2 + 3 + 0,
    "tf_efficientnetv2_b0": 0 + 1 + 1 + 2 + 4 + 7,
    "tinynet_e": 0 + 0 + 0 + 1 + 1 + 1 + 0,  # round(0.6 * n) - 1 of (1, 2, 2, 3, 3, 4, 1)
    "hardcorenas_a": 0 + 1 + 1 + 1 + 1 + 1,
    "rexnet_100": 15 - 4,  # 16 blocks, the first narrows, 4 stride; the others add to the first channels
    "ghostnet_050": 1 + 2 + 2 + 1 + 5 + 1 + 4,  # every bottleneck, with a projection where the shape changes
    "repghostnet_050": 1 + 2 + 2 + 1 + 5 + 1 + 4,
    "ghostnetv3_050": 1 + 2 + 2 + 1 + 5 + 1 + 4,  # the sums of linear branches within are none
    "lcnetv2_small": 0 + 0 + 0 + 1,  # shortcuts in the last stage only, the first of whose two blocks strides
    # convolutional blocks that add once
    "convnext_atto": 2 + 2 + 6 + 2,
    "inception_next_atto": 2 + 2 + 6 + 2,
    "convmixer_768_32": 32,  # around the depthwise convolution only
    "fasternet_t0": 1 + 2 + 8 + 2,
    "mambaout_femto": 3 + 3 + 9 + 3,
    "starnet_s1": 2 + 2 + 8 + 3,
    "iformer_t": 2 + 2 + 16 + 6,
    # sums of slices and the attention's addition lie within the block
    "edgenext_xx_small": 2 + 2 + 6 + 2,
    "gmlp_ti16_224": 30,
    # two additions a block: token mixer and layers
    "vit_tiny_patch16_224": 2 * 12,
    "vit_relpos_small_patch16_224": 2 * 12,
    "deit3_small_patch16_224": 2 * 12,
    "beit_base_patch16_224": 2 * 12,
    "eva02_tiny_patch14_224": 2 * 12,
    "samvit_base_patch16_224": 2 * 12,
    "convit_tiny": 2 * 12,
    "vit_small_patch16_18x2_224": 2 * 18,  # two attentions, then twice layers, summed before they are added
    "pit_ti_224": 2 * (2 + 6 + 4),
    "pvt_v2_b0": 2 * (2 + 2 + 2 + 2),
    "nest_tiny": 2 * (2 + 2 + 8),
    "swin_tiny_patch4_window7_224": 2 * (2 + 2 + 6 + 2),
    "swinv2_tiny_window8_256": 2 * (2 + 2 + 6 + 2),
    "swinv2_cr_tiny_224": 2 * (2 + 2 + 6 + 2),
    "focalnet_tiny_srf": 2 * (2 + 2 + 6 + 2),
    # where the width grows, projected and max-pooled before the addition; the pooled query is added within the branch
    "mvitv2_tiny": 2 * (1 + 2 + 5 + 2),
    "hiera_tiny_224": 2 * (1 + 2 + 7 + 2),  # three projections end in a maximum over each mask unit: a max pooling
    "sam2_hiera_tiny": 2 * (1 + 2 + 7 + 2),
    "poolformer_s12": 2 * (2 + 2 + 6 + 2),
    "convformer_s18": 2 * (3 + 3 + 9 + 3),  # to the state times a learned scale in the last two stages
    # the same with poolings without parameters: sums of linear maps of one state in the last two stages
    "poolformerv2_s12": 2 * (2 + 2) + (6 + 2),
    "efficientformer_l1": 2 * (3 + 2 + 6 + 4),
    "mixer_s32_224": 2 * 8,
    "resmlp_12_224": 2 * 12,
    "sequencer2d_s": 2 * (4 + 3 + 8 + 3),
    "levit_128s": 2 * (2 + 3 + 4) + 2,  # a downsampling adds once, its attention does not
    # and what else adds
    "cait_xxs24_224": 2 * 24 + 2 * 2,  # two blocks in which the class token is the state
    "xcit_nano_12_p16_224": 3 * 12 + 2 * 2,  # attention, local interaction, layers; two blocks of class attention
    "volo_d1_224": 2 * (4 + 4 + 8 + 2) + 2 * 2,  # the same two
    "twins_pcpvt_small": 2 * (3 + 4 + 6 + 3) + 4,  # a position encoding a stage, computed from the state
    "twins_svt_small": 2 * (2 + 2 + 10 + 4) + 4,
    "coat_lite_tiny": 3 * (2 + 2 + 2 + 2),  # such an encoding before each block, one module a stage
    # the same, and six blocks of three resolutions, each with encoding, attention, which sums over them, and layers
    "coat_tiny": 3 * (2 + 2 + 2 + 2) + 3 * 3 * 6,
    "davit_tiny": 2 * 4 * (1 + 1 + 3 + 1),  # spatial and channel blocks, each with two such encodings
    "crossvit_9_240": 3 * (2 * (1 + 3) + 2),  # blocks of two branches; two class tokens attend to the other branch
    # two in the pixels, two in the patches; that the pixels are added to the patches is the sum of two states, neither
    # of which comes from the other
    "tnt_s_patch16_224": (2 + 2) * 12,
    "visformer_tiny": 7 + 2 * (4 + 4),  # no attention in the first stage
    "vit_small_r26_s32_224": (2 + 2 + 2 + 2) + 2 * 12,
    "vitamin_small_224": (2 + 4) + 2 * 14,
    "coatnet_pico_rw_224": (2 + 3) + 2 * (5 + 2),
    "coatnext_nano_rw_224": (3 + 4) + 2 * (6 + 3),
    "maxvit_pico_rw_256": (1 + 2 + 2) * (2 + 2 + 5 + 2),
    "tiny_vit_5m_224": 2 + 2 * (2 + 6 + 2),
    "swiftformer_xs": (2 + 2 + 5 + 3) + 3 * 4,  # the last block of each stage adds thrice
    "fastvit_t8": 2 * (2 + 2 + 4 + 2),  # x + scale * (mixer(x) - norm(x)) is one; sums of linear branches are none
    "fastvit_sa12": 2 * (2 + 2 + 6 + 2) + 1,  # and a position encoding from the state
    # token mixers norm(conv(x) + conv(x) + x), linear next to the state itself, and channel mixers; a downsampling has
    # a block and one addition more
    "repvit_m0_9": 2 * (2 + 2 + 14 + 2) + 3 * (2 + 1),
    "mobilevit_xxs": (1 + 2) + 2 * (2 + 4 + 3),  # inverted residuals that keep the shape; transformer blocks
    "mobilevitv2_050": 1 + 2 * (2 + 4 + 3),
    # 16 convolutional blocks of two, 4 hybrid blocks of three: attention, convolution, layers
    "nextvit_small": 2 * (3 + 3 + 8 + 2) + 3 * (0 + 1 + 2 + 1),
    # one a block, one more in the blocks with attention; in the last downsampling, attention plus a convolution
    "efficientformerv2_s0": (2 + 2 + 6 + 4) + (2 + 2) + 1,
    "efficientvit_b0": 1 + (1 + 1) + 2 * (2 + 2),  # stem, local stages but their first blocks, stages with attention
    # depthwise, layers, attention, depthwise, layers; four around each of two downsamplings
    "efficientvit_m0": 5 * (1 + 2 + 3) + 2 * 4,
    "shvit_s1": 2 * 2 + 3 * (4 + 5) + 2 * 4,  # the same without attention in the first stage
    "efficientvim_m1": 4 * (2 + 2 + 2) + 2 * 2,  # x + scale * (f(x) - x); two around each downsampling
    # stem and three downsamplings; blocks; the paths of the global queries, which lie beside the blocks
    "gcvit_xxtiny": (1 + 3) + 2 * (2 + 2 + 6 + 2) + (3 + 2 + 1 + 1),
    # of the five sums of a cell one is separable(x) + x, in each of the 18 normal cells; in the 4 that reduce one is
    # separable(separable(x) + separable(y)) + max_pool(x). The others are of two branches, or of two states
    "nasnetalarge": 18 + 4,
    # of the five of a cell three: a branch next to a max pooling (in the stem also convolved) of its state
    "pnasnet5large": 3 * (2 + 12),
    "densenet121": CONCATENATES,
    "rdnet_tiny": CONCATENATES,
    "inception_v4": CONCATENATES,
    "repvgg_a0": SUMS_LINEAR_MAPS,
    "mobileone_s0": SUMS_LINEAR_MAPS,
    "vgg11": IS_A_CHAIN,
}  # fmt: skip

# Transformers whose positions or windows fit one resolution, at their smallest; what is wider than need be, narrower.
OPTIONS = {
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 96, "num_heads": 3},
    "botnet26t_256": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 32},
    "convit_tiny": {"img_size": 32},
    "coat_lite_tiny": {"img_size": 64},
    "coat_tiny": {"img_size": 64},
    "crossvit_9_240": {"img_size": 120},
    "deit3_small_patch16_224": {"img_size": 32, "embed_dim": 96, "num_heads": 3},
    "efficientformerv2_s0": {"img_size": 64},
    "efficientvit_m0": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 28},
    "gcvit_xxtiny": {"img_size": 64},
    "gmlp_ti16_224": {"img_size": 32},
    "hiera_tiny_224": {"img_size": (64, 64)},
    "levit_128s": {"img_size": 64},
    "maxvit_pico_rw_256": {"img_size": 64},
    "coatnet_pico_rw_224": {"img_size": 64},
    "coatnext_nano_rw_224": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "mvitv2_tiny": {"img_size": 64},
    "nasnetalarge": {"num_features": 24 * 16, "stem_size": 16},
    "nest_tiny": {"img_size": 64},
    "pit_ti_224": {"img_size": 32},
    "resmlp_12_224": {"img_size": 32},
    "samvit_base_patch16_224": {"img_size": 64, "embed_dim": 96, "num_heads": 3},
    "sequencer2d_s": {"img_size": 56},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2},
    "swinv2_cr_tiny_224": {"img_size": 64},
    "tnt_s_patch16_224": {"img_size": 32},
    "twins_pcpvt_small": {"img_size": 64},
    "twins_svt_small": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "vit_relpos_small_patch16_224": {"img_size": 32, "embed_dim": 96, "num_heads": 3},
    "vit_small_r26_s32_224": {"img_size": 64, "embed_dim": 96, "num_heads": 3},
    "vit_small_patch16_18x2_224": {"img_size": 32, "embed_dim": 96, "num_heads": 3},
    "vit_tiny_patch16_224": {"img_size": 32},
    "vitamin_small_224": {"img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 32},
}
SIZES = {
    "convmixer_768_32": 32,
    "efficientformer_l1": 224,
    "halonet26t": 256,
    "lambda_resnet26t": 128,
    "sam2_hiera_tiny": 128,
    "inception_resnet_v2": 80,
    "inception_v4": 80,
    "nasnetalarge": 64,
}


def case(name: str, depth: int | str) -> Case:
    options = OPTIONS.get(name, {})
    size = options.get("img_size", SIZES.get(name, 64))
    size = size[0] if isinstance(size, tuple) else size
    build = partial(timm.create_model, name, num_classes=10, **options)
    return Case(build, pictures(size), depth)


CASES = {name: case(name, depth) for name, depth in DEPTHS.items()}
