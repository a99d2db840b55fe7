"""One forward pass of an adapted model: its steps, each measured as it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.checkpointing import outside_checkpoints
from odenets.adapting.tokens import Tokens, euler_reductions
from odenets.measures import StepFunction, needs_gradient, reductions_of
from odenets.recording import Records, check_values
from odenets.records import numbered
from solvers import Step, get_tableau
from solvers.reductions import displaced, mean_square_and_cosine

__all__ = ["ForwardPass", "InPlaceChanges", "StepKey", "Visited", "begins_flow"]

EULER = get_tableau("euler")


class StepKey(NamedTuple):
    """A step, and whether it is computed in training mode and with gradients."""

    block: BlockSpec
    training: bool
    gradients: bool


@dataclass(frozen=True)
class InPlaceChanges:
    """What passes learn: whether a step writes into its input, and whether its output is written into after it."""

    inputs: dict[StepKey, bool] = field(default_factory=dict)
    outputs: dict[StepKey, bool] = field(default_factory=dict)

    def written(self, key: StepKey, default: bool) -> bool:
        """Whether the output of a step is written into, as in other modes where that is not known of this one."""
        known = [written for other, written in self.outputs.items() if other.block == key.block]
        return self.outputs.get(key, any(known) or default)


class Visited(NamedTuple):
    """A step of a pass, or the steps of a flow: its specification, the shape of the state's samples."""

    block: BlockSpec
    shape: tuple[int, ...]


def begins_flow(step: Visited, before: Visited | None) -> bool:
    """Whether the state of a ``step`` has another shape than the one ``before``, or comes out of a flow."""
    return before is None or before.block.recorder or step.shape != before.shape


class _Start(NamedTuple):
    """The state at which a step begins, and a copy of it where the step may write into it."""

    x0: Tensor
    version: int
    copy: Tensor | None
    key: StepKey


class _End(NamedTuple):
    """A step that has ended, whose states are looked at again after the pass."""

    start: _Start
    x1: Tensor
    version0: int
    version1: int
    copy: Tensor | None  # of x1
    number: int  # of the step among those that are kept


class ForwardPass:
    """The steps of one forward pass, each measured as it ends.

    Its events are called by :class:`~odenets.adapting.hooks.Hooks`.

    Args:
        measures: functions ``Step -> (B,)`` by name.
        samples: how many there are, B; None where that is not known.
        keep: whether steps are kept.
        in_place: what earlier passes have learned; this one adds to it.
        following: the step that begins where one ends, by the name of that.
        tokens: those that are measured; None where measures are of whole samples.
    """

    def __init__(
        self,
        measures: dict[str, StepFunction],
        samples: int | None,
        keep: bool,
        in_place: InPlaceChanges,
        following: Mapping[str, BlockSpec],
        tokens: Tokens | None = None,
    ) -> None:
        self.samples, self.following, self.tokens = samples, following, tokens
        self.measures, self.reductions, self.keep = measures, reductions_of(measures.values()), keep
        self.in_place = in_place
        self.needs_states = len(measures) > 0 or keep
        self.differentiated = any(map(needs_gradient, measures.values()))
        read = [reductions_of([one]) for one in measures.values()]
        self.all_reduced = all(len(one) > 0 and "error" not in one for one in read)
        self.rows: dict[str, list[Tensor]] = {name: [] for name in measures}
        self.steps: list[Step] = []
        self.ends: list[_End] = []  # of steps that are kept or differentiated
        self.visited: list[Visited] = []
        self.names: list[str] = []  # of the rows
        self.starts: list[int] = []  # the rows at which flows begin
        self.starting: dict[str, _Start] = {}  # by names: torch 2.8 compiles no other keys
        self.branches: dict[str, Tensor] = {}
        self.decisions: list[bool] = []
        self.gradients = torch.is_grad_enabled()
        self.without_gradients: BlockSpec | None = None

    def start(self, block: BlockSpec, x0: Any, training: bool) -> None:
        """A step begins at x0, which is copied unless the step is known not to write into it."""
        x0, key = self._state(block, x0), StepKey(block, training, torch.is_grad_enabled())
        copied = self.needs_states and (torch.compiler.is_compiling() or self.in_place.inputs.get(key, True))
        copy = x0.clone() if copied else None
        self.starting[block.name] = _Start(x0, _version(x0), copy, key)

    def branch(self, block: BlockSpec, r: Any, training: bool) -> None:
        """The branch of the block gives r."""
        if self.needs_states:
            self.branches[block.name] = self._state(block, r).clone()  # torchvision's blocks add to it in place

    def end(self, block: BlockSpec, x1: Any, training: bool) -> None:
        """A step ends at x1, if it has begun: an activation that several blocks share ends the steps of others too."""
        start = self.starting.pop(block.name, None)
        if start is not None:
            self._end(block, start, self._state(block, x1))
            if (following := self.following.get(block.name)) is not None:
                self.start(following, x1, training)

    def _state(self, block: BlockSpec, x: Any) -> Tensor:
        """What passes, which must be a tensor; a nested one, of which torch's encoders leave padding out, with it."""
        if not isinstance(x, Tensor):
            raise TypeError(f"block {block.name!r} must take and return a tensor, got {type(x).__name__}")
        if not x.is_nested:
            return x
        mask = None if self.tokens is None else self.tokens.mask
        return x.to_padded_tensor(0.0, None if mask is None else (*mask.shape, x.size(2)))

    def _end(self, block: BlockSpec, start: _Start, x1: Tensor) -> None:
        x0, key = start.x0, start.key
        passed, x1 = x1, _shaped(x1, x0.shape)
        self._check_shapes(block, x0, x1)
        counted, changed = not torch.compiler.is_compiling(), start.version != _version(x0)
        if counted and (changed or key not in self.in_place.inputs):
            self.in_place.inputs[key] = changed
        if changed and (_memory(x1) is not _memory(x0) or (self.needs_states and start.copy is None)):
            raise _changed(block)
        self._visit(Visited(block, self._shape(block, x0)))
        if not self.needs_states:
            if counted and key not in self.in_place.outputs:  # whether they are written into is learned here too
                self.ends.append(_End(start, x1, _version(x0), _version(x1), None, 0))
            return
        if self.gradients and not torch.is_grad_enabled():
            self.without_gradients = block
        r = self._residue(block, x0, moves=passed is not x0 or changed) if block.branch else None
        copy1 = None
        if counted and (self.keep or (torch.is_grad_enabled() and x1.requires_grad)):
            copy1 = x1.clone() if changed or self.in_place.written(key, self.keep) else None
            ended = start if self.keep else start._replace(copy=None)
            self.ends.append(_End(ended, x1, _version(x0), _version(x1), copy1, len(self.steps)))
        begin = start.copy if start.copy is not None and (changed or not counted) else x0
        self._measure(block, begin, x1 if self.keep or copy1 is None else copy1, r, source=x0)

    def _visit(self, step: Visited) -> None:
        if begins_flow(step, self.visited[-1] if self.visited else None):
            self.starts.append(len(self.names))
        self.visited.append(step)
        self.names.append(step.block.name)

    def flow(self, block: BlockSpec, shape: tuple[int, ...], records: Records, steps: Sequence[Step]) -> None:
        """A flow, or what else records its own steps, has run; ``steps`` are those that are kept."""
        for name in self.measures:
            self.rows[name] += records[name].unbind()
        self.starts += [len(self.names) + start for start in records.starts]
        self.names += [f"{block.name} {one}" for one in records.blocks]
        self.visited.append(Visited(block, shape))
        if self.gradients and not torch.is_grad_enabled():
            self.without_gradients = block
        self.steps += steps

    def _check_shapes(self, block: BlockSpec, x0: Tensor, x1: Tensor) -> None:
        if x0.shape != x1.shape:
            raise ValueError(
                f"block {block.name!r} changes the shape of the state, {tuple(x0.shape)} to {tuple(x1.shape)}: name "
                f"the module of its shortcut, adapt(model, blocks={{{block.block!r}: ...}}), or leave it out"
            )
        rows = x0.shape[block.samples.axis] if x0.ndim > block.samples.axis else 0
        if self.samples is not None and not block.samples.fits(rows, self.samples):
            raise ValueError(f"block {block.name!r} has states of shape {tuple(x0.shape)} for {self.samples} samples")

    def _shape(self, block: BlockSpec, x0: Tensor) -> tuple[int, ...]:
        """The shape of a sample's state."""
        shape = [*x0.shape]
        rows = shape.pop(block.samples.axis) // (self.samples or 1)
        return (*((rows,) if block.samples.rows > 1 else ()), *shape)

    def _residue(self, block: BlockSpec, x0: Tensor, *, moves: bool) -> Tensor:
        """What the branch of the block has given; zero where stochastic depth leaves the block out."""
        r = self.branches.pop(block.name, None)
        if r is None and moves:
            raise ValueError(
                f"block {block.name!r} does not call its branch {block.branch.of!r} in this pass: take "  # type: ignore[union-attr]
                'adapt(model, residue="displacement")'
            )
        return torch.zeros_like(x0) if r is None else r

    def _measure(self, block: BlockSpec, x0: Tensor, x1: Tensor, r: Tensor | None, source: Tensor) -> None:
        if x0.is_quantized:
            x0, x1 = x0.dequantize(), x1.dequantize()
        x0, x1 = self._by_sample(block, x0), self._by_sample(block, x1)
        r = None if r is None else self._by_sample(block, r)
        dtype = torch.promote_types(x0.dtype, x1.dtype) if r is None else r.dtype
        x0, x1 = x0.to(dtype), x1.to(dtype)
        if self.differentiated and (x0 is not source or self.tokens is not None):
            raise ValueError(
                f"block {block.name!r} has no Jacobian in a state that is seen as a copy or another view of what "
                "passes: one that is changed in place, of another precision, without tokens that a mask leaves out, or "
                "whose samples do not lie in the first dimension"
            )
        with outside_checkpoints():
            if self.tokens is None:
                steps = [self._step(x0, x1, r)]
            else:
                groups = self.tokens.split(block.name, x0, x1, r, reduced=len(self.reductions) > 0)
                steps = [self._step(*group) for group in groups]
            for name, measure in self.measures.items():
                values = [check_values(name, measure(step), step.x0) for step in steps]
                self.rows[name].append(values[0] if self.tokens is None else self.tokens.join(values))
        if self.keep:
            self.steps += steps  # one, for nothing is measured

    def _step(self, x0: Tensor, x1: Tensor, r: Tensor | None, reductions: dict[str, Tensor] | None = None) -> Step:
        if self.reductions and reductions is None:
            reductions = euler_reductions(*(displaced(x0, x1) if r is None else mean_square_and_cosine(r)))
        if r is None and (self.keep or not self.all_reduced):
            r = x1 - x0
        return Step(float(len(self.visited) - 1), 1.0, x0, x1, () if r is None else (r,), EULER, reductions)

    def _by_sample(self, block: BlockSpec, x: Tensor) -> Tensor:
        """A state with its samples first; a copy where steps are kept and it is another view of what passes."""
        state = block.samples(x, self.samples or len(x))
        return state.clone() if self.keep and state is not x else state

    def records(self) -> Records:
        """The values of the measures."""
        values = {name: torch.stack(values) for name, values in self.rows.items()}
        tokens = None if self.tokens is None else self.tokens.positions()
        return Records(values, self.starts or (0,), numbered(self.names), tokens)

    def close(self) -> list[str]:
        """Learn which outputs have been written into since their steps ended.

        Returns:
            The blocks whose records have no gradients therefore.

        Raises:
            ValueError: a state of a step that is kept has been written into, and there is no copy of it.
        """
        later = []
        for end in self.ends:
            start, written = end.start, _version(end.x1) != end.version1
            name, outputs = start.key.block.name, self.in_place.outputs
            if written or start.key not in outputs:
                outputs[start.key] = written
            if self.keep:
                step = self.steps[end.number]
                if step.x0 is start.x0 and _version(start.x0) != end.version0:
                    unmoved = start.x0 is end.x1 and start.version == end.version0
                    step = step._replace(x0=_copied(end.copy if unmoved else start.copy, name))
                if step.x1 is end.x1 and written:
                    step = step._replace(x1=_copied(end.copy, name))
                self.steps[end.number] = step
            elif written and end.copy is None and self.needs_states:
                later.append(name)
        return later

    def sources(self) -> Iterator[Tensor]:
        """The states x0 of steps that are kept, as they pass, through which a loss of the output has gradients.

        Raises:
            ValueError: such a state is changed in place.
        """
        starts = {end.number: end.start for end in self.ends}
        for m, step in enumerate(self.steps):
            if (start := starts.get(m)) is None:  # a flow's own
                yield step.x0
                continue
            if start.version != _version(start.x0):
                raise ValueError(
                    f"block {start.key.block.name!r} has a state that is changed in place, of which there is no "
                    "gradient: give it and the layers after it inplace=False"
                )
            yield start.x0


def _changed(block: BlockSpec) -> ValueError:
    return ValueError(f"block {block.name!r} changes its input in place: give its first layers inplace=False")


def _copied(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(
            f"a state of block {name!r} is changed in place after it, and was not in earlier passes: call steps once "
            "more, or take record, which measures steps as they end"
        )
    return x


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    """A state that passes the end of a step in another shape, as rows of tokens, in that of its start."""
    return x.reshape(shape) if x.shape != shape and x.numel() == shape.numel() else x


def _memory(x: Tensor) -> Tensor:
    """The tensor itself, or that of which it is a view."""
    return x if x._base is None else x._base


def _version(x: Any) -> int:
    """How often the tensor has been changed in place, where that is counted."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
