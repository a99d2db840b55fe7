"""Positions of tokens: those that hold padding count for nothing, and errors at others are relative to the state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from odenets.adapting.masking import MASKS
from odenets.inputs import is_by_keyword, is_mask

__all__ = ["at_tokens", "number_of", "tokens_in", "unread_masks", "weights_at"]


def tokens_in(inputs: Any) -> Tensor | None:
    """Where the texts of a batch have tokens and no padding, ``(B, T)``, by a mask among its ``inputs`` by keyword.

    Returns:
        The positions; None where no padding is told.

    Raises:
        ValueError: a mask without tokens, of another shape, or one of several, or beside inputs of a decoder, which may
            be padded too.

    >>> import torch
    >>> tokens_in({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
    tensor([[ True, False]])
    """
    masks = {name: x for name, x in inputs.items() if name in MASKS} if is_by_keyword(inputs) else {}
    there = {name: _tokens(x, MASKS[name]) for name, x in masks.items() if isinstance(x, Tensor)}
    padded = [name for name, tokens in there.items() if not tokens.all()]
    if not padded:
        return None
    tokens = there[padded[0]]
    if tokens.ndim != 2 or len(there) > 1 or any(name.startswith("decoder") for name in inputs):
        raise ValueError(
            f"{padded[0]} must be (B, T), of the only tokens, to tell padding, got {tuple(tokens.shape)} beside "
            f"{[name for name in inputs if name != padded[0]]}: batches of texts of one length"
        )
    if not tokens.any():
        raise ValueError(f"{padded[0]} must be 1 at tokens, got zeros alone: all would be padding")
    return tokens


def _tokens(mask: Tensor, of_tokens: bool) -> Tensor:
    """Where there are tokens, by a mask that is 1 there; else one that is True, or minus infinity, at padding."""
    return mask.bool() if of_tokens else ~mask.bool()


def unread_masks(inputs: Any) -> list[str]:
    """Names of ``inputs`` by keyword that may tell padding and are not read as such.

    That is what is called a mask and holds 0 and 1 for each of some whole numbers, under a name that is none of MASKS.

    >>> import torch
    >>> unread_masks({"input_ids": torch.tensor([[5, 0]]), "mask": torch.tensor([[1, 0]])})
    ['mask']
    """
    masks = {name: x for name, x in inputs.items() if "mask" in str(name)} if is_by_keyword(inputs) else {}
    others = [x for name, x in inputs.items() if name not in masks] if masks else []
    return [
        name
        for name, x in masks.items()
        if name not in MASKS and not MASKS.keys() & masks.keys() and any(is_mask(x, tokens) for tokens in others)
    ]


def at_tokens(x: Tensor, tokens: Tensor | None) -> Tensor:
    """What a state or an output ``(B, T, *S)`` holds at some positions ``tokens`` ``(B, T)``, ``(N, *S)``.

    All that it holds, as it is, if they are None, or if it has no positions, ``(B, K)``.

    Raises:
        ValueError: it has other positions.
    """
    if tokens is None or x.ndim < 3:
        return x
    if x.shape[:2] != tokens.shape:
        raise ValueError(
            f"a mask {tuple(tokens.shape)} does not tell what is padding in {tuple(x.shape)}, which the network "
            "computes: batches of texts of one length"
        )
    return x[tokens.to(x.device)]


def number_of(x: Tensor, width: int, tokens: Tensor | None) -> int:
    """How many positions a state ``x`` with so many features has, padding aside."""
    return x.numel() // width if tokens is None or x.ndim < 3 else int(tokens.sum())


def weights_at(state: Tensor, tokens: Tensor | None = None) -> Tensor | None:
    """What errors at the positions of a ``state`` of tokens ``(B, T, D)`` are multiplied with, ``(B, T)``.

    That is one over its size, for what follows is a norm, and a few tokens are a thousand times as large as others;
    None for other states.

    Args:
        state: the state.
        tokens: positions that are no padding, ``(B, T)``; weights are then those of these alone, ``(N,)``.

    >>> import torch
    >>> weights_at(torch.full((1, 1, 4), 5.0))
    tensor([[0.2000]])
    """
    return at_tokens(state, tokens).square().mean(-1).rsqrt().clamp_max(1e6) if state.ndim == 3 else None
