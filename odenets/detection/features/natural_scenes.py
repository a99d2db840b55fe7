"""Natural scene statistics: how the brightness of an image varies from a pixel to its neighbors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from odenets.detection.features.base import Features, check_images

__all__ = ["NaturalSceneStatistics", "asymmetric_gaussian", "contrast_normalized", "generalized_gaussian"]

SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
"""From a pixel to its horizontal, vertical and two diagonal neighbors."""

ROUNDING = 1e-9
"""Differences of brightness, in [0, 255], that are rounding: a flat part of an image is flat."""


class NaturalSceneStatistics(Features):
    """The 18 statistics of BRISQUE at the scale of the image; the network plays no part.

    The mean-subtracted, contrast-normalized brightness ``m = (I - mu) / (sigma + 1)``, with mu and sigma the local mean
    and standard deviation of brightness I in [0, 255] in a Gaussian window of 7 x 7 pixels, gives the shape and
    variance of a generalized Gaussian; its products with the neighbors to the right, below, and on the two diagonals
    each give the shape, mean, left variance and right variance (not standard deviations) of an asymmetric one. As in
    the code published with BRISQUE, the image is zero outside, and neighbors wrap around its edges.

    References:
        Mittal, Moorthy, Bovik. No-reference image quality assessment in the spatial domain. IEEE Transactions on Image
        Processing 21(12), 2012. Kherchouche, Fezza, Hamidouche, Deforges. Detection of adversarial examples in deep
        neural networks with natural scene statistics. IJCNN 2020.

    >>> import odenets
    >>> NaturalSceneStatistics()(odenets.models.small_network(depth=1), torch.rand(5, 1, 28, 28)).shape
    torch.Size([5, 18])
    """

    @torch.no_grad()
    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Statistics of a batch of images ``x`` ``(B, C, H, W)``, C = 1 or 3, ``(B, 18)`` float32; no gradients pass.

        The ``network`` is not called.

        Raises:
            TypeError, ValueError: x is no batch of gray or RGB images in [0, 1].
        """
        m = contrast_normalized(255 * _brightness(check_images(x, "x")))
        columns = list(generalized_gaussian(m.flatten(1)))
        for shift in SHIFTS:
            columns += asymmetric_gaussian((m * m.roll(shift, (1, 2))).flatten(1))
        return torch.stack(columns, 1).float()

    def __repr__(self) -> str:
        return "NaturalSceneStatistics()"


def contrast_normalized(brightness: Tensor) -> Tensor:
    """``(I - mu) / (sigma + 1)``, mu and sigma the local mean and standard deviation of brightness I in [0, 255].

    They are weighted by a Gaussian window of 7 x 7 pixels with a standard deviation of 7/6; outside the image I = 0.
    ``(B, H, W)``, float64.
    """
    image = brightness.double().unsqueeze(1)
    window = torch.exp(-torch.arange(-3.0, 4.0, dtype=torch.float64, device=image.device).square() / (2 * (7 / 6) ** 2))
    window = window / window.sum()

    def local(values: Tensor) -> Tensor:
        rows = conv2d(values, window.view(1, 1, 7, 1), padding=(3, 0))
        return conv2d(rows, window.view(1, 1, 1, 7), padding=(0, 3))

    mean = local(image)
    deviation = (local(image.square()) - mean.square()).clamp(min=0).sqrt()
    difference = image - mean
    return torch.where(difference.abs() > ROUNDING, difference / (deviation + 1), 0).squeeze(1)


def generalized_gaussian(values: Tensor) -> tuple[Tensor, Tensor]:
    """Shape a and variance of the density ``~ exp(-|x / b|^a)``, each ``(B,)``, by the moments of samples ``(B, N)``.

    The shape solves ``(E|x|)^2 / E x^2 = Gamma(2/a)^2 / (Gamma(1/a) Gamma(3/a))`` (Mittal et al. 2012, eq. 4), to 0.001
    in [0.2, 10]; it is 0.2 where all values are 0.
    """
    variance = values.square().mean(1)
    return _shape(_ratio(values.abs().mean(1).square(), variance)), variance


def asymmetric_gaussian(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape a, mean, left and right variance of a generalized Gaussian with two scales, of samples ``(B, N)``.

    Each is ``(B,)`` (Mittal et al. 2012, eq. 11). The left variance s_l^2 is the mean square of the negative values,
    the right s_r^2 that of the positive ones, 0 if there are none. The shape is that of :func:`generalized_gaussian`,
    from the ratio there times ``(s_l^3 + s_r^3) (s_l + s_r) / (s_l^2 + s_r^2)^2``; the mean is
    ``(s_r - s_l) Gamma(2/a) / sqrt(Gamma(1/a) Gamma(3/a))``.
    """
    squares = values.square()
    left, right = (squares.mul(side).sum(1) / side.sum(1).clamp(min=1) for side in (values < 0, values > 0))
    below, above = left.sqrt(), right.sqrt()
    ratio = _ratio(values.abs().mean(1).square(), squares.mean(1))
    shape = _shape(ratio * _ratio((below**3 + above**3) * (below + above), (left + right).square()))
    return shape, (above - below) * _moments(shape).sqrt(), left, right


def _brightness(x: Tensor) -> Tensor:
    """Luma of ITU-R BT.601 ``(B, H, W)`` float64; gray images as they are."""
    if x.shape[1] not in (1, 3):
        raise ValueError(f"x must be gray or RGB images (N, 1 or 3, H, W), got shape {tuple(x.shape)}")
    weights = [1.0] if x.shape[1] == 1 else [0.299, 0.587, 0.114]
    return torch.einsum("bchw,c->bhw", x.double(), torch.tensor(weights, dtype=torch.float64, device=x.device))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 for 0 / 0."""
    return torch.where(b > 0, a / b.masked_fill(b == 0, 1), 0)


def _moments(shape: Tensor) -> Tensor:
    """``(E|x|)^2 / E x^2`` of a generalized Gaussian, which rises with its shape from 0 to 3/4."""
    return (2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape)).exp()


@lru_cache
def _table() -> tuple[Tensor, Tensor]:
    """Shapes, and the midpoints between their ratios of moments."""
    shapes = torch.linspace(0.2, 10, 9801, dtype=torch.float64)
    ratios = _moments(shapes)
    return shapes, (ratios[1:] + ratios[:-1]) / 2


def _shape(ratio: Tensor) -> Tensor:
    """The shape whose ratio of moments is nearest."""
    shapes, midpoints = (each.to(ratio.device) for each in _table())
    return shapes[torch.searchsorted(midpoints, ratio)]
