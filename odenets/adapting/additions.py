"""Residual additions: where in a program a state meets a branch that is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from odenets.adapting.program import Call, Node, Program

__all__ = ["Addition", "Found", "find_additions"]

LINEAR = frozenset(
    "convolution _convolution conv1d conv2d conv3d linear linear_dynamic addmm mm matmul mkldnn_convolution "
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm "
    "native_layer_norm layer_norm native_group_norm group_norm rms_norm _fused_rms_norm instance_norm "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d mean "
    "max_pool2d_with_indices max_pool3d_with_indices max_pool2d quantized_max_pool2d quantized_max_pool1d "
    "constant_pad_nd pad reflection_pad2d replication_pad2d slice select narrow index index_select split "
    "split_with_sizes chunk unbind permute transpose t as_strided view _unsafe_view reshape clone expand repeat "
    "unsqueeze squeeze flatten contiguous detach alias cat _to_copy to roll flip pixel_shuffle pixel_unshuffle "
    "upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d mul div neg add sub dropout written".split()
)
"""Operators that are linear, a norm or a pooling in what depends on the input, where that is one operand: shortcuts."""

ELEMENTWISE = frozenset(
    "relu relu6 gelu silu hardswish hardtanh leaky_relu elu selu celu tanh sigmoid hardsigmoid mish softplus clamp "
    "clamp_min _prelu_kernel prelu mul div".split()
)
"""Operators on a sum that belong to its step, of one operand that depends on the input."""

JOINING = frozenset({"add", "sub", "cat", "stack", "written"})
"""Operators that are linear in several operands together."""

SUMS = frozenset({"add", "sub", "addcmul", "addmm", "baddbmm", "sum", "add_relu"})


@dataclass(eq=False)
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
    first = node.inputs[:1] if node.op in ("addcmul", "addmm", "baddbmm") else node.inputs
    operands = [one for one in first if one.shape == node.shape and one.floating]
    if node.op in ("addcmul", "addmm", "baddbmm") and operands:
        operands.append(node)  # the branch is the operator itself
    return operands


def _size(node: Node) -> int:
    size = 1
    for n in node.shape:
        size *= n
    return size


def _residual(node: Node, operands: Sequence[Node], additions: dict[Node, Addition]) -> Addition | str:
    minuends = operands[:1] if node.op == "sub" else operands
    for x in minuends:
        branches = [one for one in operands if one is not x]
        for state in (x.value, *_grown(x.value, node, additions)):
            if state.op == "parameter":
                continue
            between = [_between(state, branch) if branch is not node else _inputs_between(state, node) for branch in branches]
            if all(between) and any(map(_learned, between)):
                return _made(node, state, state, branches[0], False)
    reason = ""
    for x in minuends:
        branches = [one for one in operands if one is not x and one is not node]
        if len(branches) != 1:
            continue
        for source in _projected_from(x.value):
            between = [_between(source, branches[0])]
            if not between[0]:
                continue
            if not any(map(_nonlinear, between)):
                reason = "a sum of two linear maps of one state"
            elif not any(map(_learned, between)):
                reason = "a branch without parameters"
            else:
                return _made(node, x.value, source, branches[0], True)
    return reason


def _made(node: Node, state: Node, source: Node, summand: Node, projected: bool) -> Addition:
    region = _between(source, node)
    projection = _between(source, state) if projected else frozenset()
    branch = frozenset(one for one in region - projection if one.value is not source.value)
    return Addition(node, state, source, _finished(node), projected, region, branch, summand)


def _grown(x: Node, node: Node, additions: dict[Node, Addition]) -> list[Node]:
    """The state of a sum to which only this one adds further: ``x + f(x) + g(x)``."""
    before = additions.get(x)
    if before is None or before.projected or any(user is not node and not user.same for user in _users(x)):
        return []
    return [before.x0]


def _users(node: Node) -> list[Node]:
    """What is computed from a node, through what has the same elements."""
    users: list[Node] = []
    for user in node.users:
        users += _users(user) if user.same else [user]
    return users


def _finished(node: Node) -> Node:
    """The end of the step: what elementwise functions make of the sum, within its module, where nothing else reads it."""
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
    """What is computed from the source, and goes into the node, the node among it; empty if it does not depend on it."""
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
    return any(one.op in _HOLDERS or any(each.learned for each in one.inputs) for one in region)


_HOLDERS = frozenset({"linear_dynamic", "linear", "conv2d", "conv1d", "conv3d", "conv2d_relu", "linear_relu"})
"""Operators on packed weights."""


def _nonlinear(region: Iterable[Node]) -> bool:
    products = [one for one in region if sum(not each.fixed for each in one.inputs) > 1 and one.op not in JOINING]
    return len(products) > 0 or any(one.op not in LINEAR for one in region)


def _projected_from(x: Node) -> list[Node]:
    """What a node is a linear map of, from the nearest on."""
    sources: list[Node] = []
    while x.op in LINEAR and len(varying := [one for one in x.inputs if not one.fixed]) == 1:
        x = varying[0]
        if x.floating:
            sources.append(x)
    return sources


def _outermost(additions: list[Addition], others: list[tuple[Node, str]]) -> list[Addition]:
    """Without those within the branch of another; but for a sum over states that are used elsewhere too."""
    kept: list[Addition] = []
    for addition in sorted(additions, key=lambda one: -one.node.index):
        outer = next((one for one in kept if addition.node in one.region), None)
        if outer is not None:
            outer.within.append(addition)
            continue
        inner = [one for one in additions if one is not addition and one.node in addition.region]
        inner = [one for one in inner if not _grows(one, addition)]
        if any(_escapes(one.x1, addition) for one in inner):
            others.append((addition.node, "a sum over several blocks whose states are used elsewhere too"))
            continue
        kept.append(addition)
    return kept[::-1]


def _grows(inner: Addition, outer: Addition) -> bool:
    return inner.x0 is outer.x0 and not outer.projected


def _escapes(x1: Node, addition: Addition) -> bool:
    """Whether a state within the branch is used outside it."""
    return _returned(x1) or any(user not in addition.region and not user.same for user in _users(x1))
