"""Flows whose steps can be undone: a network whose memory does not grow with its depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from odenets.blocks import Block, FieldSource, StageFields, take_step
from odenets.flow import Flow
from solvers import ButcherTableau, Reversible, Step, combine
from solvers.gradients.captured import Captured
from solvers.gradients.pair import Move, sizes
from solvers.gradients.reversible import Increment, Taken, check_precision, reversed_states

__all__ = ["ReversibleFlow"]


class ReversibleFlow(Flow):
    """A :class:`~odenets.Flow` of reversible steps, trained in the memory of two states, whatever its depth.

    ``y1 = c y + (1 - c) z + h r(t, z, h)`` and ``z1 = z + h r(t + h, y1, -h)`` for each block, with r the residue
    of its own step and y = z = x at the start; the output is y. Any explicit method takes part, at two of its steps a
    block. The backward pass computes the states from the last ones; what does not lead back to x raises.
    Reference: McCallum, Foster, arXiv:2410.11648, see :class:`solvers.Reversible`.

    Schemes whose steps can be undone as they are, as RevNet's, are solvers of a flow: :mod:`odenets.schemes`.

    It is another discretization than a flow with the same weights, of the same order: at ten Euler blocks gradients
    differ by 0.1 % as they are drawn, and by some 3 % with larger weights. The difference of y and z grows by
    ``c exp(h r)`` a block where blocks contract at a rate r. Nothing is wrong then with the network and its gradient,
    but its output is no longer near that of the flow, nor of an ODE: a backward pass warns, once, where y - z is larger
    than the states of a sample.

    ``forward``, ``steps`` and ``record`` are one function; what measures steps keeps them for its gradient, a plain
    call keeps none. Fields draw no random numbers, as dropout does in training mode.

    Args:
        field, solver, depth, h, total_time, stage_fields, shared: as in a flow.
        coupling: c in (0, 1]; rounding grows by 1 / c a block on the way back.

    Raises:
        ValueError, TypeError: as a flow; an implicit method, chained fields, or a coupling outside (0, 1].

    >>> import torch
    >>> import odenets
    >>> flow = odenets.ReversibleFlow(odenets.MLPField(4), solver="euler", depth=50)
    >>> x = torch.randn(8, 4)
    >>> flow(x).sum().backward()
    >>> flow.evaluations
    100
    """

    def __init__(
        self, field: FieldSource | tuple[Block, ...] | None = None, *, coupling: float = 0.999,
        solver: str | ButcherTableau = "bs23", depth: int = 1, h: float | Sequence[float] | None = None,
        total_time: float | None = None, stage_fields: StageFields = "tied", shared: bool = False, **unknown: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            field, solver=solver, depth=depth, h=h, total_time=total_time, stage_fields=stage_fields, shared=shared,
            **unknown,
        )  # fmt: skip
        self.coupling, self._said_apart = Reversible(coupling).coupling, False
        if not self.tableau.explicit:
            raise ValueError(f"solver must be an explicit method, whose steps can be undone, got {self.tableau.name}")
        if self.stage_fields == "chained":
            raise ValueError("stage_fields must be 'tied' or 'untied': a chained field is not undone with its block")

    def evaluations_per_pass(self, *, closing: bool = False, readout: str = "solution") -> int:
        """Field evaluations of one pass, two steps a block.

        Args:
            closing: whether all blocks take their closing stages, as for a measure of the error.
            readout: "solution", or "ensemble", for which the last block takes them.

        Returns:
            The number.
        """
        back = self.depth * self.tableau.interior
        last = self.tableau.stages if closing or readout == "ensemble" else self.tableau.interior
        each = self.tableau.stages if closing else self.tableau.interior
        return back + (self.depth - 1) * each + last

    @property
    def passes_on(self) -> bool:
        """Never, for the next step's first stage is at another state."""
        return False

    @property
    def one_step(self) -> bool:
        """Never, for a step reads both states."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """Those of a flow, and the coupling."""
        return {**super().settings, "coupling": self.coupling}

    def _steps(
        self, x: Tensor, args: Sequence[Any], closing: bool, reductions: Collection[str] = (), ensemble: bool = False
    ) -> Iterator[Step]:
        self.materialize(x)
        if self.training and not torch.compiler.is_compiling():
            self._warn_once()
        t, y, z, blocks, coupling = self.start, x, x, self._blocks(), cast(float, self.coupling)
        closing = closing or self.takes_closing
        for m, h in enumerate(self.h):
            closes = closing or (ensemble and m == len(blocks) - 1)
            fields = self._velocities(blocks, m, self.tableau, closes, args)
            inner = take_step(blocks[m], args, fields, t, z, h, self.tableau, closing=closes)
            start = y + (1 - coupling) * (z - y)
            y = combine(start, inner.stages, self.tableau.b, h)
            yield inner._replace(x0=start, x1=y)
            if m + 1 < len(blocks):
                back = take_step(blocks[m], args, fields, t + h, y, -h, self.tableau, closing=False)
                z = combine(z, back.stages, self.tableau.b, h)
            t += h

    def _end_state(self, x: Tensor, args: Sequence[Any]) -> Tensor | None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        check_precision(x, "ReversibleFlow")
        self.materialize(x)
        if self.training:
            self._warn_once()
        captured = Captured(self._residue, None, args, names=("flow", "args", "odenets.Flow"))
        times = [self.start + math.fsum(self.h[:m]) for m in range(self.depth)]
        moves = [Move(t, h, None) for t, h in zip(times, self.h, strict=True)]

        def increments(m: int) -> Increment:
            return lambda t, x, h: captured(t, x, m, h, *args) * h

        y, z, size, coupling = x.detach(), x.detach(), sizes(x), cast(float, self.coupling)
        with captured.forward(x.device), torch.no_grad():
            for m, (t, h, _) in enumerate(moves):
                increment = increments(m)
                captured.anew()  # each block reads weights, and may draw numbers, of its own
                y = y + (1 - coupling) * (z - y) + increment(t, z, h)
                z = z - increment(t + h, y, -h)
                size = torch.maximum(size, sizes(y))
        taken = Taken(captured, increments, moves, coupling, size, "ReversibleFlow", self._warn_apart)
        return reversed_states(taken, x, y.unsqueeze(0), z, [self.depth])[0]

    def _warn_apart(self) -> None:
        if not self._said_apart:
            warnings.warn(
                "the two states of a ReversibleFlow end further apart than they are large: its blocks contract, and "
                "its output is no longer near that of a Flow. Take a smaller coupling, a smaller h, or odenets.Flow",
                stacklevel=2,
            )
        self._said_apart = True

    def extra_repr(self) -> str:
        """Those of a flow, and the coupling."""
        return f"{super().extra_repr()}, coupling={self.coupling}"

    def _residue(self, t: float, x: Tensor, m: int, h: float, *args: Any) -> Tensor:
        blocks = self._blocks()
        fields = self._velocities(blocks, m, self.tableau, False, args)
        return take_step(blocks[m], args, fields, t, x, h, self.tableau, closing=False).residue
