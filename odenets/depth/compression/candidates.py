"""Candidates: what may take the place of a run of blocks, and networks with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from odenets.depth.compression.replacements import pass_on, standing_for
from odenets.depth.compression.units import Unit

__all__ = ["CHOICES", "Candidate", "applied", "put", "replaced", "replacing"]

CHOICES = ("remove", "merge", "fit", "seam")
"""What may become of a run of blocks."""


@dataclass(frozen=True)
class Candidate:
    """What takes the place of a run of blocks.

    Attributes:
        start, stop: the run, positions of units.
        choice: "remove"; "merge", one block with the time of all; "fit", one with its last linear map fitted; or
            "seam 1x1", "seam 3x3", one linear map.
        kept: the position of the block that stays; None where none does.
        module: what stands for the block that stays, or the linear map in the place of the first; None for nothing.
        error: mean square error of the state at the end of the run over the mean square of the state, before a ReLU; on
            data that was held out.
        saved: multiplications of the run that it does not take, of a sample.
        added: multiplications of a linear map, of a sample.
        divergence: of the outputs, with this candidate alone.
    """

    start: int
    stop: int
    choice: str
    kept: int | None = None
    module: nn.Module | None = field(default=None, compare=False, repr=False)
    error: float = float("nan")
    saved: int = 0
    added: int = 0
    divergence: float = float("nan")

    @property
    def gone(self) -> int:
        """How many blocks go."""
        return self.stop - self.start - (self.kept is not None)

    @property
    def positions_gone(self) -> list[int]:
        """The positions of the blocks that go."""
        return [m for m in range(self.start, self.stop) if m != self.kept]

    @property
    def place(self) -> int:
        """The position at which something stands for the run, if anything does."""
        return self.start if self.kept is None else self.kept


def applied(model: nn.Module, units: Sequence[Unit], candidates: Iterable[Candidate]) -> nn.Module:
    """A copy of a ``model`` with ``candidates`` in the places of their runs; what blocks share, they share in it."""
    with replaced(model, units, candidates):
        return copy.deepcopy(model)


@contextmanager
def replaced(model: nn.Module, units: Sequence[Unit], candidates: Iterable[Candidate]) -> Iterator[None]:
    """The ``model`` itself with ``candidates`` in the places of their runs, for a while."""
    with replacing(model, (pair for candidate in candidates for pair in _replacements(units, candidate))):
        yield


def put(model: nn.Module, name: str, new: nn.Module) -> list[str]:
    """Put a ``new`` module in the place of one of a ``model``, at all of its names, which are returned."""
    old = model.get_submodule(name)
    names = [other for other, one in model.named_modules(remove_duplicate=False) if one is old]
    for other in names:
        model.set_submodule(other, new)
    return names


@contextmanager
def replacing(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """The ``model`` itself with others in the places of some of its ``modules``, at all names of each, for a while."""
    before: list[tuple[str, nn.Module]] = []
    try:
        for name, new in modules:
            old = model.get_submodule(name)
            before += [(other, old) for other in put(model, name, new)]
        yield
    finally:
        for name, old in before:
            model.set_submodule(name, old)


def _replacements(units: Sequence[Unit], candidate: Candidate) -> Iterator[tuple[str, nn.Module]]:
    """What stands at the name of each unit of a candidate's run, where that changes."""
    for m in range(candidate.start, candidate.stop):
        unit, new = units[m], candidate.module
        if m != candidate.place or new is None:
            new = pass_on(unit)
        elif candidate.kept is None:
            new = standing_for(unit, new)
        yield unit.name, new.eval()
