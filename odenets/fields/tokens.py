"""Images as tokens, one for each place, and back."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_state", "as_tokens"]


def as_tokens(x: Tensor) -> Tensor:
    """The tokens ``(B, N, D)`` of a state: itself, or the places of images ``(B, D, H, W)``.

    Raises:
        ValueError: x has another number of dimensions.

    >>> import torch
    >>> as_tokens(torch.zeros(2, 3, 4, 5)).shape
    torch.Size([2, 20, 3])
    """
    match x.ndim:
        case 3:
            return x
        case 4:
            return x.flatten(2).transpose(1, 2)
    raise ValueError(f"x must be tokens (B, N, D) or images (B, D, H, W), got shape {tuple(x.shape)}")


def as_state(tokens: Tensor, x: Tensor) -> Tensor:
    """The ``tokens`` of a state ``x`` in the shape of it.

    >>> import torch
    >>> x = torch.randn(2, 3, 4, 5)
    >>> torch.equal(as_state(as_tokens(x), x), x)
    True
    """
    return tokens if x.ndim == 3 else tokens.transpose(1, 2).reshape(x.shape)
