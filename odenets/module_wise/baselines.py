"""Other ways to train modules, from their published descriptions: InfoPro, PredSim, AugLocal."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.modes import evaluating, inputs_for, keeping_state
from odenets.module_wise.heads import like
from odenets.module_wise.modules import LocalLoss
from odenets.module_wise.partition import At, Cuttable, blocks_of, cut

__all__ = ["Reconstruction", "Similarity", "auglocal", "infopro", "predsim"]


class Reconstruction(nn.Module):
    """InfoPro's bound on the information of a state about the image: the loss of a decoder (Wang et al. 2021).

    Bilinear interpolation to the image's size, conv3x3-BN-ReLU-conv3x3, binary cross-entropy, in this order.

    Args:
        channels: of the states.
        image_channels: of the images, whose pixels lie in [0, 1].
        weight: of the loss.
        hidden: channels between the convolutions.
    """

    def __init__(self, channels: int, image_channels: int, weight: float, hidden: int = 12) -> None:
        super().__init__()
        self.weight = weight
        self.first = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, image_channels, 3, padding=1)

    def forward(self, state: Tensor, images: Tensor, y: Tensor) -> Tensor:
        """The weighted loss of states ``(B, C, H, W)``."""
        state = F.interpolate(state, images.shape[-2:], mode="bilinear", align_corners=False)
        decoded = self.second(self.norm(self.first(state)).relu())
        return self.weight * F.binary_cross_entropy_with_logits(decoded, images.to(decoded.dtype))


def infopro(first: float = 1.0, last: float = 0.0) -> LocalLoss:
    """InfoPro's term beside the cross-entropy of the head: a decoder reconstructs the image from the state.

    Bilinear interpolation to the image's size, conv3x3-BN-ReLU-conv3x3, binary cross-entropy with the pixels: a bound
    on the information of the state about the image. For ``split_into_modules(network, K, x, local_loss=infopro())``.

    Args:
        first, last: its weight for the first module and the last; linear in between. At weight 0 there is no decoder.

    Returns:
        What makes the term of a module, from its number, how many there are, its state and the images.

    Raises:
        ValueError: a negative weight; when modules are made, states that are no images, or images whose pixels leave
            [0, 1], for which the cross-entropy has no least value.

    References:
        Wang, Ni, Song, Yang, Huang. Revisiting locally supervised learning: an alternative to end-to-end training.
        ICLR 2021.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> x, loss = torch.rand(2, 1, 8, 8), infopro(first=1.0, last=0.5)
    >>> modules = split_into_modules(network, 2, x, local_loss=loss)
    >>> [module.local_loss.weight for module in modules.modules_in_order]
    [1.0, 0.5]
    """
    if first < 0 or last < 0:
        raise ValueError(f"first and last must not be negative, got {first} and {last}")

    def make(k: int, K: int, state: Tensor, images: Tensor) -> nn.Module:
        if state.ndim != 4 or images.ndim != 4:
            raise ValueError(f"InfoPro decodes images (B, C, H, W), got states {tuple(state.shape)}")
        low, high = (float(pixel) for pixel in images.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"InfoPro decodes images with pixels in [0, 1], got {low:g} to {high:g}")
        weight = first + (last - first) * k / max(K - 1, 1)
        if not weight:
            return _NoLoss()
        return like(Reconstruction(state.shape[1], images.shape[1], weight), state)

    return make


class Similarity(nn.Module):
    """PredSim's loss: states of one class are to be alike, ``|S(conv(H)) - S(Y)|_F^2 / B^2`` (Nokland and Eidnes 2019).

    S is the matrix of cosines between the mean-free rows of its argument, Y the one-hot labels [K24, appendix D].
    Where the states are no images the convolution is a linear layer.

    Args:
        state: of the module, for its shape.
        classes: number of classes.
        weight: of the loss.
        features: channels behind the convolution; as many as the state has if not given.
    """

    def __init__(self, state: Tensor, classes: int, weight: float = 1.0, features: int | None = None) -> None:
        super().__init__()
        self.classes, self.weight = classes, weight
        if state.ndim == 4:
            self.layer: nn.Module = nn.Conv2d(state.shape[1], features or state.shape[1], 3, padding=1, bias=False)
        else:
            self.layer = nn.Linear(state.shape[-1], features or state.shape[-1], bias=False)
        like(self, state)

    def forward(self, state: Tensor, images: Tensor, y: Tensor) -> Tensor:
        """The weighted loss of states ``(B, *S)`` with labels ``(B,)``.

        Raises:
            TypeError: targets that are no classes.
        """
        if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1:
            got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"PredSim compares classes: targets must be labels (B,), whole numbers, got {got}")
        cosines = correlations(self.layer(state).flatten(1))
        other = torch.full_like(cosines, -1.0 / (self.classes - 1))
        target = torch.where(y[:, None] == y[None], torch.ones_like(cosines), other)  # S of one-hot rows
        return self.weight * (cosines - target).square().mean()


def correlations(rows: Tensor) -> Tensor:
    """Cosines between the mean-free rows, ``(B, D)`` to ``(B, B)``, in float32 at least."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


def predsim(classes: int, weight: float = 1.0) -> LocalLoss:
    """PredSim's similarity loss beside the cross-entropy of the head: states of one class are to be alike.

    ``weight * |S(conv(H)) - S(Y)|_F^2 / B^2`` with S the matrix of cosines between the mean-free rows of its argument,
    H the states and Y the one-hot labels [K24, appendix D]. For ``split_into_modules(..., local_loss=predsim(10))``.

    Args:
        classes: number of classes, at least 2.
        weight: of the loss.

    Returns:
        What makes the loss of a module, from its number, how many there are, its state and the images.

    Raises:
        ValueError: fewer than two classes, or a weight that is not positive.

    References:
        Nokland, Eidnes. Training neural networks with local error signals. ICML 2019.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> x = torch.rand(2, 1, 8, 8)
    >>> modules = split_into_modules(network, 2, x, local_loss=predsim(10))
    """
    if classes < 2 or not weight > 0:
        raise ValueError(f"classes must be at least 2 and weight positive, got {classes} and {weight}")
    return lambda k, K, state, images: Similarity(state, classes, weight)


class _NoLoss(nn.Module):
    """No loss."""

    def forward(self, state: Tensor, images: Tensor, y: Tensor) -> Tensor:
        """Zero."""
        return state.new_zeros(())


def auglocal(
    network: Cuttable, ends: Sequence[int], x: Tensor, *, deepest: int = 4, shallowest: int = 1, at: At = "end"
) -> list[nn.Module]:
    """AugLocal's auxiliary networks: copies of a few later blocks and of the network's head.

    The blocks are chosen evenly among those after the module; there are linearly fewer of them the later the module.
    A block that changes the shape of the state is always among them, so that the copies fit one another.

    Args:
        network: whose modules end at ``ends``.
        ends: after how many blocks each module ends, the last with the network.
        x: a batch of inputs ``(B, *S)``, by which shapes are found.
        deepest, shallowest: blocks in the auxiliary network of the first module, and of the last but one.
        at: see :func:`cut`.

    Returns:
        One auxiliary network per module but the last, for ``split_into_modules(network, ends, x, head=...)``.

    Raises:
        ValueError: numbers of blocks out of range.

    References:
        Ma, Wu, Si, Tan. Scaling supervised local learning with augmented auxiliary networks. ICLR 2024.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> network, x = odenets.models.small_network(depth=6), torch.rand(2, 1, 8, 8)
    >>> heads = auglocal(network, [2, 4, 6], x, deepest=2)
    >>> split_into_modules(network, [2, 4, 6], x, head=heads).K
    3
    """
    if not deepest >= shallowest >= 1:
        raise ValueError(f"deepest must be at least shallowest and this at least 1, got {deepest} and {shallowest}")
    blocks, own = cut(network, range(1, blocks_of(network, x) + 1), at, x)
    changing = _changing(blocks, inputs_for(network, x))
    heads = []
    for k, end in enumerate(ends[:-1]):
        left = len(blocks) - end
        number = min(round(deepest - (deepest - shallowest) * k / max(len(ends) - 2, 1)), left)
        chosen = {end + (j + 1) * left // number - 1 for j in range(number)}
        chosen |= {m for m in changing if m >= end}
        heads.append(nn.Sequential(*(copy.deepcopy(blocks[m]) for m in sorted(chosen)), copy.deepcopy(own)))
    return heads


@torch.no_grad()
def _changing(blocks: Sequence[nn.Module], x: Tensor) -> list[int]:
    """The blocks that change the shape of the state."""
    shapes = [x.shape]
    with keeping_state(*blocks), evaluating(*blocks):
        for block in blocks:
            x = block(x)
            shapes.append(x.shape)
    return [m for m in range(1, len(blocks)) if shapes[m] != shapes[m + 1]]
