"""Vision transformers as one flow of half steps, attention and perceptron in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from odenets.blocks import fields_per_block
from odenets.errors import check_count, check_number
from odenets.fields import AttentionField, FeedForwardField, VelocityField
from odenets.fields.sizes import check_divides
from odenets.flow import Flow
from odenets.models.names import refusing_other_names
from odenets.models.normalize import Normalize
from odenets.models.resnets import residual
from odenets.network import Network
from odenets.schemes.names import method_of

__all__ = ["vit"]

_SPLITTINGS = {"lie_trotter": (1.0, 1.0), "strang": (0.5, 1.0, 0.5)}
"""The steps of a block, over h: attention, perceptron, and attention again."""


class PatchTokens(nn.Module):
    """Images as tokens: one for the class, then a linear map of each patch, all with learned positions added.

    Args:
        in_channels: channels of the images.
        features: features D of the tokens.
        size: height (= width) of the images.
        patch: that of the patches, which divides it.

    >>> PatchTokens(3, 8, size=32, patch=4)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 65, 8])
    """

    def __init__(self, in_channels: int, features: int, size: int, patch: int) -> None:
        super().__init__()
        self.shape = in_channels, size, size
        self.token = nn.Parameter(torch.zeros(1, 1, features))
        self.positions = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, features).normal_(std=0.02))
        self.project = nn.Conv2d(in_channels, features, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens ``(B, 1 + patches, D)`` of images ``x`` ``(B, in_channels, size, size)``.

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        patches = self.project(x).flatten(2).transpose(1, 2)
        token = self.token.to(patches.dtype).expand(len(patches), -1, -1)
        return torch.cat([token, patches], 1) + self.positions


class FirstToken(nn.Module):
    """That of the class.

    >>> FirstToken()(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, D)`` of tokens ``x`` ``(B, N, D)``."""
        return x[:, 0]


@refusing_other_names(
    depth="blocks", layers="blocks", image_size="size", img_size="size", patch_size="patch", embed_dim="features",
    hidden_dim="features", width="features", num_heads="heads", num_layers="blocks", mlp_ratio="expansion",
)  # fmt: skip
def vit(
    in_channels: int = 3,
    classes: int = 1000,
    *,
    size: int = 224,
    patch: int = 16,
    features: int = 192,
    blocks: int = 12,
    heads: int = 3,
    expansion: int = 4,
    splitting: str = "lie_trotter",
    norm: str | None = "layer",
    normalize: Normalize | None = None,
    readout: str = "solution",
    **flow: Any,
) -> Network:
    """A vision transformer (Dosovitskiy et al. 2021), by default ViT-Ti/16 (Touvron et al. 2021): 5,717,416 parameters.

    The encoder makes tokens of patches, with one for the class. The flow takes two half steps a block, one with
    ``v = attention(norm(x))`` and one with ``v = perceptron(norm(x))``, Euler's with h = 1: a Lie-Trotter splitting of
    the sum of both (Lu et al. 2019). With ``splitting="strang"``, of order 2 where its steps are, there are three:
    h / 2 with attention, h with the perceptron and h / 2 with the same attention again, for as many parameters. The
    head reads the token of the class.

    For images of 32 x 32, ``size=32, patch=4``. ViT-S/16 has ``features=384, heads=6`` (22,050,664 parameters),
    ViT-B/16 ``features=768, heads=12`` (86,567,656, as torchvision).

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        size: height (= width) of the images.
        patch: that of a patch.
        features: features of each token.
        blocks: of two steps each, or three.
        heads: heads of the attention.
        expansion: hidden width of the perceptron over features.
        splitting: "lie_trotter" or "strang".
        norm: that of the fields: "layer", over the features of each token, "batch" (statistics per stage), "group" or
            None.
        normalize: the first layer, so that inputs are pixels in [0, 1].
        readout: what the head reads, "solution" or "ensemble", as in :class:`~odenets.Network`.
        flow: other arguments of the :class:`~odenets.Flow`, such as ``solver="bs23"``; Euler steps with h = 1
            if not given.

    Returns:
        The network, ``(B, in_channels, size, size)`` to logits ``(B, classes)``.

    Raises:
        TypeError: a size that is no whole number, or an h or a total time of Strang's splitting that is no number.
        ValueError: a size below 1, patches that do not fit the images, heads that do not divide the features, another
            splitting, or a shared block, where there are two fields.

    References:
        Dosovitskiy et al. An image is worth 16x16 words. arXiv:2010.11929 (2021). Touvron et al. Training
        data-efficient image transformers and distillation through attention. arXiv:2012.12877 (2021). Lu et al.
        Understanding and improving transformer from a multi-particle dynamic system point of view. arXiv:1906.02762
        (2019).

    >>> network = vit(classes=10, size=32, patch=8, features=24, blocks=2)
    >>> network(torch.rand(2, 3, 32, 32)).shape, network.depth
    (torch.Size([2, 10]), 4)
    """
    check_divides(patch=patch, size=size)
    check_count("blocks", blocks, 1)
    if splitting not in _SPLITTINGS:
        raise ValueError(f"splitting must be one of {', '.join(_SPLITTINGS)}, got {splitting!r}")
    if flow.get("shared"):
        raise ValueError("shared is for one field in all blocks, and a transformer has two, attention and perceptron")
    parts = _SPLITTINGS[splitting]
    flow = residual(flow)
    if splitting == "strang":
        flow = _with_sizes(flow, parts * blocks)
    per_block = fields_per_block(method_of(flow["solver"]), flow.get("stage_fields", "tied"))

    def fields() -> Iterator[VelocityField]:
        for _ in range(blocks):
            attention = [AttentionField(features, heads, norm=norm) for _ in range(per_block)]
            perceptron = [FeedForwardField(features, expansion, norm=norm) for _ in range(per_block)]
            yield from (attention + perceptron + attention)[: len(parts) * per_block]

    encoder = nn.Sequential(normalize or nn.Identity(), PatchTokens(in_channels, features, size, patch))
    head = nn.Sequential(FirstToken(), nn.LayerNorm(features, eps=1e-6), nn.Linear(features, classes))
    steps = Flow(partial(next, fields()), depth=len(parts) * blocks, **flow)
    return Network(encoder, steps, head, readout=readout)


def _with_sizes(flow: dict[str, Any], parts: Sequence[float]) -> dict[str, Any]:
    """Arguments of a flow whose steps are these parts of one size."""
    flow = dict(flow)
    h, total_time = flow.pop("h", None), flow.pop("total_time", None)
    if h is None:
        h = check_number("total_time", total_time) / sum(parts)
    return {**flow, "h": [part * check_number("h", h) for part in parts]}
