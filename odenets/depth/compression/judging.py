"""Judging: what the outputs of a network lose by each candidate alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odenets.depth.compression.calls import Calls
from odenets.depth.compression.candidates import Candidate, replaced, replacing
from odenets.depth.compression.divergence import Outputs
from odenets.depth.compression.replacements import pass_on, standing_for

__all__ = ["judged"]


class _Given(nn.Module):
    """Returns a state that is known, whatever it takes."""

    state: Tensor

    def forward(self, *_: Any) -> Tensor:
        return self.state.clone()


@torch.no_grad()
def judged(
    calls: Calls, line: Sequence[int], found: Sequence[Candidate], outputs: Outputs, progress: Callable[[int], object]
) -> Iterator[Candidate | tuple[Candidate, str]]:
    """Each candidate of a line with its divergence; with an error in its place where the network does not run.

    The states at which runs begin are computed once, and the blocks before them are not run again.

    Args:
        calls: of the network, on the data on which it is judged.
        line: the positions of its units.
        found: its candidates.
        outputs: of the network.
        progress: called with the number of candidates that are done.
    """
    by_start: dict[int, list[Candidate]] = {}
    for one in found:
        by_start.setdefault(one.start, []).append(one)
    adds = calls.units[line[0]].adds
    states = [] if adds else [calls.entry(b, line[0]) for b in range(len(outputs.inputs))]
    for at, m in enumerate(line):
        before = line[:at] if _go_unread(calls, line[:at], states, outputs) else []
        for one in by_start.get(m, ()):
            try:
                yield replace(one, divergence=_divergence(calls, [one], before, states, outputs))
            except AttributeError as error:  # of a model that reads attributes of its blocks
                yield one, str(error)
            progress(1)
        if not adds:
            states = [calls.passage(b, m, x).x1 for b, x in enumerate(states)]


def _go_unread(calls: Calls, before: Sequence[int], states: Sequence[Tensor], outputs: Outputs) -> bool:
    """Whether a network whose last block ``before`` gives the ``states`` reads nothing else of those before.

    As it would for a long skip, or with heads at several depths.
    """
    if not before:
        return True
    try:
        return _divergence(calls, [], before, states[:1], outputs.only(1)) < 1e-9
    except AttributeError:
        return False


def _divergence(
    calls: Calls, runs: Sequence[Candidate], before: Sequence[int], states: Sequence[Tensor], outputs: Outputs
) -> float:
    """That with candidates, where the blocks ``before`` them are not run, but give their ``states``."""
    given = _Given()

    def give(batch: int) -> None:
        given.state = states[batch]

    with _begun(calls, before, given), replaced(calls.model, calls.units, runs):
        return outputs.divergence(calls.model, give if before else None)


@contextmanager
def _begun(calls: Calls, before: Sequence[int], given: nn.Module) -> Iterator[None]:
    """Without the blocks ``before``, the last of which returns what is ``given``."""
    units = calls.units
    last = before[-1] if before else None
    modules = ((units[m].name, standing_for(units[m], given) if m == last else pass_on(units[m])) for m in before)
    with replacing(calls.model, modules):
        yield
