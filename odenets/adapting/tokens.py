"""Tokens: the rows of states that are measured, as steps of samples without their padding, or of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MAKE", "OFF", "Per", "Tokens"]

Per = Literal["sample", "token"]
"""What a row of measures is of."""

States = tuple[Tensor, Tensor, Tensor | None]
"""A step's x0 and x1, and its residue where that is no difference of them."""

MAKE = "a function makes a mask (B, T) that is True of tokens, adapt(model, mask=lambda inputs: ...)"
OFF = "mask=None measures padding too"


class Tokens:
    """The tokens of a batch that are measured: steps of its samples, or of its tokens, come from them.

    Samples of as many tokens are measured together, each as it is without its padding, so that any measure is right.

    Args:
        mask: ``(B, T)``, True where there is a token; None where nothing is padded.
        per: what a row of measures is of.

    >>> tokens = Tokens(torch.tensor([[True, True, False], [True, True, True]]), "sample")
    >>> x = torch.arange(6.0).reshape(2, 3, 1)
    >>> [x0.flatten(1).tolist() for x0, _, _ in tokens.split("block", x, x, None)]
    [[[0.0, 1.0]], [[3.0, 4.0, 5.0]]]
    >>> tokens.join([torch.tensor([2.0]), torch.tensor([3.0])])
    tensor([2., 3.])
    """

    def __init__(self, mask: Tensor | None, per: Per) -> None:
        self.mask, self.per = mask, per
        self.shape: tuple[int, ...] | None = None if mask is None else tuple(mask.shape)
        self._groups: list[tuple[int, int]] = []  # samples and tokens of each
        self._rows: Tensor | None = None  # of the tokens, among all rows, as groups have them
        self._samples: Tensor | None = None  # where each is in the groups
        if mask is not None:
            self._group(mask)

    def _group(self, mask: Tensor) -> None:
        rows = mask.flatten().nonzero().flatten()
        if self.per == "sample":
            counts = mask.sum(1)
            order = counts.argsort(stable=True)
            self._samples = order.argsort()
            sizes = counts[order].unique_consecutive(return_counts=True)
            self._groups = [(count, tokens) for tokens, count in zip(*(one.tolist() for one in sizes), strict=True)]
            rows = rows[self._samples[rows // mask.shape[1]].argsort(stable=True)]
        self._rows = rows

    def split(self, block: str, x0: Tensor, x1: Tensor, r: Tensor | None) -> list[States]:
        """The states of a block and its residue, ``(B, T, *D)``, as those of groups.

        Args:
            block: its name.
            x0, x1, r: states and residue.

        Returns:
            Those of samples, ``(G, n, *D)``, or of all tokens, ``(N, D)``.

        Raises:
            ValueError: states that are not of these tokens.
        """
        befores, afters = self._split(block, x0), self._split(block, x1)
        residues = [None] * len(befores) if r is None else self._split(block, r)
        return [*zip(befores, afters, residues, strict=True)]

    def _split(self, block: str, x: Tensor) -> Sequence[Tensor]:
        fits = x.ndim == 3 or (x.ndim > 3 and self.per == "sample")
        if self.shape is None and fits:
            self.shape = tuple(x.shape[:2])
        if not fits or tuple(x.shape[:2]) != self.shape:
            raise self._other(block, x)
        x = x.flatten(0, 1)
        if self._rows is not None:
            if self._rows.device != x.device:
                self._rows = self._rows.to(x.device)
            x = x.index_select(0, self._rows)
        if self.per == "token":
            return [x]
        parts = x.split([samples * tokens for samples, tokens in self._groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self._groups, strict=True)]

    def _other(self, block: str, x: Tensor) -> ValueError:
        tokens = "(B, T)" if self.shape is None else str(self.shape)
        if self.mask is not None:
            return ValueError(
                f"block {block!r} has states of shape {tuple(x.shape)}, and the mask is of {tokens} tokens: {MAKE}, "
                f"and {OFF}"
            )
        return ValueError(
            f"block {block!r} has states of shape {tuple(x.shape)}, which are not {tokens} tokens (B, T, D): "
            'adapt(model, per="sample") measures samples'
        )

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The ``values`` of a measure of each group as one, ``(B,)`` or ``(N,)``."""
        if self._samples is None:
            return values[0]
        joined = torch.cat([*values])
        if self._samples.device != joined.device:
            self._samples = self._samples.to(joined.device)
        return joined.index_select(0, self._samples)

    def positions(self) -> Tensor | None:
        """Sample and position of each row of the measures, ``(N, 2)``, on the CPU; None where they are of samples."""
        if self.per == "sample" or self.shape is None:
            return None
        samples, length = self.shape
        rows = torch.arange(samples * length) if self._rows is None else self._rows.cpu()
        return torch.stack([rows // length, rows % length], 1)
