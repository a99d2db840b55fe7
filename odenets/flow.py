"""Flow: a network that is an explicit integrator over learned velocity fields."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from odenets.blocks import (
    ELSEWHERE,
    Block,
    FieldSource,
    StageFields,
    Velocity,
    block_list,
    check_sharing,
    fields_per_block,
    make_blocks,
    step_sizes,
    take_step,
)
from odenets.errors import refuse
from odenets.lazy import LazyParameters, make_field, refuse_state
from odenets.measures import StepFunction, check_named, needs_closing, reductions_of
from odenets.normalization import StageBatchNorm, check_closing_statistics
from odenets.recording import Records, measure_steps
from odenets.records import numbered
from solvers import ButcherTableau, Step, get_tableau
from solvers.step import check_unchanged, versions_of
from solvers.validation import check_state

__all__ = ["Flow"]


class Flow(nn.Module):
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
        solver: name of a method or a tableau; ``"euler"`` with h = 1 is a residual network.
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

    def __init__(
        self,
        field: FieldSource | tuple[Block, ...] | None = None,
        *,
        solver: str | ButcherTableau = "bs23",
        depth: int = 1,
        h: float | Sequence[float] | None = None,
        total_time: float | None = None,
        stage_fields: StageFields = "tied",
        shared: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse("Flow", unknown, ELSEWHERE)
        self.tableau = get_tableau(solver)
        check_sharing(stage_fields, shared)
        self._sizes = step_sizes(h, total_time, depth)
        self.stage_fields: StageFields = stage_fields
        self.shared = shared
        self.input_shape: tuple[int, ...] | None = None
        self.takes_closing = False  # whether passes take all closing stages, as while statistics are recomputed
        self.start = 0.0  # the time of its first state; that of a part of a flow lies later
        self.blocks = nn.ModuleList()
        if field is None:
            count = (1 if shared else depth) * fields_per_block(self.tableau, stage_fields)
            self.field_of_first_input = LazyParameters(count)
            self.register_load_state_dict_pre_hook(refuse_state)
        elif isinstance(field, tuple):
            self.blocks.extend(block_list(field))
        else:
            self.blocks.extend(self._make_blocks(field))

    @classmethod
    def of(cls, blocks: Sequence[Block], h: Sequence[float] | None = None, start: float = 0.0, **settings: Any) -> Self:
        """A flow of these blocks as they are, from time ``start``; settings are the other arguments of the class."""
        h = [block.h for block in block_list(blocks)] if h is None else h
        flow = cls(tuple(blocks), depth=len(h), h=h, **settings)
        if flow.h != flow._sizes:
            raise ValueError(f"h must be each block's own, {flow.h}, unless one block is shared, got {flow._sizes}")
        flow.start = start
        return flow

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._sizes) if self.shared else len(self.blocks) or len(self._sizes)

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each block."""
        return self._sizes if self.shared else tuple([cast(Block, block).h for block in self.blocks]) or self._sizes

    @property
    def names(self) -> tuple[str, ...]:
        """The module of each step's block, as records name it; with the number of the call where all share one."""
        names = [f"blocks.{0 if self.shared else m}" for m in range(self.depth)]
        return tuple(numbered(names) if self.shared else names)

    @property
    def total_time(self) -> float:
        """``T = sum_m h_m``."""
        return math.fsum(self.h)

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        return self.evaluations_per_pass()

    def evaluations_per_pass(self, *, closing: bool = False, readout: str = "solution") -> int:
        """Field evaluations of one pass; with the closing stages of all blocks, or of the last for "ensemble"."""
        interior, stages = self.tableau.interior, self.tableau.stages
        if closing and self.tableau.fsal and self._passes_on:
            return self.depth * (stages - 1) + 1
        last = stages if closing or readout == "ensemble" else interior
        return (self.depth - 1) * (stages if closing else interior) + last

    @property
    def _passes_on(self) -> bool:
        """Whether a closing stage is the first stage of the next step: not so where each has statistics of its own."""
        return self.stage_fields == "chained" or (self.shared and not self._stage_statistics)

    @property
    def _stage_statistics(self) -> bool:
        """Whether its stages have batch norm statistics of their own."""
        return any(isinstance(module, StageBatchNorm) and module.stages > 1 for module in self.modules())

    @property
    def closing_apart(self) -> bool:
        """Whether its closing stages, which forward passes do not take, have batch norm statistics of their own."""
        if self.stage_fields == "chained" or self.tableau.interior == self.tableau.stages:
            return False
        return self.stage_fields == "untied" or self._stage_statistics

    def materialize(self, x: Tensor) -> None:
        """Make the field from the first input, if none was given; remember the shape of its samples."""
        if "field_of_first_input" in self._modules:
            make: Any = torch.compiler.disable(make_field) if torch.compiler.is_compiling() else make_field
            make(self, x, self._make_blocks)
        self.input_shape = self.input_shape or tuple(x.shape[1:])

    def resize(self, sizes: Sequence[float], whole: nn.Module | None = None) -> None:
        """Give the flow one block per step size, new ones copied from its last, as a part of the whole if given."""
        if self.shared and len(sizes) != self.depth:
            raise ValueError(f"a shared flow keeps its depth {self.depth}, got {len(sizes)}")
        if not len(self.blocks) and len(sizes) != self.depth:
            raise ValueError("the flow has no field yet: call it once before it gets another depth")
        self._sizes = tuple(map(float, sizes))
        if self.shared or not len(self.blocks):
            return
        blocks = [cast(Block, block) for block in self.blocks[: len(sizes)]]
        blocks += [blocks[-1].copy_within(whole or self) for _ in range(len(sizes) - len(blocks))]
        for block, size in zip(blocks, self._sizes, strict=True):
            block.h = size
        self.replace_blocks(blocks)

    def replace_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Take other blocks, each a :class:`Block`, in this order; the modes of the flow and of the blocks stay."""
        blocks = block_list(blocks)
        del self.blocks[:]
        self.blocks.extend(blocks)

    def part(self, first: int, last: int) -> Flow:
        """The blocks from ``first`` to before ``last`` as a flow of its own, which shares them and keeps their times.

        Raises:
            ValueError: no such blocks, no field yet, or blocks that share fields.
            TypeError: a class with settings of its own, which a part would lack.
        """
        if not 0 <= first < last <= self.depth:
            raise ValueError(f"a flow of {self.depth} blocks has no part from {first} to {last}")
        together = self.shared or self.stage_fields == "chained"
        if together and (first, last) != (0, self.depth):
            raise ValueError("a shared or chained flow has no parts: its blocks share fields")
        if not len(self.blocks):
            raise ValueError("the flow has no field yet: call it once before it is cut")
        if (kind := type(self)).__init__ is not Flow.__init__:
            raise TypeError(f"{kind.__name__} has settings of its own, which a part would lack: let it define part")
        part = self.of(
            [cast(Block, block) for block in self.blocks[first:last]],
            self.h[first:last],
            start=self.start + math.fsum(self.h[:first]),
            solver=self.tableau,
            stage_fields=self.stage_fields,
            shared=self.shared,
        )
        part.training, part.blocks.training, part.input_shape = self.training, self.blocks.training, self.input_shape
        return part

    def _make_blocks(self, source: FieldSource) -> list[Block]:
        return make_blocks(source, self._sizes[:1] if self.shared else self._sizes, self.tableau, self.stage_fields)

    def _blocks(self) -> list[Block]:
        """The block of each step."""
        return [cast(Block, block) for block in self.blocks] * (len(self._sizes) if self.shared else 1)

    def steps(self, x: Tensor, *args: Any, closing: bool = True, check: bool = True) -> Iterator[Step]:
        """Every step from ``x`` to the total time, each still as it was when the next one has been taken.

        Args:
            x: state at time 0, ``(B, *S)``, floating and finite.
            args: what the fields take besides, ``v(t, x, *args)``.
            closing: whether each step carries the closing stage of an FSAL method.
            check: False does not look at x, so that a network that diverges can be measured.

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

    def _steps(
        self, x: Tensor, args: Sequence[Any], closing: bool, reductions: Collection[str] = (), ensemble: bool = False
    ) -> Iterator[Step]:
        """The steps; with ``ensemble`` the last one carries its closing stages in any case."""
        self.materialize(x)
        t, first, blocks = self.start, None, self._blocks()
        closing = closing or self.takes_closing
        passes_on = closing and self.tableau.fsal and self._passes_on
        for m, h in enumerate(self.h):
            closes = closing or (ensemble and m == len(blocks) - 1)
            fields = self._velocities(blocks, m, self.tableau, closes, args)
            begin = t, x, h, self.tableau, first
            yield (step := take_step(blocks[m], args, fields, *begin, closing=closes, reductions=reductions))
            t, x, first = t + h, step.x1, step.stages[-1] if passes_on else None

    def _velocities(
        self, blocks: list[Block], m: int, method: ButcherTableau, closing: bool, args: Sequence[Any]
    ) -> list[Velocity]:
        """The fields of block m at the stages of a method; refuses those of closing stages without statistics."""
        block, following = blocks[m], blocks[m + 1] if m + 1 < len(blocks) else None
        if self.stage_fields == "untied" and (closing or method.interior > self.tableau.interior):
            check_closing_statistics(block.fields, self.tableau.interior, m)
        return block.velocities(method.stages, self.stage_fields, following, args)

    def forward(self, x: Tensor, /, *args: Any, readout: str = "solution") -> Tensor:
        """The state at the total time, ``(B, *S)``: that of :meth:`record`."""
        return self.record(x, *args, readout=readout)[0]

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

        Raises:
            TypeError, ValueError: x is no batch of states, fields that take no such arguments, or a measure that does
                not return ``(B,)``.
        """
        check_named(args, check)
        if check:
            check_state(x)
        if readout not in ("solution", "ensemble"):
            raise ValueError(f"readout must be 'solution' or 'ensemble', got {readout!r}")
        closing = any(needs_closing(measure) for measure in measures.values())
        steps = self._steps(x, args, closing, reductions_of(measures.values()), readout == "ensemble")
        last, records = measure_steps(steps, x, measures, self.names)
        if readout == "solution":
            return last.x1, records
        return torch.stack([last.output(name) for name in self.tableau.outputs]).mean(0), records

    def outputs(self, x: Tensor, /, *args: Any, full_passes: bool = False, check: bool = True) -> dict[str, Tensor]:
        """The embedded outputs by name, each ``(B, *S)``, of the last block.

        Args:
            x, args, check: as in :meth:`steps`.
            full_passes: instead, one pass per scheme, in which every block carries its output on [K24, eq. 43].
        """
        if check:
            check_state(x)
        if not full_passes:
            *_, last = self._steps(x, args, closing=False, ensemble=True)
            return {name: last.output(name) for name in self.tableau.outputs}
        self.materialize(x)
        ends, blocks = {}, self._blocks()
        for name in self.tableau.outputs:
            t, end, scheme = self.start, x, self.tableau.forwarding(name)
            for m, h in enumerate(self.h):
                fields = self._velocities(blocks, m, scheme, False, args)
                t, end = t + h, take_step(blocks[m], args, fields, t, end, h, scheme, closing=False).x1
            ends[name] = end
        return ends

    def ensemble(self, x: Tensor, /, *args: Any, full_passes: bool = False) -> Tensor:
        """Average of :meth:`outputs`, ``(B, *S)`` [K24, section 6.2.1]."""
        return torch.stack(tuple(self.outputs(x, *args, full_passes=full_passes).values())).mean(0)

    def get_extra_state(self) -> Tensor:
        """The step sizes, so that they travel with ``state_dict``, ``(depth,)`` float64."""
        return torch.tensor(self.h, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the step sizes of a ``state_dict``."""
        sizes = state.tolist()
        if len(sizes) != self.depth:
            raise ValueError(
                f"the state holds {len(sizes)} blocks and this flow has {self.depth}: "
                "call flow.resize(sizes) first, or load it with odenets.load_weights"
            )
        self.resize(sizes)

    def extra_repr(self) -> str:
        blocks = f"depth={self.depth}, stage_fields={self.stage_fields}"
        return f"solver={self.tableau.name}, {blocks}, total_time={self.total_time:g}"
