"""Adaptive depth: the embedded error of each block adds and removes blocks while training (section 6.2.1, A.3).

With ``e_m`` the embedded error of block m on validation data in eval mode, its root mean square over the features,
averaged over the samples:

- ``e_m > eps`` (or not finite): ``(theta_m, h_m)`` becomes two blocks ``(theta_m, h_m / 2)``;
- ``e_m < eps / K``: ``h_m`` becomes ``h_m + h_{m+1}`` and block m + 1 goes, unless that one needs refining;
- else the block is kept.

Every edit keeps the total time. Doubling h multiplies the error of a tied BS23 block by 8 where its field is smooth
(SiLU, the default of MLP fields); fields with ReLU, the default of convolutional ones, have kinks, and their error
grows by 5.5 to 5.8 only. With K = 8 two blocks of one h that merge stay within the tolerance in either case; a smaller
K merges more blocks with ReLU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.blocks import Block
from odenets.flow import Flow
from odenets.modes import evaluating, inputs_for
from odenets.network import Network
from odenets.normalization import StageBatchNorm, recalibrate
from solvers import Step

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["AdaptiveDepth", "DepthReport", "DepthRule", "Edit", "adapt_depth", "block_errors", "plan", "refine"]


class Edit(NamedTuple):
    """One change of depth, as it happened.

    Attributes:
        kind: "duplicate", "merge" or "undo" (a merge taken back because it broke the tolerance).
        flow: index of the flow.
        block: index of the block, counted before this round of edits.
        error: the error that decided.
        h: step size of the block before and after.
    """

    kind: Literal["duplicate", "merge", "undo"]
    flow: int
    block: int
    error: float
    h: tuple[float, float]

    def __str__(self) -> str:
        h, new = self.h
        what = {"duplicate": "duplicated", "merge": "merged with the next", "undo": "merge taken back"}[self.kind]
        return f"flow {self.flow} block {self.block}: {what}, error {self.error:.3g}, h {h:g} -> {new:g}"


@dataclass(frozen=True)
class DepthReport:
    """What :func:`adapt_depth` found and did.

    Attributes:
        errors: the snapshot of errors that decided, one list per flow.
        edits: the edits, in order.
        evaluations: field evaluations per sample, summed over all samples, spent on measuring and recalibrating.
    """

    errors: list[list[float]]
    edits: list[Edit]
    evaluations: int


@dataclass(frozen=True)
class DepthRule:
    """When to change the depth.

    Attributes:
        tolerance: eps, the largest error of a block.
        K: merge below ``tolerance / K``; what doubling h multiplies the error of a block by, or more. For tied BS23
            blocks that is 8 with smooth fields, and 5.5 to 5.8 with ReLU; 3 suits untied ones, for which it is 2.
        max_depth: largest number of blocks per flow.
        min_h: smallest step size.
        norm: "rms" over the features, independent of the dimension, or "raw" for the thesis' 2-norm.
    """

    tolerance: float
    K: float = 8.0
    max_depth: int = 32
    min_h: float = 1e-3
    norm: Literal["rms", "raw"] = "rms"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance must be positive and finite, got {self.tolerance}")
        if not self.K > 1:
            raise ValueError(f"K must be greater than 1, got {self.K}")
        if not self.max_depth >= 1:
            raise ValueError(f"max_depth must be at least 1, got {self.max_depth}")
        if not self.min_h >= 0:
            raise ValueError(f"min_h must not be negative, got {self.min_h}")
        if self.norm not in ("rms", "raw"):
            raise ValueError(f"norm must be 'rms' or 'raw', got {self.norm!r}")


@torch.no_grad()
def block_errors(network: Network, batches: Iterable[Tensor], norm: str = "rms") -> list[list[float]]:
    """Mean embedded error of every block on ``batches``, in eval mode; the modes of its modules are restored.

    Args:
        network: a network of discrete flows whose method has an embedded error.
        batches: inputs, each ``(B, ...)``, taken to the network's device and dtype.
        norm: "rms" over the features of a sample, or "raw", their 2-norm.

    Returns:
        One list per flow, one error per block; infinite where any sample's is not finite.

    Raises:
        TypeError: another network, or one tensor in place of batches.
        ValueError: no batch, another norm, a continuous flow or one without embedded error, or batch norms that have
            statistics of some stages only: training does not take the closing stage, which the error reads, so that
            they are to be recalibrated before.
    """
    network = _editable(network)
    if norm not in ("rms", "raw"):
        raise ValueError(f"norm must be 'rms' or 'raw', got {norm!r}")
    for i, flow in enumerate(network.flows):
        if flow.continuous:
            raise ValueError(f"flow {i} is continuous: its steps are no blocks")
    if isinstance(batches, Tensor):
        raise TypeError("batches must hold inputs, tensors (B, ...), got one tensor: pass [x]")
    errors, starts = [], (0,)
    with evaluating(network):
        for x in batches:
            _, records = network.record(inputs_for(network, x), error=_raw_error if norm == "raw" else measures.error)
            errors.append(records["error"])
            starts = records.starts
    if not errors:
        raise ValueError("batches must hold at least one batch to measure the error on")
    values = torch.cat(errors, 1).cpu().double().mean(1).tolist()
    return [
        [e if math.isfinite(e) else math.inf for e in values[start:end]]
        for start, end in pairwise([*starts, len(values)])
    ]


def _raw_error(step: Step) -> Tensor:
    """The 2-norm of the embedded error over the features, ``(B,)``."""
    return measures.error(step) * math.sqrt(math.prod(step.x0.shape[1:]))


def plan(errors: Sequence[float], h: Sequence[float], rule: DepthRule) -> list[Literal["keep", "duplicate", "merge"]]:
    """What becomes of each block of a flow, decided on one snapshot, left to right, each block touched once.

    A block marked "merge" absorbs the next one, which is marked "keep" and not looked at again.

    Raises:
        ValueError: errors and h are not of one length.
    """
    if len(errors) != len(h):
        raise ValueError(f"errors and h must hold a number per block, got {len(errors)} and {len(h)}")
    decisions: list[Literal["keep", "duplicate", "merge"]] = ["keep"] * len(errors)
    depth = len(errors)
    absorbed = False
    for m, error in enumerate(errors):
        if absorbed:
            absorbed = False
            continue
        if not error <= rule.tolerance:
            if depth < rule.max_depth and h[m] / 2 >= rule.min_h:
                decisions[m] = "duplicate"
                depth += 1
        elif error < rule.tolerance / rule.K and m + 1 < len(errors) and errors[m + 1] <= rule.tolerance:
            decisions[m] = "merge"  # which may be taken back: what it frees is free in the next round
            absorbed = True
    return decisions


def adapt_depth(
    network: Network,
    batches: Callable[[], Iterable[Tensor]],
    rule: DepthRule,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    recalibration: Callable[[], Iterable[Tensor]] | None = None,
) -> DepthReport:
    """Apply the rule once to every flow of a network.

    All edits are decided on one snapshot of the errors; the network is then measured again, and a merge after which
    the block's error exceeds the tolerance is taken back (the "redo" of A.3). Merges never cross a flow.

    Args:
        network: changed in place. Its first and last blocks stay; a flow keeps at least one block and its total time.
        batches: makes the validation inputs anew at each call.
        rule: the rule.
        optimizer: its state follows the blocks: a copy gets its original's momentum or moments, a block that goes
            takes its state along, and the parameters of each group end up in the network's order.
        recalibration: makes inputs on which batch norms are recalibrated after an edit, and before the errors are
            measured; if not given, those of ``batches``.

    Returns:
        :class:`DepthReport`: errors, a readable list of edits, and what the checks cost.

    Copies of the network that were taken before, such as averages of its weights, keep the depth that they have: take
    them anew. After an error nothing is edited.

    Raises:
        TypeError: another network.
        ValueError: a flow is continuous, shared or used twice, or its method has no embedded error; weights are not
            finite, which no step size mends; or the optimizer keeps state that is not of one parameter (LBFGS).
    """
    network = _checked(network, optimizer)
    for name, make in {"batches": batches, "recalibration": recalibration or batches}.items():
        if not callable(make):
            raise TypeError(f"{name} must be a function that makes inputs anew at each call, got {type(make).__name__}")
    spent = 0

    def counted(inputs: Iterable[Tensor]) -> Iterator[Tensor]:
        nonlocal spent
        before = spent
        for x in inputs:
            spent += len(x) * sum(flow.evaluations_per_pass(closing=True) for flow in network.flows)
            yield x
        if spent == before:
            raise ValueError("batches and recalibration must make at least one batch of inputs at each call")

    def renew() -> None:
        recalibrate(network, counted((recalibration or batches)()), lambda x: network.record(x, error=measures.error))

    renew()
    errors = block_errors(network, counted(batches()), rule.norm)
    edits: list[Edit] = []
    merged: list[tuple[Flow, Block, int, Edit, list[Block]]] = []
    with _editing(network, optimizer):
        for i, flow in enumerate(network.flows):
            flow_edits, undo = _apply(flow, i, errors[i], plan(errors[i], flow.h, rule), optimizer)
            edits += flow_edits
            merged += [(flow, block, i, edit, old) for block, edit, old in undo]
        if merged:
            renew()
            after = block_errors(network, counted(batches()), rule.norm)
            for flow, block, i, edit, old in reversed(merged):  # from the last on, so that positions stay valid
                m = list(flow.blocks).index(block)
                if not after[i][m] <= rule.tolerance:
                    block.h = edit.h[0]
                    _set_blocks(flow, [*flow.blocks[:m], *old, *flow.blocks[m + 1 :]])
                    edits.append(Edit("undo", i, edit.block, after[i][m], (edit.h[1], edit.h[0])))
    if edits:
        renew()
    return DepthReport(errors, edits, spent)


def refine(network: Network, rule: DepthRule, optimizer: torch.optim.Optimizer | None = None) -> list[Edit]:
    """Duplicate every block that the caps allow, as if all errors were too large; what to do when training diverges.

    Raises:
        TypeError, ValueError: as for :func:`adapt_depth`.
    """
    network = _checked(network, optimizer)
    edits: list[Edit] = []
    with _editing(network, optimizer):
        for i, flow in enumerate(network.flows):
            errors = [math.inf] * flow.depth
            edits += _apply(flow, i, errors, plan(errors, flow.h, rule), optimizer)[0]
    return edits


def _editable(network: nn.Module) -> Network:
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    if not isinstance(network, Network):
        raise TypeError(f"network must be an odenets.Network, whose flows can be edited, got {type(network).__name__}")
    return network


def _checked(network: nn.Module, optimizer: torch.optim.Optimizer | None) -> Network:
    """The network, if its blocks can be edited."""
    network = _editable(network)
    for i, flow in enumerate(network.flows):
        if flow.continuous or flow.shared:
            raise ValueError(f"flow {i} has one field for all its steps: depth edits need a field per block")
        _ = flow.tableau.error_order
    blocks = [block for flow in network.flows for block in flow.blocks]
    if len({*network.flows}) < len(network.flows) or len({*blocks}) < len(blocks):
        raise ValueError("network uses a flow or a block twice: depth edits need each once")
    if bad := _not_finite(network):
        raise ValueError(
            f"network has weights that are not finite, which no step size mends: {', '.join(bad[:4])}"
            f"{' ...' * (len(bad) > 4)}; go back to a checkpoint before they were"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must keep its state by parameter, which LBFGS does not: take SGD or Adam")
    return network


def _not_finite(network: nn.Module) -> list[str]:
    """The parameters and buffers that are not finite, but for the statistics of batch norms, which are taken anew."""
    norms = [m for m in network.modules() if isinstance(m, StageBatchNorm | nn.modules.batchnorm._BatchNorm)]
    anew = {id(buffer) for norm in norms for buffer in norm.buffers()}
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [
        name
        for name, tensor in tensors
        if not nn.parameter.is_lazy(tensor) and id(tensor) not in anew and not tensor.detach().isfinite().all()
    ]


def _set_blocks(flow: Flow, blocks: Iterable[nn.Module]) -> None:
    mode = flow.blocks.training
    flow.blocks = nn.ModuleList(blocks)
    flow.blocks.training = mode


@contextmanager
def _editing(network: Network, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the optimizer follow what happens to the blocks; after an exception they are what they were."""
    before = {flow: [(block, cast(Block, block).h) for block in flow.blocks] for flow in network.flows}
    held = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    others = set(held) - set(network.parameters())
    try:
        yield
    except BaseException:
        for flow, blocks in before.items():
            for block, h in blocks:
                block.h = h  # type: ignore[assignment]
            _set_blocks(flow, [block for block, _ in blocks])
        raise
    finally:
        if optimizer is not None:
            _follow(optimizer, network, others)


def _apply(
    flow: Flow, index: int, errors: list[float], decisions: Sequence[str], optimizer: torch.optim.Optimizer | None
) -> tuple[list[Edit], list[tuple[Block, Edit, list[Block]]]]:
    """Edit a flow's blocks; merges come back with what is needed to take them back."""
    blocks, edits, merged = [], [], []
    old = [cast(Block, block) for block in flow.blocks]
    m = 0
    while m < len(old):
        block = old[m]
        blocks.append(block)
        if decisions[m] == "duplicate":
            edits.append(Edit("duplicate", index, m, errors[m], (block.h, block.h / 2)))
            block.h /= 2
            twin = copy.deepcopy(block)
            if optimizer is not None:
                _adopt(optimizer, block, twin)
            blocks.append(twin)
        elif decisions[m] == "merge":
            following = old[m + 1]
            edits.append(Edit("merge", index, m, errors[m], (block.h, block.h + following.h)))
            merged.append((block, edits[-1], [block, following]))
            block.h += following.h
            m += 1
        m += 1
    _set_blocks(flow, blocks)
    return edits, merged


def _adopt(optimizer: torch.optim.Optimizer, original: nn.Module, twin: nn.Module) -> None:
    """Put the twin's parameters into the groups of their originals, with copies of the state."""
    for p, q in zip(original.parameters(), twin.parameters(), strict=True):
        q.grad = None
        group = next((group for group in optimizer.param_groups if any(p is r for r in group["params"])), None)
        if group is None:
            continue  # a frozen parameter that the optimizer was never given
        group["params"].append(q)
        if p in optimizer.state:
            optimizer.state[q] = copy.deepcopy(optimizer.state[p])


def _follow(optimizer: torch.optim.Optimizer, network: Network, others: set[Any]) -> None:
    """Forget parameters that are neither the network's nor ``others``, and sort each group as the network lists them.

    In that order a saved state fits an optimizer built anew on the edited network.
    """
    position: dict[Any, int] = {p: i for i, p in enumerate(network.parameters())}
    names = {p: name for name, p in network.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in position and p not in others:
                optimizer.state.pop(p, None)
        stay = [p for p in group["params"] if p in position or p in others]
        group["params"][:] = sorted(stay, key=lambda p: position.get(p, -1))
        if "param_names" in group:
            group["param_names"] = [names.get(p, "") for p in group["params"]]


class AdaptiveDepth:
    """A training callback: apply a :class:`DepthRule` between epochs; every edit is written into the epoch's row.

    Where an epoch diverges, every block counts as too large: each is duplicated, and the epoch is trained again.

    Args:
        rule: the rule.
        inputs: makes the validation inputs anew at each call.
        every: epochs between two checks.
        until: no check after this epoch, so that the last edits are trained; None checks to the end.
        recalibration: makes inputs for batch norms, see :func:`adapt_depth`.
    """

    recovers = True

    def __init__(
        self,
        rule: DepthRule,
        inputs: Callable[[], Iterable[Tensor]],
        *,
        every: int = 1,
        until: int | None = None,
        recalibration: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.rule, self.inputs, self.every, self.until = rule, inputs, every, until
        self.recalibration = recalibration
        self._notes: list[str] = []

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Check, edit, and note errors and edits in the row."""
        network = _editable(training.network)
        notes, self._notes = self._notes, []
        if training.epoch % self.every == 0 and (self.until is None or training.epoch <= self.until):
            adapted = adapt_depth(network, self.inputs, self.rule, training.optimizer, recalibration=self.recalibration)
            row["errors"] = " ".join(f"{e:.4g}" for flow in adapted.errors for e in flow)
            notes += [str(edit) for edit in adapted.edits]
            training.check_evaluations += adapted.evaluations
        row["edits"] = "; ".join(notes)

    def on_divergence(self, training: Training) -> bool:
        """Duplicate every block that the caps allow; nothing where weights are not finite, which it would not mend."""
        network = _editable(training.network)
        if _not_finite(network):
            return False
        edits = refine(network, self.rule, training.optimizer)
        self._notes += [f"epoch {training.epoch + 1} diverged, {edit}" for edit in edits]
        return bool(edits)
