"""Feature squeezing: how much the predictions change when an image loses detail."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.detection.features.base import Features, check_images
from odenets.detection.isolation import checked_logits, to_network
from odenets.errors import check_count

__all__ = ["FeatureSqueezing", "median_smoothed", "non_local_means", "reduced_depth"]

SQUEEZERS = ("bits", "median", "means")


class FeatureSqueezing(Features):
    """L1 distances of the predicted probabilities of an image to those of the image with less detail.

    ``|softmax f(x) - softmax f(s(x))|_1`` for each squeezer s; Xu et al. detect where the largest of them exceeds a
    threshold, which is the last feature. The squeezers are

    - "bits": pixels at fewer bits;
    - "median": the median of a window of each channel;
    - "means": non-local means.

    Args:
        squeezers: of the above, all three if none is given: what Xu et al. find best for CIFAR-10.
        bits: of a pixel.
        window: side of the median's window, 2 or 3.
        strength: h of the non-local means, in units of pixels in [0, 1]; theirs is 4 of 255.

    Raises:
        ValueError: an unknown squeezer, bits or a window out of range, or a strength that is not positive.

    References:
        Xu, Evans, Qi. Feature squeezing: detecting adversarial examples in deep neural networks. NDSS 2018,
        arXiv:1704.01155.

    >>> import odenets
    >>> FeatureSqueezing("bits", "median")(odenets.models.small_network(depth=1), torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 3])
    """

    def __init__(self, *squeezers: str, bits: int = 5, window: int = 2, strength: float = 4 / 255) -> None:
        squeezers = squeezers or SQUEEZERS
        if unknown := [name for name in squeezers if name not in SQUEEZERS]:
            raise ValueError(f"squeezers must be among {', '.join(SQUEEZERS)}, got {', '.join(map(repr, unknown))}")
        check_count("bits", bits, 1)
        if window not in (2, 3):
            raise ValueError(f"window must be 2 or 3, got {window}")
        if not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        self.squeezers, self.bits, self.window, self.strength = squeezers, bits, window, strength

    def squeezed(self, x: Tensor) -> list[Tensor]:
        """Images ``x`` ``(B, C, H, W)`` by each squeezer."""
        ways = {
            "bits": lambda: reduced_depth(x, self.bits),
            "median": lambda: median_smoothed(x, self.window),
            "means": lambda: non_local_means(x, self.strength),
        }
        return [ways[name]() for name in self.squeezers]

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Distances of a batch ``x`` by a ``network``, ``(B, squeezers + 1)`` float32, the largest last.

        Raises:
            TypeError, ValueError: x is no batch of images in [0, 1], or the network returns no logits.
        """
        return self.output_and_features(network, x)[1]

    def output_and_features(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a ``network`` and the features of a batch ``x``.

        Raises:
            TypeError, ValueError: as a call.
        """
        x = check_images(x, "x")
        logits = checked_logits(network(to_network(network, x)), len(x))
        whole = _probabilities(logits)
        others = [checked_logits(network(to_network(network, each)), len(x)) for each in self.squeezed(x)]
        distances = torch.stack([(_probabilities(each) - whole).abs().sum(1) for each in others], 1)
        return logits, torch.cat([distances, distances.amax(1, keepdim=True)], 1)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.squeezers))
        return f"FeatureSqueezing({names}, bits={self.bits}, window={self.window}, strength={self.strength:g})"


def _probabilities(logits: Tensor) -> Tensor:
    return logits.float().softmax(1)


def reduced_depth(x: Tensor, bits: int) -> Tensor:
    """Pixels in [0, 1] at the nearest of ``2^bits`` levels; gradients are 0.

    >>> reduced_depth(torch.tensor([0.2, 0.6]), 1)
    tensor([0., 1.])
    """
    most = 2**bits - 1
    return (x * most).round() / most


def median_smoothed(x: Tensor, window: int) -> Tensor:
    """Median of the window around each pixel, of even windows the upper one and up to the pixel, edges repeated.

    >>> median_smoothed(torch.eye(3)[None, None], 3)[0, 0, 1]
    tensor([0., 0., 0.])
    """
    before, after = window // 2, (window - 1) // 2
    wide = F.pad(x, (before, after, before, after), mode="replicate")
    return wide.unfold(2, window, 1).unfold(3, window, 1).flatten(4).sort(-1).values[..., window**2 // 2]


def non_local_means(x: Tensor, strength: float, *, search: int = 11, patch: int = 3) -> Tensor:
    """Means of pixels weighted by how alike the patches around them are (Buades, Coll, Morel 2005).

    ``sum_q w(p, q) x(q) / sum_q w(p, q)``, ``w = exp(-d(p, q)^2 / strength^2)``, with d the root mean square difference
    of the patches about p and q over all channels, q in a window about p. Edges are mirrored.

    Args:
        x: images ``(B, C, H, W)``.
        strength: h, in the units of the pixels.
        search, patch: sides of window and patch, odd.

    Returns:
        Images of the same shape.
    """
    reach, height, width = search // 2, x.shape[2], x.shape[3]
    wide = _mirrored(x, reach + patch // 2)
    inner = wide[:, :, reach : reach + height + patch - 1, reach : reach + width + patch - 1]
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for dy in range(search):
        for dx in range(search):
            other = wide[:, :, dy : dy + height + patch - 1, dx : dx + width + patch - 1]
            square = F.avg_pool2d((inner - other).square().mean(1, keepdim=True), patch, 1)
            weight = (-square / strength**2).exp()
            half = patch // 2
            total = total + weight * other[:, :, half : half + height, half : half + width]
            weights = weights + weight
    return total / weights


def _mirrored(x: Tensor, by: int) -> Tensor:
    """Edges mirrored about the outermost pixels, by as much as there is; what is beyond repeats the last."""
    most = min(by, x.shape[2] - 1, x.shape[3] - 1)
    x = F.pad(x, (most,) * 4, mode="reflect")
    return F.pad(x, (by - most,) * 4, mode="replicate") if by > most else x
