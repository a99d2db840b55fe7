"""Linear maps of fields, matrices on points and convolutions of images: made, transposed, measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.errors import check_count
from odenets.fields.sizes import check_odd, check_sizes

__all__ = ["Operator", "adjoint", "apply", "make_operator", "square_norm"]

Operator = nn.Linear | nn.Conv2d
"""A linear map with a bias: of points, or of images, which keep their height and width."""


def make_operator(features: int, out: int, kernel_size: int | None, *, bias: bool = True) -> Operator:
    """A linear layer, or a convolution that pads images with zeros.

    Args:
        features: features of points or channels of images.
        out: those of what the map makes.
        kernel_size: odd size of a convolution; None for points.
        bias: whether it has one.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, or an even kernel_size.

    >>> make_operator(3, 4, None)
    Linear(in_features=3, out_features=4, bias=True)
    """
    check_sizes(features=features, hidden=out)
    if kernel_size is None:
        return nn.Linear(features, out, bias=bias)
    check_odd(kernel_size)
    return nn.Conv2d(features, out, kernel_size, padding=kernel_size // 2, bias=bias)


def apply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``K x + b`` with the ``weight`` of K and the ``bias`` b, on points or images ``x``.

    >>> apply(torch.eye(2), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def adjoint(weight: Tensor, y: Tensor) -> Tensor:
    """``K^T y`` with the ``weight`` of K, for which ``<K x, y> = <x, K^T y>``.

    >>> adjoint(torch.tensor([[1.0, 2.0]]), torch.ones(1, 1))
    tensor([[1., 2.]])
    """
    if weight.ndim == 2:
        return F.linear(y, weight.T)
    return F.conv_transpose2d(y, weight, padding=weight.shape[-1] // 2)


@torch.no_grad()
def square_norm(
    weight: Tensor, size: tuple[int, int] | None = None, *, tolerance: float = 1e-6, iterations: int = 300
) -> float:
    """``||K||^2``, the largest eigenvalue of ``K^T K``, of the ``weight`` of K.

    That of a matrix is its largest singular value squared. That of a convolution is found from below by the iteration
    of Lanczos, whose vectors stay orthogonal, in float64; the random state stays as it is.

    Args:
        weight: of a matrix, ``(out, features)``, or of a convolution, ``(out, channels, k, k)``.
        size: height and width of the images.
        tolerance: the residual of the eigenvector over the eigenvalue at which the iteration ends.
        iterations: the most that are taken, each with one image in memory.

    Returns:
        The number.

    Raises:
        TypeError: a height or width that is no whole number.
        ValueError: a convolution without a size of images, or one of sizes below 1.

    References:
        Golub, Van Loan. Matrix computations. 4th edition, section 10.1.

    >>> square_norm(torch.diag(torch.tensor([1.0, 3.0])))
    9.0
    """
    weight = weight.detach().double()
    if weight.ndim == 2:
        return float(torch.linalg.matrix_norm(weight, 2) ** 2)
    if size is None or len(size) != 2:
        raise ValueError(f"size must be height and width of the images that are convolved, (32, 32), got {size!r}")
    for name, length in zip(("height", "width"), size, strict=True):
        check_count(f"size, {name}", length, 1)
    shape = (1, weight.shape[1], *size)
    image = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(weight.device)
    vectors = [image.flatten() / image.norm()]
    diagonal, beside, value = [], [], 0.0
    for _ in range(min(iterations, image.numel())):
        image = adjoint(weight, apply(weight, vectors[-1].reshape(shape))).flatten()
        diagonal.append(image @ vectors[-1])
        before = torch.stack(vectors)
        for _ in range(2):  # once leaves what rounding makes of it
            image = image - before.T @ (before @ image)
        eigenvalues, eigenvectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value = float(eigenvalues[-1])
        beside.append(image.norm())
        if beside[-1] * eigenvectors[-1, -1].abs() <= tolerance * value:
            break
        vectors.append(image / beside[-1])
    return value


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    matrix = torch.stack(diagonal).diag()
    return matrix + torch.stack(beside).diag(1) + torch.stack(beside).diag(-1) if beside else matrix
