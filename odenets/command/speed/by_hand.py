"""The loops one writes without a library, from 0 to 1: what a solver's overhead is compared with."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from solvers import Field

__all__ = ["FIXED", "bosh3", "bs23", "euler", "midpoint", "rk4"]


def euler(field: Field, x: Tensor, steps: int) -> Tensor:
    """Steps of Euler's method."""
    h = 1 / steps
    for i in range(steps):
        x = torch.add(x, field(i * h, x), alpha=h)
    return x


def midpoint(field: Field, x: Tensor, steps: int) -> Tensor:
    """Steps of the midpoint method."""
    h = 1 / steps
    for i in range(steps):
        half = torch.add(x, field(i * h, x), alpha=h / 2)
        x = torch.add(x, field((i + 0.5) * h, half), alpha=h)
    return x


def rk4(field: Field, x: Tensor, steps: int) -> Tensor:
    """Steps of the classic method of order 4."""
    h = 1 / steps
    for i in range(steps):
        t = i * h
        k1 = field(t, x)
        k2 = field(t + h / 2, torch.add(x, k1, alpha=h / 2))
        k3 = field(t + h / 2, torch.add(x, k2, alpha=h / 2))
        k4 = field(t + h, torch.add(x, k3, alpha=h))
        x = torch.add(x, k1, alpha=h / 6).add(k2, alpha=h / 3).add(k3, alpha=h / 3).add(k4, alpha=h / 6)
    return x


def _bs23_step(field: Field, t: float, x: Tensor, h: float, k1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k2 = field(t + h / 2, torch.add(x, k1, alpha=h / 2))
    k3 = field(t + 3 * h / 4, torch.add(x, k2, alpha=3 * h / 4))
    x1 = torch.add(x, k1, alpha=2 * h / 9).add(k2, alpha=h / 3).add(k3, alpha=4 * h / 9)
    return x1, k2, k3


def bs23(field: Field, x: Tensor, steps: int) -> Tensor:
    """Steps of Bogacki and Shampine's method of order 3."""
    h = 1 / steps
    for i in range(steps):
        x, _, _ = _bs23_step(field, i * h, x, h, field(i * h, x))
    return x


def bosh3(field: Field, x: Tensor, rtol: float, atol: float, h: float = 0.1) -> Tensor:
    """Bogacki and Shampine's pair under error control, its last stage reused, with the elementary controller."""
    t, k1 = 0.0, field(0.0, x)
    while t < 1:
        h = min(h, 1 - t)
        x1, k2, k3 = _bs23_step(field, t, x, h, k1)
        k4 = field(t + h, x1)
        with torch.no_grad():
            error = torch.mul(k1, -5 * h / 72).add_(k2, alpha=h / 12).add_(k3, alpha=h / 9).add_(k4, alpha=-h / 8)
            scale = torch.maximum(x.abs(), x1.abs()).mul_(rtol).add_(atol)
            ratio = torch.linalg.vector_norm(error.div_(scale)).item() / math.sqrt(error.numel())
        if ratio <= 1:
            t, x, k1 = (1.0 if h == 1 - t else t + h), x1, k4
        h *= min(10.0, max(0.2, 0.9 * max(ratio, 1e-10) ** (-1 / 3)))
    return x


FIXED: dict[str, Callable[[Field, Tensor, int], Tensor]] = {
    "euler": euler,
    "midpoint": midpoint,
    "rk4": rk4,
    "bs23": bs23,
}
