"""Normalization of velocity fields: group norm, batch norm with statistics per stage, and its recalibration."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedBuffer

from odenets.modes import inputs_for, keeping_modes
from solvers.validation import is_mapped, is_transformed

__all__ = ["StageBatchNorm", "make_norm", "recalibrate"]

NOTHING, TRAINED = 0, 2
"""What is known of statistics; 1 is between them, a recalibration after which no batch was seen."""


class StageBatchNorm(nn.Module):
    """Batch normalization of a field shared by the stages of a step: one scale and shift, statistics per stage.

    A tied field sees the states of every stage; one set of statistics would mix them and be updated several times a
    step. With one stage this is :class:`torch.nn.BatchNorm2d` to the last bit.

    Training never takes the closing stages of a method, and so sets no statistics for them. A stage without statistics
    beside stages that have them, or whose statistics stayed behind where training moved those of others, is refused in
    eval mode; :func:`recalibrate` sets all. Where no stage has any, as in a new network, mean 0 and variance 1 are
    taken, as torch does. ``update_bn`` and ``convert_sync_batchnorm`` of torch pass over this layer.

    Args:
        features: number of channels, dimension 1 of the input.
        stages: number of stages that share the layer.
    """

    def __init__(self, features: int, stages: int = 1, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.features, self.eps, self.momentum = features, eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.batches: Tensor
        self.recalibrated: Tensor  # the batches at the last recalibration
        self.register_buffer("running_mean", torch.zeros(stages, features))
        self.register_buffer("running_var", torch.ones(stages, features))
        self.register_buffer("batches", torch.zeros(stages, dtype=torch.long))
        self.register_buffer("recalibrated", torch.zeros(stages, dtype=torch.long))
        self._known = [NOTHING] * stages  # what ``batches`` last said of the statistics of each stage
        self._read: tuple[Tensor, int] | None = None  # the buffer from which that was read, and its version

    @property
    def stages(self) -> int:
        """Number of stages with statistics of their own."""
        return len(self.batches)

    def expand_stages(self, stages: int) -> None:
        """Set the number of stages: each begins with the statistics of a layer of one stage.

        Of a layer of several, whose stages were those of another method, the first alone keeps its statistics.
        """
        if stages == self.stages:
            return
        one = self.stages == 1
        for name, start in (("running_mean", 0), ("running_var", 1), ("batches", 0), ("recalibrated", 0)):
            old = getattr(self, name)
            new = old[:1].repeat(stages, *[1] * (old.ndim - 1))
            if not one:
                new[1:] = start
            setattr(self, name, new)
        self._known = [self._known[0], *[self._known[0] if one else NOTHING] * (stages - 1)]

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()
        self.recalibrated.zero_()
        self._known = [NOTHING] * self.stages

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, no statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def known(self) -> list[int]:
        """What is known of each stage: nothing, statistics of a recalibration, or of training since then.

        Training counts for a stage that has since seen as many batches as any other, or enough to forget the statistics
        before: errors measured now and then are enough in the end.
        Waits for the device once after the count of batches changed. Where that has no values, in a graph that is being
        traced or under vmap, it is what was last known.
        """
        batches = self.batches
        if torch.compiler.is_compiling() or type(batches) is not Tensor or batches.is_meta or is_transformed(batches):
            return self._known
        read = self._read
        if read is None or read[0] is not batches or read[1] != batches._version:
            since = batches - self.recalibrated
            few = 1 if self.momentum is None else math.ceil(3 / self.momentum)  # batches that forget what was before
            self._known = ((batches > 0).long() + (since >= since.max().clamp(1, few))).tolist()
            self._read = None if batches.is_inference() else (batches, batches._version)
        return self._known

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        """Normalize ``x`` ``(B, C, ...)`` with the statistics of a stage.

        Raises:
            ValueError: in eval mode, the stage has no statistics, or older ones, and others have.
        """
        momentum, training = self.momentum, self.training
        if training and momentum is None:
            momentum = 1.0 / (float(self.batches[stage]) + 1)
        elif not training and len(known := self._known) > 1:
            read = self._read  # what :meth:`known` asks, without a call
            if (
                torch.compiler.is_compiling()
                or read is None
                or read[0] is not self._buffers["batches"]
                or read[0]._version != read[1]
                or (known[stage] < TRAINED and known[stage] < max(known))
            ):
                self._check_known(stage)
        mean, variance = self.running_mean[stage], self.running_var[stage]
        if is_mapped(mean):  # vmap updates a copy of what is not one run of memory
            mean, variance = mean.clone(), variance.clone()
        x = F.batch_norm(
            x,
            mean,
            variance,
            self.weight,
            self.bias,
            training,
            0.0 if momentum is None else momentum,
            self.eps,
        )
        if training:
            self.batches[stage] += 1
            if self._known[stage] < TRAINED:
                self._known[stage], self._read = TRAINED, None
            if is_mapped(mean):
                self.running_mean[stage], self.running_var[stage] = mean, variance
        return x

    def _check_known(self, stage: int) -> None:
        known = self.known()
        most = max(known)
        if known[stage] < most:
            none = known[stage] == NOTHING
            what, which = (
                ("no statistics", "only") if none else ("statistics that are behind further training", "newer ones")
            )
            raise ValueError(
                f"batch norm has {what} of stage {stage + 1} of {len(known)}, {which} of "
                f"{[i for i, each in enumerate(known, 1) if each == most]}: training does not take the closing stages, "
                "which embedded errors and outputs read. Call odenets.recalibrate(network, batches) first; mark a "
                "measure that reads none with odenets.measures.interior"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(f"{prefix}batches")
        old = isinstance(saved, Tensor) and f"{prefix}recalibrated" not in state_dict
        if isinstance(saved, Tensor) and saved.ndim == 1 and len(saved) != self.stages:
            error_msgs.append(
                f"{prefix[:-1]}: the state holds batch norm statistics of {len(saved)} stage(s), this network has "
                f"{self.stages}: build it with the solver it was saved with, or leave running_mean, running_var, "
                "batches and recalibrated out of the state, load with strict=False and call "
                "odenets.recalibrate(network, batches)"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if old:  # saved when recalibrations were not counted
            if f"{prefix}recalibrated" in missing_keys:
                missing_keys.remove(f"{prefix}recalibrated")
            self.recalibrated.zero_()
        self._read = None
        self.known()


_READ: WeakKeyDictionary[nn.Module, tuple[Tensor, int, int]] = WeakKeyDictionary()
_RECALIBRATED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def known_statistics(norm: nn.Module) -> int:
    """What is known of a batch norm, as :meth:`StageBatchNorm.known` says it of a stage.

    Waits for the device once after its count of batches changed.
    """
    if isinstance(norm, StageBatchNorm):
        return max(norm.known())
    count = cast(Tensor | None, norm.num_batches_tracked)
    if count is None or torch.compiler.is_compiling() or count.is_meta or is_transformed(count) or count.is_inference():
        return TRAINED  # it keeps none, or cannot be asked
    before, version, known = _READ.get(norm, (None, -1, NOTHING))
    if before is not count or version != count._version:
        batches = int(count)
        known = (batches > 0) + (batches > _RECALIBRATED.get(norm, 0))
        _READ[norm] = (count, count._version, known)
    return known


class _Norm(nn.Module):
    """A norm that takes no notice of the stage."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        return self.norm(x)


def make_norm(kind: str | None, features: int, groups: int = 8) -> nn.Module:
    """A normalization layer called as ``norm(x, stage)``.

    Args:
        kind: "group", "layer" (group norm with one group), "batch" or None.
        features: number of channels.
        groups: wanted number of groups; the greatest common divisor with ``features`` is taken.

    Raises:
        ValueError: an unknown kind.
    """
    match kind:
        case "group":
            return _Norm(nn.GroupNorm(math.gcd(groups, features), features))
        case "layer":
            return _Norm(nn.GroupNorm(1, features))
        case "batch":
            return StageBatchNorm(features)
        case None:
            return _Norm(nn.Identity())
    raise ValueError(f"norm must be 'group', 'layer', 'batch' or None, got {kind!r}")


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Tensor], run: Callable[[Tensor], object] | None = None) -> int:
    """Recompute the running statistics of every batch norm as plain averages over the samples of ``batches``.

    Small data leave the running averages behind the weights, and a depth edit changes what a layer sees. Blocks take
    their closing stages too, which training leaves out and the embedded error reads; their statistics do not follow
    further training, after which they are refused until this is called again. A norm, or a stage of one, that is not
    run keeps its statistics, and so does one that is frozen: in eval mode and without gradients in a network in
    training mode.

    Args:
        network: the network. Its modes are restored, and after an error its statistics too.
        batches: inputs, each ``(B, *S)``, taken to the network's device and dtype; the average weighs each batch by its
            samples.
        run: what to run on each input; the network itself if not given, or its ``run_all``, which calls all the heads
            of a :class:`~odenets.module_wise.ModuleWise`.

    Returns:
        The number of norms with new statistics; 0 if the network has none that keep any, and then nothing was run.

    Raises:
        ValueError: no batch, no norm was run, or one is lazy and has not seen an input.
        TypeError: batches of pairs, or one tensor.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches must hold inputs, tensors (B, *S), got one tensor: pass [x]")
    tracked = [m for m in network.modules() if _keeps_statistics(m)]
    norms = [norm for norm in tracked if not (network.training and _is_frozen(norm))]
    if not tracked:
        return 0
    averages = [_Average(norm) for norm in norms]
    call = run or cast(Callable[[Tensor], object], getattr(network, "run_all", network))
    empty = True
    try:
        with keeping_modes(network), taking_closing_stages(network, norms), _uncompiled():
            network.eval()
            for average in averages:
                average.begin()
            for x in batches:
                if isinstance(x, list | tuple) and run is None:
                    raise TypeError(
                        f"batches must hold inputs, tensors (B, *S), got a {type(x).__name__} of {len(x)}: give "
                        "(x for x, y in batches), or say with run what is run"
                    )
                empty = False
                call(inputs_for(network, x) if isinstance(x, Tensor) else x)
        if empty:
            raise ValueError("batches must hold at least one batch, got none: was the iterator used up before?")
        if not any(average.totals for average in averages):
            raise ValueError(
                f"none of the {len(tracked)} batch norms was run: run must call them, and those in eval mode whose "
                "weights take no gradients are frozen in a network in training mode"
            )
    except BaseException:
        for average in averages:
            average.end(keep=False)
        raise
    for average in averages:
        average.end(keep=True)
    return sum(bool(average.totals) for average in averages)


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm with running statistics, which a batch norm may do without.

    Raises:
        ValueError: it is lazy and has none yet.
    """
    if not isinstance(module, StageBatchNorm | nn.modules.batchnorm._NormBase):
        return False
    if isinstance(module.running_mean, UninitializedBuffer):
        raise ValueError("network has a lazy batch norm that has not seen an input: call network(x) once before")
    return module.running_mean is not None


def _is_frozen(norm: nn.Module) -> bool:
    """Whether a norm is in eval mode and has weights that take no gradients."""
    weights = list(norm.parameters(recurse=False))
    return not norm.training and bool(weights) and not any(p.requires_grad for p in weights)


def _uncompiled() -> AbstractContextManager[object]:
    """What is compiled runs as it was written: it takes no notice of hooks."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def taking_closing_stages(network: nn.Module, norms: Iterable[nn.Module]) -> Iterator[None]:
    """Flows that hold norms take the closing stages of all their blocks for a while, unless another one is frozen."""
    chosen = set(norms)
    flows = [
        flow
        for flow in network.modules()
        if getattr(flow, "closing_apart", False)
        and chosen.issuperset(
            m for m in flow.modules() if isinstance(m, StageBatchNorm | nn.modules.batchnorm._BatchNorm)
        )
    ]
    for flow in flows:
        flow.takes_closing = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for flow in flows:
            flow.takes_closing = False  # type: ignore[assignment]


class _Average:
    """The statistics of a norm, averaged over the samples of its calls, per stage, in float32 or wider."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = cast(StageBatchNorm, norm)
        self.momentum = self.norm.momentum
        self.before = [(buffer, buffer.clone()) for buffer in norm.buffers(recurse=False)]
        self.totals: dict[int, tuple[int, int, Tensor, Tensor]] = {}  # per stage: calls, samples, sums
        self.hook: Any = None

    def begin(self) -> None:
        """Let every call leave its own statistics, and collect them."""
        self.norm.reset_running_stats()
        self.norm.momentum = 1.0
        self.norm.train()
        self.hook = self.norm.register_forward_hook(self._collect, with_kwargs=True)

    def _collect(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        stage = 0
        mean, variance = self.norm.running_mean, self.norm.running_var
        if isinstance(norm, StageBatchNorm):
            stage = args[1] if len(args) > 1 else kwargs.get("stage", 0)
            mean, variance = mean[stage], variance[stage]
        samples = len(output)
        wide = torch.promote_types(mean.dtype, torch.float32)
        calls, seen, *sums = self.totals.get(stage, (0, 0, torch.zeros((), dtype=wide, device=mean.device), 0.0))
        mean, variance = (total + samples * value.to(wide) for total, value in zip(sums, (mean, variance), strict=True))
        self.totals[stage] = (calls + 1, seen + samples, mean, variance)

    def end(self, *, keep: bool) -> None:
        """Restore the norm; with ``keep`` it has the averages of the stages that were run."""
        if self.hook is not None:
            self.hook.remove()
        self.norm.momentum = self.momentum
        for buffer, value in self.before:
            buffer.copy_(value)
        for stage, (calls, samples, mean, variance) in self.totals.items() if keep else ():
            if isinstance(self.norm, StageBatchNorm):
                self.norm.batches[stage] = self.norm.recalibrated[stage] = calls
                self.norm.running_mean[stage], self.norm.running_var[stage] = mean / samples, variance / samples
            else:
                cast(Any, self.norm.num_batches_tracked).fill_(calls)
                _RECALIBRATED[self.norm] = calls
                self.norm.running_mean.copy_(mean / samples)
                self.norm.running_var.copy_(variance / samples)
        if isinstance(self.norm, StageBatchNorm):
            self.norm._read = None
            self.norm.known()
