"""Calibration data: batches of inputs, some of which are held out from every fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from odenets.adapting.masking import MASKS
from odenets.depth.compression.positions import tokens_in, unread_masks
from odenets.inputs import inputs_of, rows, samples_in
from odenets.modes import inputs_for

__all__ = ["Batches", "batches_of"]

HELD_OUT = 0.2
"""Share of the samples that is held out."""


@dataclass(frozen=True)
class Batches:
    """Inputs to fit on, and others to choose on.

    Attributes:
        inputs: of each batch.
        samples: how many each holds.
        held_out: whether each is held out.
    """

    inputs: tuple[Any, ...]
    samples: tuple[int, ...]
    held_out: tuple[bool, ...]

    def tokens(self, batch: int) -> Tensor | None:
        """Where a batch of texts has tokens and no padding, ``(B, T)``; None where there is none."""
        return tokens_in(self.inputs[batch])

    def first(self, samples: int) -> Batches:
        """The first of both kinds, so many ``samples`` in all, :data:`HELD_OUT` of them held out."""
        held = max(1, round(HELD_OUT * samples))
        return self._taken({True: held, False: samples - held})

    def _taken(self, left: dict[bool, int]) -> Batches:
        """The first so many samples of those held out and of the others."""
        chosen: list[tuple[Any, int, bool]] = []
        for inputs, n, held in zip(self.inputs, self.samples, self.held_out, strict=True):
            taken = min(n, left[held])
            if taken:
                chosen.append((inputs if taken == n else rows(inputs, slice(None, taken), n), taken, held))
                left[held] -= taken
        return Batches(*zip(*chosen, strict=True))

    def on_which_to_choose(self, samples: int | None = None) -> Batches:
        """Those that are held out, the first so many ``samples`` of them."""
        held = [one for one in zip(self.inputs, self.samples, self.held_out, strict=True) if one[-1]]
        return Batches(*zip(*held, strict=True))._taken({True: sum(self.samples) if samples is None else samples})


def batches_of(calibration: Iterable[Any], network: nn.Module, held_out: Iterable[Any] | None = None) -> Batches:
    """The inputs of the batches, on the device and in the precision of the network.

    Args:
        calibration: batches of inputs, or of pairs of inputs and labels, which are not read. Inputs are a tensor, a
            tuple of tensors in a pair, or a mapping.
        network: what takes them.
        held_out: the same of samples that are held out; some of the calibration's if not given.

    Raises:
        TypeError: one tensor, or what holds no inputs, or pairs of tokens and masks.
        ValueError: no batch, fewer than two samples, or padding that is told otherwise than by a mask ``(B, T)``.

    Warns:
        UserWarning: a mask of another name than those that tell padding.
    """
    inputs, samples = _read(calibration, "calibration", network)
    apart = None if held_out is None else _read(held_out, "held_out", network)
    if names := unread_masks(inputs[0] if inputs else None):
        warnings.warn(
            f"calibration holds {names[0]!r}, which is not read as a mask of padding: all tokens count; it is read "
            f"under one of the names {', '.join(MASKS)}",
            stacklevel=4,
        )
    if apart is not None and samples and apart[1]:
        fitted = [(one, n, False) for one, n in zip(inputs, samples, strict=True)]
        return Batches(*zip(*fitted, *((one, n, True) for one, n in zip(*apart, strict=True)), strict=True))
    if apart is not None:
        raise ValueError(f"calibration and held_out must both hold samples, got {sum(samples)} and {sum(apart[1])}")
    if sum(samples) < 2:
        raise ValueError(
            f"calibration must hold at least two samples, one to fit on and one to choose on, got {sum(samples)}: some "
            "hundred are usual"
        )
    parts: list[tuple[Any, int, bool]] = []
    total = held = 0
    for one, n in zip(inputs, samples, strict=True):
        total += n
        out = min(n, max(0, round(HELD_OUT * total) - held))
        if total == sum(samples) and held + out == 0:
            out = 1
        held += out
        if out < n:
            parts.append((rows(one, _others(n, out), n) if out else one, n - out, False))
        if out:
            parts.append((rows(one, _spread(n, out), n) if out < n else one, out, True))
    return Batches(*zip(*parts, strict=True))


def _read(batches: Iterable[Any], name: str, network: nn.Module) -> tuple[list[Any], list[int]]:
    """The inputs of the batches in the argument of a ``name``, and how many samples each holds; none that is empty."""
    inputs = [inputs_for(network, one) for one in inputs_of(batches, name, network)]
    samples = [samples_in(one, f"the batches in {name}") for one in inputs]
    for one in inputs:
        tokens_in(one)  # raises where padding is told otherwise
    return [one for one, n in zip(inputs, samples, strict=True) if n], [n for n in samples if n]


def _spread(n: int, out: int) -> list[int]:
    """The positions of some of n samples, spread evenly, for they may come in the order of their classes."""
    return [(2 * k + 1) * n // (2 * out) for k in range(out)]


def _others(n: int, out: int) -> list[int]:
    """The positions of the rest."""
    return sorted({*range(n)} - {*_spread(n, out)})
