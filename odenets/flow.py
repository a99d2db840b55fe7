"""Flow: a network that is an explicit integrator over learned velocity fields."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter

from odenets.fields import VelocityField, field_for, reset_modules
from odenets.measures import Measure, needs_closing, reductions_of
from odenets.normalization import NOTHING, TRAINED, StageBatchNorm, known_statistics
from odenets.recording import Records, check_values
from solvers import ButcherTableau, Controller, I, Statistics, Step, Tolerance, get_tableau, rk_step
from solvers.batch_loop import adaptive_steps
from solvers.step import check_unchanged, versions_of
from solvers.validation import check_state

__all__ = ["Block", "Flow", "StageFields"]

StageFields = Literal["tied", "chained", "untied"]
FieldSource = nn.Module | Callable[[], nn.Module]


class Block(nn.Module):
    """One solver step with its own fields and its own step size h.

    Attributes:
        fields: one velocity field (tied), or one per stage.
        h: step size.
    """

    def __init__(self, fields: Sequence[nn.Module], h: float) -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.h = h

    def extra_repr(self) -> str:
        return f"h={self.h:.12g}"


class Flow(nn.Module):
    """Blocks that keep one dimension: ``x_{m+1} = x_m + h_m r_m(x_m)``, each a Runge-Kutta step with its own weights.

    ``Flow(solver="bs23")`` alone works: like torch's lazy modules it makes its field from the first input, an MLP for
    ``(B, D)``, a convolutional one for ``(B, C, H, W)``. Show it a batch before building an optimizer.

    Args:
        field: a velocity field ``v(t, x)``, copied and drawn anew for every further use, or a callable that makes one
            each time; what it returns twice is shared.
            One with :class:`~odenets.normalization.StageBatchNorm` stays as it is where the method has several stages:
            the flow takes a copy that shares its parameters and has statistics for every stage, which begin with its.
        solver: name of a method or a tableau; ``"euler"`` with h = 1 is a residual network.
        depth: number of blocks.
        h: step size of every block, or one per block; ``total_time / depth`` if not given.
        total_time: the sum of all h; 1 if neither is given.
        stage_fields: "tied", one field per block serves all its stages, a true Runge-Kutta step; "untied", a field per
            stage [K24, eq. 43], where the closing field learns only if the method carries on an output that reads it,
            ``get_tableau("bs23").forwarding("order2")``; "chained", a field per stage where the closing stage of an
            FSAL method uses the first field of the next block, the last one its own. Only tied blocks have the method's
            order: see :meth:`solvers.Step.error`.
        shared: one block, used ``depth`` times.
        tolerance: error control: a continuous flow, one shared field integrated over ``[0, h]`` with steps chosen by
            the embedded error, a neural ODE.
        controller: step-size rule of a continuous flow.

    Raises:
        ValueError: arguments that are out of range or exclude each other.

    >>> import torch
    >>> flow = Flow(solver="bs23", depth=3)
    >>> flow(torch.randn(5, 2)).shape, flow.h
    (torch.Size([5, 2]), (0.3333333333333333, 0.3333333333333333, 0.3333333333333333))
    """

    def __init__(
        self,
        field: FieldSource | None = None,
        *,
        solver: str | ButcherTableau = "bs23",
        depth: int = 1,
        h: float | Sequence[float] | None = None,
        total_time: float | None = None,
        stage_fields: StageFields = "tied",
        shared: bool = False,
        tolerance: Tolerance | None = None,
        controller: Controller | None = None,
    ) -> None:
        super().__init__()
        self.tableau = get_tableau(solver)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if stage_fields not in ("tied", "chained", "untied"):
            raise ValueError(f"stage_fields must be 'tied', 'chained' or 'untied', got {stage_fields!r}")
        if h is not None and total_time is not None:
            raise ValueError("h and total_time exclude each other: total_time is the sum of all h")
        if h is None:
            h = (1.0 if total_time is None else total_time) / depth
        sizes = [h] * depth if isinstance(h, int | float) else list(h)
        if len(sizes) != depth:
            raise ValueError(f"h must hold one step size per block, got {len(sizes)} for depth {depth}")
        for size in sizes:
            if not (math.isfinite(size) and size > 0):
                raise ValueError(f"h must be positive and finite, got {size}")
        if tolerance is not None and (depth > 1 or stage_fields != "tied"):
            raise ValueError(
                "tolerance makes a continuous flow, one field with tied stages: leave out depth and stage_fields"
            )
        if tolerance is not None:
            _ = self.tableau.error_order  # raises where the method has no embedded error
        if controller is not None and tolerance is None:
            raise ValueError("controller chooses the steps of a continuous flow: give tolerance too")
        if shared and stage_fields != "tied":
            raise ValueError("shared uses one field for all blocks: stage_fields must be 'tied'")
        self.stage_fields: StageFields = stage_fields
        self.shared = shared
        self.tolerance = tolerance
        self.controller = controller or I()
        self.statistics = Statistics()
        self.input_shape: tuple[int, ...] | None = None
        self.takes_closing = False  # whether passes take all closing stages, as while statistics are recomputed
        self.start = 0.0  # the time of its first state; that of a part of a flow lies later
        self._sizes = tuple(float(size) for size in sizes)
        self.blocks = nn.ModuleList()
        if field is None:
            self.field_of_first_input = UninitializedParameter()
        else:
            self._make_blocks(field)

    @classmethod
    def of(
        cls, blocks: Sequence[Block], h: Sequence[float] | None = None, *, start: float = 0.0, **settings: Any
    ) -> Self:
        """A flow of blocks that there are, which keep their modes.

        Args:
            blocks: in order, with the fields that ``settings`` call for; one for a shared or continuous flow.
            h: step sizes; those of the blocks if not given.
            start: the time of the first state.
            settings: the other arguments of the class: solver, stage_fields, shared, tolerance, controller.
        """
        h = [block.h for block in blocks] if h is None else h
        flow = cls(None, depth=len(h), h=h, **settings)
        del flow.field_of_first_input
        flow.blocks.extend(blocks)
        flow.start = start
        return flow

    # -- structure ----------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._sizes) if self.shared or not len(self.blocks) else len(self.blocks)

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each block."""
        if self.shared or not len(self.blocks):
            return self._sizes
        return tuple(cast(Block, block).h for block in self.blocks)

    @property
    def total_time(self) -> float:
        """``T = sum_m h_m``."""
        return math.fsum(self.h)

    @property
    def continuous(self) -> bool:
        """Whether the steps are chosen by error control."""
        return self.tolerance is not None

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass; of a continuous flow, those of its last one."""
        return self.evaluations_per_pass()

    def evaluations_per_pass(self, *, closing: bool = False, readout: str = "solution") -> int:
        """Field evaluations of one pass.

        Args:
            closing: with the closing stages of every block, which the embedded error needs.
            readout: "solution", or "ensemble", which needs those of the last block.
        """
        if self.continuous:
            return self.statistics.evaluations
        interior, stages = self.tableau.interior, self.tableau.stages
        if not closing:
            return (self.depth - 1) * interior + (stages if readout == "ensemble" else interior)
        if self.tableau.fsal and self._passes_on:
            return self.depth * (stages - 1) + 1
        return self.depth * stages

    @property
    def _passes_on(self) -> bool:
        """Whether a closing stage is the first stage of the next step: not so where each has statistics of its own."""
        return self.stage_fields == "chained" or (
            self.shared and not any(isinstance(module, StageBatchNorm) for module in self.modules())
        )

    @property
    def closing_apart(self) -> bool:
        """Whether its closing stages, which forward passes do not take, have batch norm statistics of their own."""
        if self.continuous or self.stage_fields == "chained" or self.tableau.interior == self.tableau.stages:
            return False
        return self.stage_fields == "untied" or any(
            isinstance(m, StageBatchNorm) and m.stages > 1 for m in self.modules()
        )

    def materialize(self, x: Tensor) -> None:
        """Make the field from the first input, if none was given; remember the shape of its samples."""
        if not len(self.blocks):
            with torch.inference_mode(False):  # whose tensors could never be trained
                field = field_for(x)  # raises where there is none
                del self.field_of_first_input
                self._make_blocks(field)
            self.train(self.training)
        if self.input_shape is None:
            self.input_shape = tuple(x.shape[1:])

    def resize(self, sizes: Sequence[float]) -> None:
        """Give the flow one block per step size, new ones copied from its last; used when saved weights are loaded."""
        if self.shared or self.continuous:
            if len(sizes) != len(self._sizes):
                raise ValueError(f"a shared or continuous flow keeps its depth {len(self._sizes)}, got {len(sizes)}")
            self._sizes = tuple(sizes)
            return
        blocks = [cast(Block, block) for block in self.blocks[: len(sizes)]]
        blocks += [copy.deepcopy(blocks[-1]) for _ in range(len(sizes) - len(blocks))]
        for block, size in zip(blocks, sizes, strict=True):
            block.h = float(size)
        self.blocks = nn.ModuleList(blocks)

    def part(self, first: int, last: int) -> Flow:
        """The blocks from ``first`` to before ``last`` as a flow of its own, which shares them and keeps their times.

        Raises:
            ValueError: no such blocks, no field yet, or blocks that share fields: of a continuous or shared flow, or
                one with chained stage fields.
            TypeError: a class with settings of its own, which a part would lack.
        """
        if not 0 <= first < last <= self.depth:
            raise ValueError(f"a flow of {self.depth} blocks has no part from {first} to {last}")
        whole = (first, last) == (0, self.depth)
        if not whole and (self.shared or self.continuous or self.stage_fields == "chained"):
            raise ValueError("a shared, continuous or chained flow has no parts: its blocks share fields")
        if not len(self.blocks):
            raise ValueError("the flow has no field yet: call it once before it is cut")
        if type(self).__init__ is not Flow.__init__:
            raise TypeError(
                f"{type(self).__name__} has settings of its own, which a part would lack: let it define part"
            )
        part = self.of(
            [cast(Block, block) for block in (self.blocks if whole else self.blocks[first:last])],
            self.h[first:last],
            start=self.start + math.fsum(self.h[:first]),
            solver=self.tableau,
            stage_fields=self.stage_fields,
            shared=self.shared,
            tolerance=self.tolerance,
            controller=self.controller if self.continuous else None,
        )
        part.training, part.blocks.training = self.training, self.blocks.training
        part.input_shape = self.input_shape
        return part

    def _make_blocks(self, source: FieldSource) -> None:
        per_block = 1 if self.stage_fields == "tied" else self.tableau.stages
        if self.stage_fields == "chained" and self.tableau.fsal:
            per_block -= 1
        sizes = self._sizes[:1] if self.shared or self.continuous else self._sizes
        drawn: list[nn.Module] = []
        for size in sizes:
            fields = []
            for _ in range(per_block):
                fields.append(_new_field(source, as_given=not drawn))
                drawn.append(fields[-1])
            if self.stage_fields == "tied":
                fields = [_with_stages(fields[0], self.tableau.stages)]
            self.blocks.append(Block(fields, size))
        if len(drawn) > 1 and len(set(drawn)) == 1:
            raise ValueError(
                f"field must make a new module at each call, got one and the same {len(drawn)} times: take "
                "field=lambda: MyField(...), or shared=True for one field in all blocks"
            )

    def _stage_fields(self, m: int) -> Sequence[Callable[[float | Tensor, Tensor], Tensor]]:
        """One callable per stage of block m."""
        block = cast(Block, self.blocks[0 if self.shared else m])
        if self.stage_fields == "tied":
            field = block.fields[0]
            if isinstance(field, VelocityField):
                return [partial(field, stage=i) for i in range(self.tableau.stages)]
            return [field] * self.tableau.stages
        fields = list(block.fields)
        if len(fields) < self.tableau.stages:
            following = self.blocks[m + 1] if m + 1 < len(self.blocks) else block
            fields.append(cast(Block, following).fields[0])
        return fields

    # -- running ------------------------------------------------------------------------------------------------

    def steps(self, x: Tensor, *, closing: bool = True, check: bool = True) -> Iterator[Step]:
        """Every step from ``x`` at time 0 to the total time, each still as it was when the next one has been taken.

        Args:
            x: state, ``(B, *S)``, floating and finite.
            closing: whether each step carries the closing stage of an FSAL method.
            check: False does not look at x, so that a network that diverges can be measured.

        Raises:
            TypeError, ValueError: x is no batch of finite floating states, or a field writes into what it has returned
                in the step before, which may have been kept.
        """
        if check:
            check_state(x)
        stages, versions = (), None
        for step in self._steps(x, closing):
            check_unchanged(stages, versions)
            stages, versions = step.stages, versions_of(step.stages)
            yield step

    def _steps(
        self, x: Tensor, closing: bool, reductions: frozenset[str] = frozenset(), ensemble: bool = False
    ) -> Iterator[Step]:
        """The steps; with ``ensemble`` the last one carries its closing stages in any case."""
        self.materialize(x)
        if self.tolerance is not None:
            self.statistics = Statistics()
            yield from adaptive_steps(
                cast(nn.Module, self.blocks[0]).fields[0],  # type: ignore[index]
                x,
                0.0,
                self.total_time,
                self.tableau,
                self.tolerance,
                self.controller,
                stats=self.statistics,
            )
            return
        t, first, last = self.start, None, self.depth - 1
        closing = closing or self.takes_closing
        passes_on = closing and self.tableau.fsal and self._passes_on
        for m, h in enumerate(self.h):
            closes = closing or (ensemble and m == last)
            if closes and self.stage_fields == "untied":
                self._check_closing(m)
            step = rk_step(self._stage_fields(m), t, x, h, self.tableau, first, closing=closes, reductions=reductions)
            yield step
            t, x = t + h, step.x1
            if passes_on:
                first = step.stages[-1]  # the first stage of the next step

    def _check_closing(self, m: int) -> None:
        """Refuse fields of closing stages whose batch norms know less than those of the others."""
        fields, interior = list(cast(Block, self.blocks[m]).fields), self.tableau.interior
        inner, closing = (
            [norm for field in part for norm in field.modules() if isinstance(norm, StageBatchNorm | _BatchNorm)]
            for part in (fields[:interior], fields[interior:])
        )
        least = min((known_statistics(norm) for norm in closing if not norm.training), default=TRAINED)
        if least < TRAINED and least < max(map(known_statistics, inner), default=NOTHING):
            what = "no statistics" if least == NOTHING else "statistics that are behind further training"
            raise ValueError(
                f"batch norms in the closing fields of block {m} have {what}, for training does not call these "
                "fields: train a flow that reads them, solver=get_tableau('bs23').forwarding('order2'), or call "
                "odenets.recalibrate(network, batches) first"
            )

    def forward(self, x: Tensor, readout: str = "solution") -> Tensor:
        """The state at the total time, ``(B, *S)``.

        Args:
            x: state at time 0, ``(B, *S)``.
            readout: "solution", or "ensemble" for the average of the last step's embedded outputs.
        """
        return self.record(x, readout)[0]

    def record(
        self, x: Tensor, readout: str = "solution", check: bool = True, /, **measures: Measure
    ) -> tuple[Tensor, Records]:
        """The end state and one ``(blocks, B)`` tensor per measure.

        Each step is measured as it is taken; nothing of it is kept but what gradients need.

        Args:
            x: state at time 0, ``(B, *S)``.
            readout: "solution" or "ensemble".
            check: as in :meth:`steps`.
            measures: functions ``Step -> (B,)`` by name. Unless all are marked :func:`~odenets.measures.interior` every
                block evaluates its closing stages.

        Raises:
            TypeError, ValueError: x is no batch of states, or a measure does not return ``(B,)``.
        """
        if check:
            check_state(x)
        if readout not in ("solution", "ensemble"):
            raise ValueError(f"readout must be 'solution' or 'ensemble', got {readout!r}")
        for name, measure in measures.items():
            if not callable(measure):
                hint = "; the readout is positional: record(x, 'ensemble')" if name == "readout" else ""
                raise TypeError(f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}{hint}")
        closing = any(needs_closing(measure) for measure in measures.values())
        rows: dict[str, list[Tensor]] = {name: [] for name in measures}
        last = None
        for last in self._steps(x, closing, reductions_of(measures.values()), readout == "ensemble"):
            for name, measure in measures.items():
                rows[name].append(check_values(name, measure(last), x))
        assert last is not None  # a flow has at least one step
        end = last.x1 if readout == "solution" else _average([last.output(name) for name in self.tableau.outputs])
        return end, Records({name: torch.stack(values) for name, values in rows.items()})

    def outputs(self, x: Tensor, *, full_passes: bool = False, check: bool = True) -> dict[str, Tensor]:
        """The embedded outputs by name, each ``(B, *S)``.

        Args:
            x: state at time 0, ``(B, *S)``.
            full_passes: False, those of the last block, in one pass; True, one pass per scheme in which every block
                carries that scheme's output on [K24, eq. 43].
            check: as in :meth:`steps`.
        """
        if check:
            check_state(x)
        if not full_passes or self.continuous:
            *_, last = self._steps(x, closing=False, ensemble=True)
            return {name: last.output(name) for name in self.tableau.outputs}
        self.materialize(x)
        ends = {}
        for name in self.tableau.outputs:
            t, end, scheme = self.start, x, self.tableau.forwarding(name)
            for m, h in enumerate(self.h):
                if self.stage_fields == "untied" and scheme.interior > self.tableau.interior:
                    self._check_closing(m)
                end = rk_step(self._stage_fields(m), t, end, h, scheme, closing=False).x1
                t += h
            ends[name] = end
        return ends

    def ensemble(self, x: Tensor, *, full_passes: bool = False) -> Tensor:
        """Average of :meth:`outputs`, ``(B, *S)`` (section 6.2.1)."""
        return _average(list(self.outputs(x, full_passes=full_passes).values()))

    # -- state --------------------------------------------------------------------------------------------------

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
        if len(self.blocks):
            self.resize(sizes)
        else:
            self._sizes = tuple(sizes)

    def extra_repr(self) -> str:
        kind = (
            f"{self.tolerance}, {self.controller}"
            if self.continuous
            else f"depth={self.depth}, stage_fields={self.stage_fields}"
        )
        return f"solver={self.tableau.name}, {kind}, total_time={self.total_time:g}"


def _average(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(outputs)).mean(0)


def _new_field(source: FieldSource, *, as_given: bool) -> nn.Module:
    """The given field itself the first time, then copies of it with parameters drawn anew."""
    if not isinstance(source, nn.Module):
        field = source()
        if not isinstance(field, nn.Module):
            raise TypeError(f"field must make a torch module, got {type(field).__name__}")
        return field
    if as_given:
        return source
    field = copy.deepcopy(source)
    if hasattr(field, "reset_parameters"):
        field.reset_parameters()  # type: ignore[operator]
    else:
        reset_modules(field)
    return field


def _with_stages(field: nn.Module, stages: int) -> nn.Module:
    """The field, or a copy with the same parameters where its batch norms lack statistics of their own per stage."""
    if not isinstance(field, VelocityField):
        return field
    norms = [module for module in field.modules() if isinstance(module, StageBatchNorm)]
    if type(field).expand_stages is VelocityField.expand_stages and all(norm.stages == stages for norm in norms):
        return field
    field = copy.deepcopy(field, {id(p): p for p in field.parameters()})
    field.expand_stages(stages)
    return field
