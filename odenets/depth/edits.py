"""Edits of depth: blocks of a network are duplicated and merged, and its optimizer follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.optim import Optimizer

from odenets import measures
from odenets.blocks import Block
from odenets.depth.optimizers import adopt_copy, check_held, follow_network, warn_of_unfollowed
from odenets.depth.rule import DepthRule, block_errors, check_rule, flow_network, plan
from odenets.flow import Flow
from odenets.inputs import call, inputs_of, samples_in
from odenets.modes import inputs_for
from odenets.network import Network
from odenets.neural_ode import NeuralODE
from odenets.normalization import StageBatchNorm, recalibrate

__all__ = [
    "DepthReport", "Edit", "adapt_depth", "check_makers", "copied", "editable", "editing", "not_finite_weights",
    "refine",
]  # fmt: skip


class Edit(NamedTuple):
    """One change of depth; as text, a line to read.

    >>> print(Edit("duplicate", flow=0, block=2, error=0.03, h=(0.5, 0.25)))
    flow 0 block 2: duplicated, error 0.03, h 0.5 -> 0.25

    Attributes:
        kind: "duplicate", "merge", "undo" (a merge that breaks the tolerance is taken back), or "stack" (a copy comes
            on top of all blocks).
        flow: index of the flow.
        block: index of the block, counted before this round of edits.
        error: the error that decided; NaN where none did.
        h: step size of the block before and after.
    """

    kind: Literal["duplicate", "merge", "undo", "stack"]
    flow: int
    block: int
    error: float
    h: tuple[float, float]

    def __str__(self) -> str:
        h, new = self.h
        what = {
            "duplicate": "duplicated",
            "merge": "merged with the next",
            "undo": "merge taken back",
            "stack": "copied on top",
        }[self.kind]
        error = "" if math.isnan(self.error) else f"error {self.error:.3g}, "
        return f"flow {self.flow} block {self.block}: {what}, {error}h {h:g} -> {new:g}"


@dataclass(frozen=True)
class DepthReport:
    """The result of :func:`adapt_depth`.

    >>> report = DepthReport(errors=[[0.02, 0.001]], edits=[], evaluations=400)
    >>> report.errors[0][1]  # of flow 0, block 1
    0.001

    Attributes:
        errors: the errors that decided, one list per flow.
        edits: the edits, in order.
        evaluations: field evaluations per sample, summed over all samples, spent on measuring and recalibrating.
    """

    errors: list[list[float]]
    edits: list[Edit]
    evaluations: int


def adapt_depth(
    network: Network,
    inputs: Callable[[], Iterable[Any]],
    rule: DepthRule,
    optimizer: Optimizer | None = None,
    *,
    recalibration: Callable[[], Iterable[Any]] | None = None,
) -> DepthReport:
    """Apply the rule once to every flow: blocks with a large error are duplicated, those with a small one merged.

    All edits are decided on one snapshot of the errors; the network is then measured again, and a merge after which
    the block's error exceeds the tolerance is taken back (the "redo" of [K24, A.3]). Merges never cross a flow.

    Args:
        network: changed in place. Its first and last blocks stay; a flow keeps at least one block and its total time.
        inputs: a function that makes the validation inputs anew at each call, batches of inputs or of pairs
            ``(inputs, labels)``, whose labels are not read, such as ``lambda: loader``.
        rule: when to add and remove blocks.
        optimizer: its state follows the blocks: a copy gets its original's momentum or moments, a block that goes
            takes its state along, and the parameters of each group end up in the network's order. Without it, build
            the optimizer anew after an edit.
        recalibration: a function that makes inputs on which batch norms are recalibrated after an edit, and before the
            errors are measured; if not given, those of ``inputs``.

    Returns:
        The errors, a readable list of edits, and what the checks cost.

    Copies of the network that were taken before, such as averages of its weights, keep the depth that they have: take
    them anew. After an error nothing is edited.

    Raises:
        TypeError: another network, no :class:`DepthRule`, or no function that makes batches of inputs.
        ValueError: a flow is a neural ODE, shared or used twice, or its method has no embedded error; weights are not
            finite, which no step size mends; the optimizer is of another network, or keeps state that is not of one
            parameter (LBFGS); or no batch.

    Warns:
        UserWarning: an optimizer that is not given holds parameters of the network, and not all of them any more.

    >>> from odenets.models import points_network
    >>> network = points_network(solver="bs23", total_time=1.0, depth=3)
    >>> report = adapt_depth(network, lambda: [torch.rand(50, 2)], DepthRule(tolerance=1e-9))
    >>> network.depth, [edit.kind for edit in report.edits], round(sum(network.h), 6)
    (6, ['duplicate', 'duplicate', 'duplicate'], 1.0)
    """
    network = _checked(network, optimizer, rule)
    makers = {"inputs": inputs, "recalibration": recalibration or inputs}
    check_makers(**makers)
    spent = 0

    def counted(name: str) -> Iterator[Any]:
        nonlocal spent
        for x in inputs_of(makers[name](), name):
            spent += samples_in(x) * sum(flow.evaluations_per_pass(closing=True) for flow in network.flows)
            yield x

    def renew() -> None:
        def record(x: Any) -> None:
            call(network.record, inputs_for(network, x), error=measures.error)

        recalibrate(network, counted("recalibration"), record)

    before = set(network.parameters())
    renew()
    errors = block_errors(network, counted("inputs"), rule.norm)
    with editing(network, optimizer):
        edits, merges = _edit(network, errors, rule, optimizer)
        if merges:
            renew()
            after = block_errors(network, counted("inputs"), rule.norm)
            for merge in reversed(merges):  # from the last on, so that positions stay valid
                error = after[merge.edit.flow][list(merge.flow.blocks).index(merge.block)]
                if not error <= rule.tolerance:
                    edits.append(merge.undo(error))
    if edits:
        renew()
        if optimizer is None:
            warn_of_unfollowed(network, before)
    return DepthReport(errors, edits, spent)


def refine(network: Network, rule: DepthRule, optimizer: Optimizer | None = None) -> list[Edit]:
    """Duplicate every block that the caps allow, as if all errors were too large; what to do when training diverges.

    Args:
        network: changed in place: twice as many blocks with half of their step sizes each.
        rule: its largest depth and smallest step size.
        optimizer: its state follows the blocks, as for :func:`adapt_depth`.

    Returns:
        The edits; none where the caps allow none.

    Raises:
        TypeError, ValueError: as for :func:`adapt_depth`.

    >>> from odenets.models import points_network
    >>> network = points_network(solver="bs23", total_time=1.0, depth=2)
    >>> print(*refine(network, DepthRule(tolerance=1e-3)), sep=", ")
    flow 0 block 0: duplicated, error inf, h 0.5 -> 0.25, flow 0 block 1: duplicated, error inf, h 0.5 -> 0.25
    """
    network = _checked(network, optimizer, rule)
    with editing(network, optimizer):
        return _edit(network, [[math.inf] * flow.depth for flow in network.flows], rule, optimizer)[0]


def check_makers(**makers: object) -> None:
    """That some arguments are functions that make inputs.

    Raises:
        TypeError: one is not.
    """
    for name, make in makers.items():
        if not callable(make):
            raise TypeError(f"{name} must be a function that makes inputs anew at each call, got {type(make).__name__}")


def _checked(network: nn.Module, optimizer: Optimizer | None, rule: object) -> Network:
    """The network, if its blocks can be edited by the rule."""
    network = flow_network(network)
    check_rule(rule)
    network = editable(network, optimizer)
    for flow in network.flows:
        _ = flow.tableau.error_order
    return network


def editable(network: nn.Module, optimizer: Optimizer | None) -> Network:
    """The network, if its blocks can be edited and the optimizer can follow.

    Raises:
        TypeError: it has no flows.
        ValueError: a flow is a neural ODE, shared or used twice, weights are not finite, or the optimizer is of another
            network, or keeps state that is not of one parameter (LBFGS).
    """
    network = flow_network(network)
    for i, flow in enumerate(network.flows):
        if isinstance(flow, NeuralODE) or flow.shared:
            raise ValueError(f"flow {i} has one field for all its steps: depth edits need a field per block")
    blocks = [block for flow in network.flows for block in flow.blocks]
    if len({*network.flows}) < len(network.flows) or len({*blocks}) < len(blocks):
        raise ValueError("network uses a flow or a block twice: depth edits need each once")
    if bad := not_finite_weights(network):
        raise ValueError(
            f"network has weights that are not finite, which no step size mends: {', '.join(bad[:4])}"
            f"{' ...' * (len(bad) > 4)}; go back to a checkpoint before they were"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must keep its state by parameter, which LBFGS does not: take SGD or Adam")
    if optimizer is not None:
        check_held(optimizer, network)
    return network


def not_finite_weights(network: nn.Module) -> list[str]:
    """The parameters and buffers that are not finite, but for the statistics of batch norms, which are taken anew."""
    norms = [m for m in network.modules() if isinstance(m, StageBatchNorm | nn.modules.batchnorm._BatchNorm)]
    anew = {id(buffer) for norm in norms for buffer in norm.buffers()}
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [
        name
        for name, tensor in tensors
        if not nn.parameter.is_lazy(tensor) and id(tensor) not in anew and not tensor.detach().isfinite().all()
    ]


@dataclass(frozen=True, kw_only=True)
class _Merge:
    """A block that has taken the time of the one that followed it."""

    flow: Flow
    block: Block
    following: Block
    edit: Edit

    def undo(self, error: float) -> Edit:
        """Take the merge back, after which the block has this error."""
        before, after = self.edit.h
        self.block.h = before
        blocks = list(self.flow.blocks)
        blocks.insert(blocks.index(self.block) + 1, self.following)
        self.flow.replace_blocks(blocks)
        return Edit("undo", self.edit.flow, self.edit.block, error, (after, before))


def _blocks(flow: Flow) -> list[Block]:
    return [cast(Block, block) for block in flow.blocks]


def copied(block: Block, network: Network, optimizer: Optimizer | None) -> Block:
    """A copy of a block, which shares what that shares with the rest of the network; the optimizer adopts it."""
    twin = block.copy_within(network)
    if optimizer is not None:
        adopt_copy(optimizer, block, twin)
    return twin


@contextmanager
def editing(network: Network, optimizer: Optimizer | None) -> Iterator[None]:
    """Let the optimizer follow what happens to the blocks; after an exception they are what they were."""
    before = {flow: [(block, block.h) for block in _blocks(flow)] for flow in network.flows}
    groups = optimizer.param_groups if optimizer is not None else []
    others = {p for group in groups for p in group["params"]} - set(network.parameters())
    try:
        yield
    except BaseException:
        for flow, blocks in before.items():
            for block, h in blocks:
                block.h = h
            flow.replace_blocks([block for block, _ in blocks])
        raise
    finally:
        if optimizer is not None:
            follow_network(optimizer, network, others)


def _edit(
    network: Network, errors: list[list[float]], rule: DepthRule, optimizer: Optimizer | None
) -> tuple[list[Edit], list[_Merge]]:
    """Apply the plan of the rule to the blocks of every flow."""
    edits: list[Edit] = []
    merges: list[_Merge] = []
    for i, flow in enumerate(network.flows):
        old, blocks = _blocks(flow), []
        decisions = plan(errors[i], flow.h, rule)
        for m, block in enumerate(old):
            if m and decisions[m - 1] == "merge":
                continue  # into the block before
            blocks.append(block)
            if decisions[m] == "duplicate":
                edits.append(Edit("duplicate", i, m, errors[i][m], (block.h, block.h / 2)))
                block.h /= 2
                blocks.append(copied(block, network, optimizer))
            elif decisions[m] == "merge":
                following = old[m + 1]
                edits.append(Edit("merge", i, m, errors[i][m], (block.h, block.h + following.h)))
                merges.append(_Merge(flow=flow, block=block, following=following, edit=edits[-1]))
                block.h += following.h
        flow.replace_blocks(blocks)
    return edits, merges
