"""Fourier spectrum of the images themselves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from odenets.detection.features.base import Features, check_images

__all__ = ["FourierSpectrum"]


class FourierSpectrum(Features):
    """Magnitude or phase of the discrete Fourier transform of each channel of an image; the network plays no part.

    ``F(k, l) = sum_{m,n} x(m, n) exp(-2 pi i (k m / H + l n / W))``, and of it ``|F|`` or ``arg F`` in [-pi, pi].

    Args:
        part: "magnitude" or "phase".

    Raises:
        ValueError: another part.

    References:
        Harder, Pfreundt, Keuper, Keuper. SpectralDefense: detecting adversarial attacks on CNNs in the Fourier domain.
        IJCNN 2021.

    >>> import odenets
    >>> FourierSpectrum("phase")(odenets.models.small_network(depth=1), torch.rand(5, 1, 8, 8)).shape
    torch.Size([5, 64])
    """

    def __init__(self, part: Literal["magnitude", "phase"] = "magnitude") -> None:
        if part not in ("magnitude", "phase"):
            raise ValueError(f"part must be 'magnitude' or 'phase', got {part!r}")
        self.part: Literal["magnitude", "phase"] = part

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Spectra of a batch of images ``x`` ``(B, C, H, W)``, ``(B, C H W)`` float32; gradients pass.

        The ``network`` is not called.

        Raises:
            TypeError, ValueError: x is no batch of images in [0, 1].
        """
        x = check_images(x, "x")
        spectrum = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)))
        values = spectrum.abs() if self.part == "magnitude" else spectrum.angle()
        return values.flatten(1).float()

    def __repr__(self) -> str:
        return f"FourierSpectrum({self.part!r})"
