"""Residual additions: where in a program a state meets a branch that is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from odenets.adapting.program.graph import Call, Node, Program
from odenets.adapting.program.operators import ELEMENTWISE, FUSED, JOINING, LINEAR, PACKED, SUMS

__all__ = ["Addition", "Found", "find_additions"]


@dataclass(eq=False, repr=False)
class Addition:
    """A residual addition.

    Attributes:
        node: the sum.
        x0: the state: an operand, or what it has grown by in the sum before.
        source: where the branch starts: the state, or that of which the state is a projection.
        x1: the sum, or what an elementwise function makes of it.
        projected: whether the state is a projection.
        region: what is computed between the source and the sum.
        branch: that part of it without the projection.
        summand: what is added to the state.
        within: further additions on the way from the source to the sum, which are part of the branch.
    """

    node: Node
    x0: Node
    source: Node
    x1: Node
    projected: bool
    region: frozenset[Node]
    branch: frozenset[Node]
    summand: Node
    within: list[Addition] = field(default_factory=list)

    @property
    def block(self) -> Call:
        """The innermost call in which the whole branch is computed."""
        chains = [one.call.chain for one in (*self.branch, self.node) if one.call is not None]
        return [calls[0] for calls in zip(*chains, strict=False) if all(call is calls[0] for call in calls)][-1]


@dataclass
class Found:
    """The residual additions of a program, and sums that are none: with the reason."""

    additions: list[Addition]
    others: list[tuple[Node, str]]


def find_additions(program: Program) -> Found:
    """The residual additions of a program, outermost ones, in their order.

    A sum is one where an operand, the state, is what another operand, the branch, is computed from with parameters; or
    where both are computed from one state, one of them by linear maps, norms and poolings alone, a projection.
    """
    others: list[tuple[Node, str]] = []
    additions: dict[Node, Addition] = {}
    for node in program.nodes:
        if node.fixed or not node.floating or node.op not in SUMS or _in_recorder(node):
            continue
        operands = _operands(node)
        if len(operands) < 2:
            continue
        addition = _residual(node, operands, additions)
        if isinstance(addition, Addition):
            additions[node] = addition
        elif addition:
            others.append((node, addition))
    return Found(_outermost(list(additions.values()), others), others)


def _in_recorder(node: Node) -> bool:
    return node.call is not None and any(call.recorder for call in node.call.chain)


def _operands(node: Node) -> list[Node]:
    """What is added up: operands of the shape of the sum that are floating."""
    if node.op == "sum":
        stacked = node.inputs[0].value if len(node.inputs) == 1 else None
        if stacked is None or stacked.op not in ("cat", "stack"):
            return []
        parts = [one.value for one in stacked.inputs]
        return [one for one in parts if _size(one) == _size(node)] if len(parts) > 1 else []
    first = node.inputs[:1] if node.op in FUSED else node.inputs
    operands = [one for one in first if one.shape == node.shape and one.floating]
    if node.op in FUSED and operands:
        operands.append(node)  # the branch is the operator itself
    return operands


def _size(node: Node) -> int:
    size = 1
    for n in node.shape:
        size *= n
    return size


def _residual(node: Node, operands: Sequence[Node], additions: dict[Node, Addition]) -> Addition | str:
    """The addition that a sum is, or the reason why it is none, "" if it has nothing of one."""
    minuends, reason = operands[:1] if node.op == "sub" else operands, ""
    for x in minuends:
        branches = [one for one in operands if one is not x]
        for state in (x.value, *_grown(x.value, node, additions)):
            between = [_between(state, one) if one is not node else _inputs_between(state, node) for one in branches]
            if state.op == "parameter" or not branches or not (all(between) or state is not x.value):
                continue
            if any(_continues(one.value, state, additions) for one in branches):
                reason = "a sum of two states"
            elif state is not x.value or any(map(_learned, between)):
                return _made(node, state, state, branches[0], False)
            else:
                reason = "a branch without parameters"
    if reason or len(operands) != 2 or operands[1] is node:
        return reason
    for x, branch in zip(minuends, operands[::-1], strict=False):
        for source in _projected_from(x.value):
            between = _between(source, branch)
            if not between or _between(x.value, branch):
                continue
            if not _nonlinear(between):
                reason = "a sum of two linear maps of one state"
            elif not _learned(between):
                reason = "a branch without parameters"
            else:
                return _made(node, x.value, source, branch, True)
    return reason


def _continues(x: Node, state: Node, additions: dict[Node, Addition]) -> bool:
    """Whether x is what steps that begin at a state make of it."""
    ends = {one.x1.value: one for one in additions.values() if not one.projected}
    while (addition := ends.get(x)) is not None:
        x = addition.x0.value
        if x is state:
            return True
    return False


def _made(node: Node, state: Node, source: Node, summand: Node, projected: bool) -> Addition:
    region = _between(source, node)
    projection = _between(source, state) if projected else frozenset()
    branch = frozenset(one for one in region - projection if one.value is not source.value)
    return Addition(node, state, source, _finished(node), projected, region, branch, summand)


def _grown(x: Node, node: Node, additions: dict[Node, Addition]) -> list[Node]:
    """The state of a sum to which only this one adds further, in the same module: ``x + f(x) + g(x)``."""
    before = additions.get(x)
    if before is None or before.projected or before.node.call is not node.call or _returned(x):
        return []
    others = [one for one in node.inputs if one.value is not x]
    if _users(x) != [node] or any(one.fixed or one.shape != node.shape for one in others):
        return []
    return [before.x0]


def _users(node: Node) -> list[Node]:
    """What is computed from a node, through what has the same elements."""
    users: list[Node] = []
    for user in node.users:
        users += _users(user) if user.same else [user]
    return users


def _finished(node: Node) -> Node:
    """The end of the step: what elementwise functions in the same module make of the sum, if nothing else reads it."""
    while True:
        users = _users(node)
        if len(users) != 1 or _returned(node):
            return node
        (user,) = users
        varying = [one for one in user.inputs if not one.fixed]
        within = user.call is not None and node.call is not None and node.call in user.call.chain
        if user.op not in ELEMENTWISE or user.shape != node.shape or len(varying) != 1 or not within:
            return node
        if user.op in ("mul", "div") and len(user.inputs) > 1 and any(one.shape for one in user.inputs if one.fixed):
            return node  # by a vector
        node = user


def _returned(node: Node) -> bool:
    return node.returned or any(_returned(user) for user in node.users if user.same)


def _between(source: Node, node: Node) -> frozenset[Node]:
    """What is computed from the source and goes into the node, which is among it; empty if it does not depend on it."""
    before: set[Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one in before or one.index <= source.index:
            continue
        before.add(one)
        stack += one.inputs
    reached: set[Node] = {source}
    for one in sorted(before, key=lambda one: one.index):
        if any(each in reached for each in one.inputs):
            reached.add(one)
    reached.discard(source)
    return frozenset(reached) if node in reached else frozenset()


def _inputs_between(state: Node, node: Node) -> frozenset[Node]:
    """The same of the factors of a product that an operator adds."""
    return frozenset().union(*(_between(state, one) for one in node.inputs[1:])) | (
        frozenset({node}) if any(_between(state, one) or one.value is state for one in node.inputs[1:]) else frozenset()
    )


def _learned(region: Iterable[Node]) -> bool:
    """Whether parameters go into the region: tensors, or weights that an operator holds by itself."""
    return any(one.op in PACKED or any(each.learned for each in one.inputs) for one in region)


def _nonlinear(region: Iterable[Node]) -> bool:
    products = [one for one in region if sum(not each.fixed for each in one.inputs) > 1 and one.op not in JOINING]
    return len(products) > 0 or any(one.op not in LINEAR for one in region)


def _projected_from(x: Node) -> list[Node]:
    """What a node is a linear map of, from the nearest on."""
    sources: list[Node] = []
    while x.op in LINEAR and len(varying := [*dict.fromkeys(one for one in x.inputs if not one.fixed)]) == 1:
        x = varying[0]
        if x.floating:
            sources.append(x)
    return sources


def _outermost(additions: list[Addition], others: list[tuple[Node, str]]) -> list[Addition]:
    """Without those within the branch of another; but for a sum over states that are used elsewhere too."""
    kept: list[Addition] = []
    for addition in sorted(additions, key=lambda one: -one.node.index):
        outer = next((one for one in kept if _lies_in(addition, one)), None)
        if outer is not None:
            outer.within.append(addition)
            continue
        inner = [one for one in additions if _lies_in(one, addition) and not _grows(one, addition)]
        if any(_escapes(one.x1, addition) for one in inner):
            others.append((addition.node, "a sum over several blocks whose states are used elsewhere too"))
            continue
        kept.append(addition)
    return kept[::-1]


def _lies_in(inner: Addition, outer: Addition) -> bool:
    """Whether an addition is within the branch of another, and begins there too: coupled states do not."""
    if inner is outer or inner.node not in outer.region:
        return False
    return inner.source is outer.source or inner.source.value in outer.region or inner.source in outer.region


def _grows(inner: Addition, outer: Addition) -> bool:
    return inner.x0 is outer.x0 and not outer.projected


def _escapes(x1: Node, addition: Addition) -> bool:
    """Whether a state within the branch is used outside it."""
    return _returned(x1) or any(user not in addition.region and not user.same for user in _users(x1))
