"""How far the path of an image and that of its smoothed copy part, block by block."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets import measures
from odenets.detection.features.base import Features, check_images
from odenets.detection.features.feature_maps import pooled
from odenets.detection.isolation import checked_logits, to_network
from odenets.inputs import call
from odenets.measures import measure
from odenets.recording import is_recorder
from solvers import Step

__all__ = ["Separation", "smoothed"]

SMALLEST, LEAST = 1e-20, 1e-10
"""Squares, and norms, below are none."""


class Separation(Features):
    """Features of each block of two paths, that of an image and that of the same image smoothed.

    Smoothing takes away what an attack has added, and what noise of the same size has. What it took from an attacked
    image had moved the path otherwise than what it takes from a clean or a noisy one. With x and r the state after a
    block and its residue, and x' and r' those of the smoothed copy, of each block

    - the relative distance ``|x - x'| / |x|``, as of neighboring trajectories in a finite-time Lyapunov exponent;
    - the cosine of r and r';
    - ``log <r'^2> / <r^2>``;
    - the relative distance of the means of the channels over each quadrant, or over all positions where a state is no
      image;

    and, unless ``alone``, the two of [K24, equation 34] of the image itself. Both go through the network as one batch:
    it costs two passes, and on a CPU, where blocks are as light as those of ResNet-56, half as much again or more for
    sums over the states.

    Args:
        width: standard deviation of the Gaussian, in pixels, on a window of 3 x 3.
        alone: without the features of [K24].

    Raises:
        ValueError: a width that is not positive.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=3)
    >>> Separation()(network, torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 18])
    """

    def __init__(self, *, width: float = 0.6, alone: bool = False) -> None:
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        self.width, self.alone = width, alone

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Features of a batch ``x`` by a ``network``, ``(B, F)``, float32 or wider; gradients pass.

        Of each measure all blocks, one measure after the other.

        Raises:
            TypeError, ValueError: x is no batch of images in [0, 1], or the network does not record its steps.
        """
        return self.output_and_features(network, x)[1]

    def output_and_features(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a ``network`` and the features of a batch ``x``, in one pass with twice as many images.

        Raises:
            TypeError, ValueError: as a call; or the network returns no logits.
        """
        x = check_images(x, "x")
        if not is_recorder(network):
            raise TypeError(f"network must record its steps, got {type(network).__name__}: pass odenets.adapt(network)")
        n, both = len(x), torch.cat([x, smoothed(x, self.width)])
        measured = {"residue": measures.residue, "distance": _distance, "turn": _turn, "means": _means}
        measured |= {} if self.alone else {"cosine": measures.cosine}
        output, records = call(cast(Any, network).record, to_network(network, both), **measured)
        own, other = records["residue"].clamp(min=SMALLEST).split(n, dim=1)
        columns = {name: values[:, :n] for name, values in records.items()} | {"growth": (other / own).log()}
        return checked_logits(output, 2 * n)[:n], torch.cat([columns[name].T for name in self._names], 1)

    @property
    def _names(self) -> tuple[str, ...]:
        """Of what there is one of in each block, in their order."""
        both = ("distance", "turn", "growth", "means")
        return both if self.alone else ("residue", "cosine", *both)

    def names(self, network: nn.Module) -> list[str]:
        """Of the features, in their order; the blocks of the ``network`` count from 1."""
        blocks = range(1, cast(Any, network).depth + 1)
        return [f"{name} {block}" for name in self._names for block in blocks]

    def __repr__(self) -> str:
        return f"Separation(width={self.width:g}, alone={self.alone})"


def smoothed(x: Tensor, width: float) -> Tensor:
    """Images ``(B, C, H, W)`` through a Gaussian of ``width`` pixels on a window of 3 x 3, edges repeated.

    >>> smoothed(torch.ones(1, 1, 4, 4), 0.6).allclose(torch.ones(1, 1, 4, 4))
    True
    """
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device).square().div(-2 * width**2).exp()
    line = line / line.sum()
    channels = x.shape[1]
    kernel = (line[:, None] * line).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels).clamp(0, 1)


def _pairs(state: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the images and of their copies, ``(B, D)`` float32 or wider, in the order that they have in memory."""
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    if state.ndim == 4 and state.is_contiguous(memory_format=torch.channels_last):
        state = state.permute(0, 2, 3, 1)
    one, other = state.flatten(1).chunk(2)
    return one, other


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _twice(x: Tensor) -> Tensor:
    """For images and copies alike, ``(2B,)``."""
    return torch.cat([x, x])


def _relative(one: Tensor, other: Tensor) -> Tensor:
    """``|one - other| / |one|``, ``(2B,)``."""
    return _twice((_norm(one - other) / _norm(one).clamp(min=LEAST)).clamp(min=LEAST))


@measure(closing=False)
def _distance(step: Step) -> Tensor:
    return _relative(*_pairs(step.x1))


@measure(closing=False)
def _turn(step: Step) -> Tensor:
    one, other = _pairs(measures.wide_residue(step))
    product = (one * other).sum(1)  # no product of matrices, which autocast narrows
    return _twice(product / (_norm(one).clamp(min=LEAST) * _norm(other).clamp(min=LEAST)))


@measure(closing=False)
def _means(step: Step) -> Tensor:
    state = step.x1
    if state.ndim == 4:
        return _relative(*_pairs(F.adaptive_avg_pool2d(state, 2)))
    return _relative(*_pairs(pooled(state)))
