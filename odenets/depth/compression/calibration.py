"""Calibration data: batches of inputs, some of which are held out from every fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from odenets.inputs import kind_of, plain, rows, samples_in
from odenets.modes import inputs_for

__all__ = ["Batches", "batches_of", "inputs_in"]

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

    def first(self, samples: int) -> Batches:
        """The first batches of both kinds until they hold so many ``samples``, ``HELD_OUT`` of them held out."""
        chosen, totals = [], {True: 0, False: 0}
        wanted = {True: HELD_OUT * samples, False: (1 - HELD_OUT) * samples}
        for m, held in enumerate(self.held_out):
            if totals[held] < wanted[held]:
                chosen.append(m)
                totals[held] += self.samples[m]
        return self.only(chosen)

    def only(self, chosen: Iterable[int]) -> Batches:
        """The batches at some positions."""
        chosen = [*chosen]
        inputs, samples = (tuple(part[m] for m in chosen) for part in (self.inputs, self.samples))
        return Batches(inputs, samples, tuple(self.held_out[m] for m in chosen))


def batches_of(calibration: Iterable[Any], network: nn.Module) -> Batches:
    """The inputs of the batches, on the device and in the precision of the network.

    Args:
        calibration: batches of inputs, or of pairs of inputs and labels, which are not read. Inputs are a tensor, a
            tuple of tensors in a pair, or a mapping.
        network: what takes them.

    Raises:
        TypeError: one tensor, or what holds no inputs.
        ValueError: fewer than two samples.
    """
    if isinstance(calibration, Tensor | Mapping | nn.Module):
        raise TypeError(
            f"calibration must hold batches of inputs, got {kind_of(calibration)}: a DataLoader, or [x] for one batch"
        )
    inputs = [inputs_for(network, inputs_in(batch, "calibration")) for batch in calibration]
    samples = [samples_in(one, "the calibration") for one in inputs]
    if sum(samples) < 2:
        raise ValueError(
            f"calibration must hold at least two samples, one to fit on and one to choose on, got {sum(samples)}: some "
            "hundred are usual"
        )
    if len(inputs) == 1:
        (one,), (n,) = inputs, samples
        border = n - max(1, round(HELD_OUT * n))
        inputs = [rows(one, slice(None, border), n), rows(one, slice(border, None), n)]
        return Batches(tuple(inputs), (border, n - border), (False, True))
    every = max(2, round(1 / HELD_OUT)) if len(inputs) >= round(1 / HELD_OUT) else len(inputs)
    return Batches(tuple(inputs), tuple(samples), tuple(m % every == every - 1 for m in range(len(inputs))))


def inputs_in(batch: Any, name: str) -> Any:
    """The inputs of a ``batch``, without its labels; ``name`` is that of the argument that holds it.

    Raises:
        TypeError: it is neither inputs nor a pair.
    """
    if isinstance(batch, list | tuple):
        if not 1 <= len(batch) <= 2:
            raise TypeError(
                f"{name} must hold inputs or pairs (inputs, labels), got a {kind_of(batch)}: several inputs of "
                "one batch are ((x, c), labels), or a mapping"
            )
        batch = batch[0]
    if not isinstance(batch, Tensor | Mapping | list | tuple):
        raise TypeError(f"{name} must hold inputs, tensors (B, *S), got {kind_of(batch)}")
    return plain(batch)
