"""Flow: a network that is an explicit integrator over learned velocity fields."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from odenets.block_sequence import BlockSequence
from odenets.blocks import Block, check_arguments, take_step, uses_of
from odenets.coarsening import at_depth
from odenets.measures import StepFunction, needs_closing, reductions_of
from odenets.measures.marking import check_named
from odenets.normalization import check_closing_statistics
from odenets.normalization.mixing import refuse_statistics, warn_of_mixed_statistics
from odenets.observing import observed, observed_steps
from odenets.recording import Records, measure_steps
from odenets.schemes.reversible import ReversibleScheme
from odenets.schemes.scheme import Memory, Scheme, Velocity
from odenets.schemes.undoing import check_memory, end_state, first_state, undoes
from solvers import ButcherTableau, Step
from solvers.coefficients import as_numbers_or_tensors
from solvers.field_calls import check_unchanged, velocity, versions_of
from solvers.validation import check_state

__all__ = ["Flow", "check_readout"]


class Flow(BlockSequence):
    """The flow of an ODE as a residual network: steps that move a state, no normalizing flow and no flow matching.

    Blocks keep one dimension, ``x_{m+1} = x_m + h_m r_m(x_m)``, each a Runge-Kutta step with weights of its own.

    ``Flow(solver="bs23")`` alone works: like torch's lazy modules it makes its field from the first input, an MLP for
    ``(B, D)``, a convolutional one for ``(B, C, H, W)``. An optimizer may be built before, and then holds more
    parameters, some of which stay empty: to resume with its state, build it at the same moment, before the first input
    or after. To tell parameters apart, as by ``p.ndim``, call the network once.

    Args:
        field: a velocity field ``v(t, x)``, copied and drawn anew for every further use, or a callable that makes one
            each time; what it returns twice is shared. Where a :class:`~odenets.normalization.StageBatchNorm` in it
            lacks statistics of all stages, the flow takes a copy that shares its parameters and has them.
        solver: name of a method, a tableau, a scheme of :mod:`odenets.schemes` or its name, or a
            :class:`~solvers.LearnedTableau`, which all blocks share and which trains with them; ``"euler"`` with h = 1
            is a residual network.
        depth: number of blocks.
        h: step size of every block, or one per block; ``total_time / depth`` if not given.
        total_time: the sum of all h; 1 if neither is given.
        stage_fields: "tied", one field per block for all its stages; "untied", a field per stage [K24, eq. 43], where
            the closing field learns only if the method carries on an output that reads it,
            ``get_tableau("bs23").forwarding("order2")``; "chained", where the closing stage of an FSAL method uses the
            first field of the next block. Only tied blocks have the method's order: see :meth:`solvers.Step.error`.
        shared: one block, used ``depth`` times.

    Raises:
        ValueError: arguments that are out of range or exclude each other.
        TypeError: a field that takes no t, or ``tolerance``, which is one of :class:`~odenets.NeuralODE`: one field
            integrated with steps that its error chooses.

    >>> import torch
    >>> flow = Flow(solver="bs23", depth=3)
    >>> flow(torch.randn(5, 2)).shape, flow.h
    (torch.Size([5, 2]), (0.3333333333333333, 0.3333333333333333, 0.3333333333333333))
    """

    at_depth = at_depth
    coupling: float | None = None  # of the pair of states that a ReversibleFlow takes on
    _own_weights_alone: Sequence[int] = ()  # the blocks, where a pass with gradients has seen them read nothing else

    @observed_steps
    def steps(self, x: Tensor, *args: Any, closing: bool = True, check: bool = True) -> Iterator[Step]:
        """Every step from ``x`` to the total time, each still as it was when the next one has been taken.

        Args:
            x: state at time 0, ``(B, *S)``, floating and finite.
            args: what the fields take besides, ``v(t, x, *args)``.
            closing: whether each step carries the closing stage of an FSAL method.
            check: False does not look at x, so that a network that diverges can be measured.

        Yields:
            The steps, from the first block's to the last's.

        Raises:
            TypeError, ValueError: x is no such state, or a field writes into what it returned in the step before.
        """
        if check:
            check_state(x)
        stages, versions = (), None
        for step in self._steps(x, args, closing):
            check_unchanged(stages, versions)
            stages, versions = step.stages, versions_of(step.stages)
            yield step

    def _blocks(self) -> list[Block]:
        """The block of each step."""
        return [cast(Block, block) for block in self.blocks] * (self.depth if self.shared else 1)

    def _steps(
        self, x: Tensor, args: Sequence[Any], closing: bool, reductions: Collection[str] = (), ensemble: bool = False
    ) -> Iterator[Step]:
        """The steps; with ``ensemble`` the last one carries its closing stages in any case."""
        x, first = self._entered(x)
        self.materialize(x)
        if self.training and not torch.compiler.is_compiling():
            self._warn_once()
        if self.training and (self.tableau.implicit or getattr(self.tableau, "iterates", False)):
            refuse_statistics(self, self.tableau.name)
        t, blocks = self.start, self._blocks()
        closing = closing or self.takes_closing
        tableau: Any = as_numbers_or_tensors(self.tableau, x)
        passes_on = closing and tableau.fsal and self.passes_on
        for m, h in enumerate(self.h):
            closes = closing or (ensemble and m == len(blocks) - 1)
            fields: Any = self._velocities(blocks, m, self.tableau, closes, args)
            if self.tableau.implicit and self.stage_fields == "tied":  # of which one Jacobian serves all stages
                fields = fields[0]
            begin = t, x, h, tableau, first
            yield (step := take_step(blocks[m], args, fields, *begin, closing=closes, reductions=reductions))
            t, x = t + h, step.x1
            first = step.stages[-1] if passes_on else None if self.one_step else tableau.hands_on(step)

    def _entered(self, x: Tensor) -> tuple[Tensor, Any]:
        """The first state, and the memory of the step before where a part has got it behind the state."""
        if self.before is None:
            return x, None
        x, value = x.chunk(2, 1)
        return x, Memory(value, self.before)

    def _left(self, last: Step) -> Tensor:
        """The last state, and behind it the memory of the last step where another part is to have it."""
        memory = cast(Scheme, self.tableau).hands_on(last) if self.passes_memory else None
        if memory is None:
            return last.x1
        if memory.value.shape != last.x1.shape:
            raise ValueError(
                f"{self.tableau.name} must hand on a value of the shape of the state, {tuple(last.x1.shape)}, to be "
                f"cut into parts, got {tuple(memory.value.shape)}"
            )
        return torch.cat([last.x1, memory.value], 1)

    def _end_state(self, x: Tensor, args: Sequence[Any]) -> Tensor | None:
        """The state at the total time where it is not that of the last of the steps as they are taken."""
        scheme: Any = self.tableau
        if not undoes(scheme):
            return None
        if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # states are undone in float32; autocast has the fields in its own dtype
        x, memory = self._entered(x)
        self.materialize(x)
        if self.training:
            self._warn_once()
        blocks = [*map(id, self.blocks)]
        steps = scheme, self._velocity, self.start, self.h, x, memory, args
        x1, value, other = end_state(*steps, watch=self._own_weights_alone != blocks)
        self._own_weights_alone = [] if other else blocks
        return torch.cat([x1, cast(Tensor, value)], 1) if self.passes_memory else x1

    def _velocity(self, t: float, x: Tensor, m: int, call: int, *args: Any) -> Tensor:
        """One velocity of block m of a scheme."""
        block = cast(Block, self.blocks[0 if self.shared else m])
        try:
            return velocity(block.velocities(self.tableau, "tied", args=args)[call], t, x, call)
        except TypeError:
            check_arguments(block.fields[0], args)
            raise

    def inverse(self, x1: Tensor, /, *args: Any, memory: Tensor | None = None, check: bool = True) -> Tensor:
        """The state at time 0 that leads to a state at the total time, ``(B, *S)``, of a reversible scheme.

        Args:
            x1: that state, ``(B, *S)``; of a part that hands its memory on, as it returns it.
            args: what the fields take besides, as in the forward pass.
            memory: of a scheme with a velocity beside the state, the residue of the last step, ``(B, *S)``.
            check: as in :meth:`steps`.

        Returns:
            The state, up to rounding; of a part to which a memory is handed, with it, as it takes it.

        Raises:
            ValueError: the solver is no :class:`~odenets.schemes.ReversibleScheme`, the memory is missing or not of the
                shape of the state, or not one of the scheme; normalizations that would count the batch, random
                numbers, or an inverse that has few digits left.
            TypeError: half precision.

        >>> import odenets
        >>> flow, x = odenets.Flow(solver="revnet", depth=5), torch.randn(3, 4)
        >>> torch.allclose(flow.inverse(flow(x)), x, atol=1e-5)
        True
        """
        scheme: Any = self.tableau
        if not isinstance(scheme, ReversibleScheme):
            raise ValueError(
                f"solver must be a scheme whose steps can be undone, got {scheme.name}: 'revnet', 'hamiltonian', "
                "'two_step_midpoint', 'second_order', 'momentum', 'heavy_ball'"
            )
        if check:
            check_state(x1)
        if self.training:
            refuse_statistics(self, "the inverse", "calls its fields once more")
        if self.passes_memory:
            x1, memory = x1.chunk(2, 1)
        check_memory(scheme, x1, memory)
        self.materialize(x1)
        x, value = first_state(scheme, self._velocity, self.start, self.h, x1, memory, self.before, args)
        return x if self.before is None else torch.cat([x, cast(Tensor, value)], 1)

    def _warn_once(self) -> None:
        if not self.warned and self.stage_fields == "tied" and (uses := max(uses_of(self.tableau))) > 1:
            warn_of_mixed_statistics(
                self,
                f"all {uses} stages of {self.tableau.name} evaluate",
                "Take odenets.normalization.StageBatchNorm(features), which has statistics for each stage, or "
                "nn.GroupNorm, which has none; make_norm makes both",
                by_stage=True,
            )
        self.warned = True

    def _velocities(
        self, blocks: list[Block], m: int, method: ButcherTableau, closing: bool, args: Sequence[Any]
    ) -> list[Velocity]:
        """The fields of block m at the stages of a method; refuses those of closing stages without statistics."""
        block, following = blocks[m], blocks[m + 1] if m + 1 < len(blocks) else None
        if self.stage_fields == "untied" and (closing or method.interior > self.tableau.interior):
            check_closing_statistics(block.fields, self.tableau.interior, m)
        return block.velocities(method, self.stage_fields, following, args)

    def forward(self, x: Tensor, /, *args: Any, readout: str = "solution") -> Tensor:
        """The state at the total time, ``(B, *S)``, that of :meth:`record`, with the arguments of it.

        Args:
            x: state at time 0, ``(B, *S)``, floating and finite.
            args: what the fields take besides, ``v(t, x, *args)``.
            readout: "solution", or "ensemble" for the average of the last step's embedded outputs.

        Returns:
            The state, ``(B, *S)``.

        Raises:
            TypeError, ValueError: as :meth:`record`.
        """
        return self.record(x, *args, readout=readout)[0]

    @observed
    def record(
        self, x: Tensor, /, *args: Any, readout: str = "solution", check: bool = True, **measures: StepFunction
    ) -> tuple[Tensor, Records]:
        """The end state and one ``(blocks, B)`` tensor per measure.

        Each step is measured as it is taken; nothing of it is kept but what gradients need.

        Args:
            x, args, check: as in :meth:`steps`.
            readout: "solution", or "ensemble" for the average of the last step's embedded outputs.
            measures: functions ``Step -> (B,)`` by name. Unless all have ``closing=False`` every block evaluates its
                closing stages.

        Returns:
            The state at the total time, ``(B, *S)``, and the records, ``(blocks, B)`` by name.

        Raises:
            TypeError, ValueError: x is no batch of states, fields that take no such arguments, or a measure that does
                not return ``(B,)``.
        """
        check_named(args, check)
        if check:
            check_state(x)
        check_readout(readout, self.tableau)
        if not measures and readout == "solution" and (x1 := self._end_state(x, args)) is not None:
            return x1, Records({}, blocks=self.names)
        closing = any(needs_closing(measure) for measure in measures.values())
        steps = self._steps(x, args, closing, reductions_of(measures.values()), readout == "ensemble")
        last, records = measure_steps(steps, x, measures, self.names)
        if readout == "solution":
            return self._left(last), records
        return torch.stack([last.output(name) for name in self.tableau.outputs]).mean(0), records

    def outputs(self, x: Tensor, /, *args: Any, full_passes: bool = False, check: bool = True) -> dict[str, Tensor]:
        """The embedded outputs by name, each ``(B, *S)``, of the last block.

        Args:
            x, args, check: as in :meth:`steps`.
            full_passes: instead, one pass per scheme, in which every block carries its output on [K24, eq. 43].

        Returns:
            The states at the total time by the names of ``flow.tableau.outputs``.

        Raises:
            TypeError, ValueError: as :meth:`steps`.
        """
        if check:
            check_state(x)
        if not full_passes:
            return self._outputs(x, *args)[0]
        if self.coupling is not None:
            raise ValueError("full_passes carry other outputs on, which the steps of a ReversibleFlow do not")
        self.materialize(x)
        ends, blocks = {}, self._blocks()
        for name in self.tableau.outputs:
            t, end, scheme = self.start, x, self.tableau.forwarding(name)
            for m, h in enumerate(self.h):
                fields = self._velocities(blocks, m, scheme, False, args)
                t, end = t + h, take_step(blocks[m], args, fields, t, end, h, scheme, closing=False).x1
            ends[name] = end
        return ends

    @observed
    def _outputs(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[dict[str, Tensor], Records]:
        closing = any(needs_closing(measure) for measure in measures.values())
        steps = self._steps(x, args, closing, reductions_of(measures.values()), ensemble=True)
        last, records = measure_steps(steps, x, measures, self.names)
        return {name: last.output(name) for name in self.tableau.outputs}, records

    def ensemble(self, x: Tensor, /, *args: Any, full_passes: bool = False) -> Tensor:
        """Average of :meth:`outputs`, ``(B, *S)`` [K24, section 6.2.1].

        The arguments ``x``, ``args`` and ``full_passes`` are those of it.
        """
        check_readout("ensemble", self.tableau)
        return torch.stack(tuple(self.outputs(x, *args, full_passes=full_passes).values())).mean(0)


def check_readout(readout: Any, tableau: ButcherTableau) -> None:
    """That a method has what is read out.

    Raises:
        ValueError: it is no readout, or the ensemble of a method without embedded outputs.
    """
    if readout not in ("solution", "ensemble"):
        raise ValueError(f"readout must be 'solution' or 'ensemble', got {readout!r}")
    if readout == "ensemble" and not tableau.outputs:
        raise ValueError(
            f"readout must be 'solution': {tableau.name} has no embedded outputs to average; heun, bs23 and dopri5 have"
        )
