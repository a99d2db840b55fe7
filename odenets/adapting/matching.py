"""From the residual additions of a program to the places where their states can be seen in every pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count

from torch import nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.program.additions import Addition
from odenets.adapting.program.graph import Call, Node, Passage, Program
from odenets.adapting.program.places import Place
from odenets.adapting.rules import HALVES, kind_of

__all__ = ["Match", "match"]


@dataclass(frozen=True)
class Match:
    """Where the steps of a program can be seen.

    Attributes:
        steps: each step of the pass, in order: its specification and its addition.
        times: when each of them ends.
        hidden: the additions whose states pass no place that tells them apart.
    """

    steps: tuple[tuple[BlockSpec, Addition], ...]
    times: tuple[int, ...]
    hidden: tuple[Addition, ...]

    @property
    def specs(self) -> tuple[BlockSpec, ...]:
        """The specifications, each once, in the order in which they are first met."""
        return tuple(dict.fromkeys(spec for spec, _ in self.steps))


def match(model: nn.Module, program: Program, additions: Sequence[Addition]) -> Match:
    """Where the states of the residual additions of a ``model`` pass, borders of modules before those of functions.

    Args:
        model: whose program it is.
        program: one pass.
        additions: the residual additions in it.

    Returns:
        A specification for each step.
    """
    index = _Index(program)
    groups: dict[tuple[object, ...], list[Addition]] = defaultdict(list)
    for addition in additions:
        block = addition.block
        site = addition.node.site
        groups[block.name, site or _ordinal(addition, additions), _branch(model, addition)].append(addition)
    specs: dict[Addition, BlockSpec] = {}
    alone = {key: index.places_of(group) for key, group in groups.items()}
    for key, places in alone.items():
        if places is not None:
            specs |= dict.fromkeys(groups[key], _spec(model, index, groups[key][0], str(key[2]), *places))
    for key in [key for key, places in alone.items() if places is None]:  # one sum of several branches in turn
        group = [one for other, each in groups.items() if other[:2] == key[:2] for one in each]
        group.sort(key=lambda one: one.node.index)
        if (places := index.places_of(group)) is not None:
            specs |= dict.fromkeys(group, _spec(model, index, group[0], "", *places))
    seen = sorted(specs, key=lambda one: index.end_of(one, specs[one]))
    steps = [(specs[addition], addition) for addition in seen]
    times = tuple(index.end_of(one, specs[one]) for one in seen)
    return Match(tuple(_named(model, steps)), times, tuple(one for one in additions if one not in specs))


def _ordinal(addition: Addition, additions: Iterable[Addition]) -> int:
    block = addition.block
    return [one for one in additions if one.block is block].index(addition)


class _Index:
    """What passes each place, in order."""

    def __init__(self, program: Program) -> None:
        self.by_place: dict[Place, list[Passage]] = defaultdict(list)
        self.by_value: dict[Node, list[Passage]] = defaultdict(list)
        for passage in program.passages:
            self.by_place[passage.place].append(passage)
            self.by_value[passage.node.value].append(passage)

    def places_of(self, group: Sequence[Addition]) -> tuple[Place, Place] | None:
        """Where x0 and x1 of all additions of a group pass, and nothing else in between."""
        expected = [(one.x0.value, one.x1.value) for one in group]
        first = group[0]
        starts, ends = [*self._starts(first)], [*self._ends(first)]
        pairs = [(start, end) for start in starts for end in ends]
        pairs.sort(key=lambda pair: sum(not place.is_module for place in pair))  # stable
        return next((pair for pair in pairs if self._seen(*pair) == expected), None)

    def _starts(self, addition: Addition) -> Iterator[Place]:
        """Where x0 passes before the sum, the input of the block first, then what is nearest to the sum."""
        passages = [one for one in self.by_value[addition.x0.value] if one.time <= addition.node.index]
        yield from dict.fromkeys(one.place for one in _nearest(passages[::-1], addition.block, "input"))

    def _ends(self, addition: Addition) -> Iterator[Place]:
        """Where x1 passes, the output of the block first, then what comes first."""
        passages = [one for one in self.by_value[addition.x1.value] if one.time >= addition.x1.value.index]
        yield from dict.fromkeys(one.place for one in _nearest(passages, addition.block, "output"))

    def branch_of(self, addition: Addition) -> Place | None:
        """Where the summand passes last before the sum, at the border of a module."""
        passages = [one for one in self.by_value[addition.summand.value] if one.time <= addition.node.index]
        return next((one.place for one in passages[::-1] if one.place.is_module and one.place.side == "output"), None)

    def end_of(self, addition: Addition, spec: BlockSpec) -> int:
        """When x1 of an addition passes the end of its step."""
        times = [one.time for one in self.by_place[spec.ends[0]] if one.node.value is addition.x1.value]
        return min(time for time in times if time >= addition.x1.value.index)

    def _seen(self, start: Place, end: Place) -> list[tuple[Node, Node]]:
        """The states that hooks at two places take for x0 and x1 of steps."""
        events = [(one.time, 1, one.node) for one in self.by_place[start]]
        events += [(one.time, 0, one.node) for one in self.by_place[end]]
        steps, begun = [], None
        for _, starts, node in sorted(events, key=lambda event: event[:2]):
            if starts:
                begun = node.value
            elif begun is not None:
                steps.append((begun, node.value))
                begun = None
        return steps


def _nearest(passages: Sequence[Passage], block: Call, side: str) -> list[Passage]:
    """Borders of the block itself first, then those within it, then others."""

    def rank(passage: Passage) -> int:
        if not passage.place.is_module:
            return 3
        if passage.call is block:
            return 0 if passage.place.side == side else 1
        return 1 if block in passage.call.chain else 2

    return sorted(passages, key=rank)


def _branch(model: nn.Module, addition: Addition) -> str:
    """The part of the block that holds most of the parameters of the branch, "" where that is none."""
    block = addition.block
    depth = len(block.chain)
    calls = [one.call.chain for one in sorted(addition.branch, key=lambda one: one.index) if one.call is not None]
    parts = dict.fromkeys(chain[depth].name for chain in calls if len(chain) > depth and chain[depth - 1] is block)
    sizes = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in parts}
    return max(sizes, key=sizes.__getitem__, default="")


def _spec(model: nn.Module, index: _Index, addition: Addition, name: str, start: Place, end: Place) -> BlockSpec:
    block = addition.block.name
    rule = kind_of(model.get_submodule(block)) if block else None
    projection = None
    if addition.projected:
        projection = str(start.of) if start.is_module and start.side == "output" else ""
    branch = index.branch_of(addition) if addition.x1 is not addition.node else None
    return BlockSpec(name, block, rule.kind if rule else "residual", start, (end,), projection, branch)


def _named(model: nn.Module, steps: Sequence[tuple[BlockSpec, Addition]]) -> Iterator[tuple[BlockSpec, Addition]]:
    """The steps with the names of their blocks: steps of blocks within each other are of the outer one."""
    specs = list(dict.fromkeys(spec for spec, _ in steps))
    outer = {spec: _outer(spec.block, [one.block for one in specs]) for spec in specs}
    together: dict[str, list[BlockSpec]] = defaultdict(list)
    for spec in specs:
        together[outer[spec]].append(spec)
    named: dict[BlockSpec, BlockSpec] = {}
    for block, of_block in together.items():
        rule = kind_of(model.get_submodule(block)) if block else None
        halves = rule.halves if rule and rule.halves != HALVES and len(of_block) == 2 else None
        for i, spec in enumerate(of_block):
            part = spec.block if spec.block != block else spec.name  # the branch, so far
            part = part.removeprefix(f"{block}.") if block else part
            name = block if len(of_block) == 1 and block else f"{block} {halves[i] if halves else part}".strip()
            kind = rule.kind if rule else spec.kind
            before = [one.name for one in named.values()]
            name = _unlike(name or "sum", before)
            named[spec] = replace(spec, name=name, block=block or part, kind=kind)
    for spec, addition in steps:
        yield named[spec], addition


def _unlike(name: str, others: Sequence[str]) -> str:
    """A name with a number where others have it."""
    return next(one for one in chain([name], (f"{name} {n}" for n in count(2))) if one not in others)


def _outer(block: str, blocks: Iterable[str]) -> str:
    """The outermost of the blocks in which one lies; the model itself is none."""
    return min((one for one in blocks if one and (one == block or block.startswith(f"{one}."))), key=len, default=block)
