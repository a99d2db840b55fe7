"""Flows, neural ODEs and networks of them within a model: their own steps among those of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.checkpointing import measured_once
from odenets.adapting.flow_samples import SampleMeasure
from odenets.adapting.forward_pass import ForwardPass, Visited, begins_flow
from odenets.measures import StepFunction
from odenets.observing import keeping
from odenets.printing import table
from odenets.records import Records, numbered
from solvers import Step

__all__ = ["FlowObserver", "Row", "lines_of", "rows_of"]


class Row(NamedTuple):
    """A step of a pass that is to come: its name, its specification, the shape of its state, its size and its cost."""

    name: str
    block: BlockSpec
    shape: tuple[int, ...]
    h: float
    begins: bool


def rows_of(model: nn.Module, visited: Iterable[Visited]) -> list[Row]:
    """The steps of the calls of blocks and flows of a ``model`` that were ``visited``, as the flows are now."""
    rows: list[Row] = []
    before: Visited | None = None
    for one in visited:
        if not one.block.recorder:
            rows.append(Row(one.block.name, one.block, one.shape, 1.0, begins_flow(one, before)))
        else:
            recorder: Any = model.get_submodule(one.block.block)
            names = _names_of(recorder)
            starts = _starts_of(recorder)
            for m, (name, h) in enumerate(zip(names, recorder.h, strict=True)):
                rows.append(Row(f"{one.block.name} {name}", one.block, one.shape, h, m in starts))
        before = one
    names = numbered([row.name for row in rows])
    return [row._replace(name=name) for row, name in zip(rows, names, strict=True)]


def lines_of(rows: Iterable[Row]) -> list[str]:
    """The ``rows`` as a table to read."""
    cells = []
    for m, (name, block, shape, *_) in enumerate(rows):
        projection = block.projection if block.projection != "" else "yes"
        cells.append((str(m), name, block.kind, " x ".join(map(str, shape)), projection or ""))
    return table(("step", "name", "kind", "shape", "projection"), cells)


def _names_of(recorder: Any) -> tuple[str, ...]:
    names = getattr(recorder, "names", None)
    return tuple(names) if names is not None else tuple(f"step {m}" for m in range(recorder.depth))


def _starts_of(recorder: Any) -> set[int]:
    """The steps at which the flows of a recorder begin."""
    starts, steps = {0}, 0
    for flow in getattr(recorder, "flows", ()):
        starts.add(steps)
        steps += flow.depth
    return starts


class FlowObserver:
    """What the flows of a model tell a forward pass of it: their records, or their steps where these are kept.

    Args:
        current: the pass.
        flows: the modules that are recorded, and their specifications.
        closing: whether steps that are kept carry closing stages.

    Attributes:
        others: recorders that ran besides.
    """

    def __init__(self, current: ForwardPass, flows: Sequence[tuple[nn.Module, BlockSpec]], closing: bool) -> None:
        self.current, self.flows, self.closing = current, flows, closing
        self.kept: dict[str, list[Step]] = {}
        self.by_sample: dict[str, dict[str, SampleMeasure]] = {}
        self.others: list[nn.Module] = []

    def measures_of(self, recorder: nn.Module) -> Mapping[str, StepFunction] | None:
        """What the pass measures on the steps of a ``recorder`` of the model."""
        block = self._block_of(recorder)
        if block is None:
            self.others.append(recorder)
            return None
        if self.current.keep:
            steps = self.kept[block.name] = []
            return {"steps": keeping(steps, closing=self.closing)}
        own = {
            name: SampleMeasure(name, one, block, self.current.samples, self.current.tokens)
            for name, one in self.current.measures.items()
        }
        self.by_sample[block.name] = own
        return {name: measured_once(name, one.measure()) for name, one in own.items()}

    def receive(self, recorder: nn.Module, output: Any, records: Records) -> None:
        """Hand the ``records`` of a ``recorder`` to the pass."""
        block = self._block_of(recorder)
        assert block is not None  # it is measured
        steps = _apart(self.kept.pop(block.name, []))
        names = records.blocks if records or records.blocks else _names_of(recorder)
        starts = records.starts if records.blocks else sorted(_starts_of(recorder))
        values = {name: one.values_of(records[name]) for name, one in self.by_sample.pop(block.name, {}).items()}
        self.current.flow(block, _shape_of(recorder, output), Records(values, starts, names), steps)

    def _block_of(self, recorder: nn.Module) -> BlockSpec | None:
        return next((block for module, block in self.flows if module is recorder), None)


def _shape_of(recorder: Any, output: Any) -> tuple[int, ...]:
    """The shape of a sample's state, as far as it is known."""
    shape = getattr(recorder, "input_shape", None)
    if shape is None and isinstance(output, Tensor):
        shape = output.shape[1:]
    return tuple(shape or ())


def _apart(steps: list[Step]) -> list[Step]:
    """The steps, whose ends are copies: the states that the model goes on with may be changed in place."""
    if steps:
        steps[-1] = steps[-1]._replace(x1=steps[-1].x1.clone())
    return steps
