"""Tokens: the rows of states that are measured, as steps of samples without their padding, or of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from solvers.reductions import mean_square

__all__ = ["MAKE", "OFF", "Per", "Tokens", "euler_reductions"]

Per = Literal["sample", "token"]
"""What a row of measures is of."""

Reductions = dict[str, Tensor]
"""What measures of a step share, by name."""

States = tuple[Tensor, Tensor, Tensor | None, Reductions | None]
"""A step's x0 and x1, its residue where that is no difference of them, and its reductions where they are known."""

MAKE = "a function makes a mask (B, T) that is True of tokens, adapt(model, mask=lambda inputs: ...)"
OFF = "mask=None measures padding too"


def euler_reductions(square: Tensor, cosine: Tensor) -> Reductions:
    """The reductions of an Euler step with h = 1, whose action is the mean ``square`` of its residue.

    >>> sorted(euler_reductions(torch.ones(2), torch.zeros(2)))
    ['action', 'cosine', 'residue']
    """
    return {"action": square, "residue": square, "cosine": cosine}


class Tokens:
    """The tokens of a batch that are measured: steps of its samples, or of its tokens, come from them.

    Samples of as many tokens are measured together, each as it is without its padding, so that any measure is right.

    Args:
        mask: ``(B, T)``, True where there is a token; None where nothing is padded.
        per: what a row of measures is of.

    >>> tokens = Tokens(torch.tensor([[True, True, False], [True, True, True]]), "sample")
    >>> x = torch.arange(6.0).reshape(2, 3, 1)
    >>> [x0.flatten(1).tolist() for x0, *_ in tokens.split("block", x, x, None)]
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

    def split(self, block: str, x0: Tensor, x1: Tensor, r: Tensor | None, *, reduced: bool = False) -> list[States]:
        """The states of a block and its residue, ``(B, T, *D)``, as those of groups.

        Args:
            block: its name.
            x0, x1, r: states and residue.
            reduced: whether the reductions are computed that measures share.

        Returns:
            Those of samples, ``(G, n, *D)``, or of all tokens, ``(N, D)``, and their reductions.

        Raises:
            ValueError: states that are not of these tokens.
        """
        rows = [None if x is None else self._picked(block, x) for x in (x0, x1, r)]
        groups = [[None] * max(len(self._groups), 1) if x is None else self._grouped(x) for x in rows]
        reductions: Sequence[Reductions | None] = [None] * len(groups[0])
        if reduced and self._groups:
            reductions = self._reductions(rows[1] - rows[0] if rows[2] is None else rows[2])  # type: ignore[operator]
        return [*zip(*groups, reductions, strict=True)]  # type: ignore[arg-type]  # x0 and x1 are given

    def _picked(self, block: str, x: Tensor) -> Tensor:
        """The rows of a state that are of tokens, ``(N, *D)``, as groups have them."""
        fits = x.ndim == 3 or (x.ndim > 3 and self.per == "sample")
        if self.shape is None and fits:
            self.shape = tuple(x.shape[:2])
        if not fits or tuple(x.shape[:2]) != self.shape:
            raise self._other(block, x)
        x = x.flatten(0, 1)
        if self._rows is None:
            return x
        if self._rows.device != x.device:
            self._rows = self._rows.to(x.device)
        return x.index_select(0, self._rows)

    def _grouped(self, rows: Tensor) -> list[Tensor]:
        if self.per == "token":
            return [rows]
        parts = rows.split([samples * tokens for samples, tokens in self._groups])
        return [part.unflatten(0, group) for part, group in zip(parts, self._groups, strict=True)]

    def _reductions(self, r: Tensor) -> list[Reductions]:
        """Those of the samples of each group, of the residues of all tokens at once, for groups may be many."""
        counts = torch.tensor([tokens for samples, tokens in self._groups for _ in range(samples)], device=r.device)
        of = torch.arange(len(counts), device=r.device).repeat_interleave(counts, output_size=len(r))
        square = mean_square(r)
        mean = r.flatten(1).mean(1, dtype=square.dtype)
        square, mean = (x.new_zeros(len(counts)).index_add(0, of, x) / counts for x in (square, mean))
        rest = square == 0
        cosine = torch.where(rest, 0, mean) / torch.where(rest, 1, square).sqrt()
        sizes = [samples for samples, _ in self._groups]
        pairs = zip(square.split(sizes), cosine.split(sizes), strict=True)
        return [euler_reductions(*pair) for pair in pairs]

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
