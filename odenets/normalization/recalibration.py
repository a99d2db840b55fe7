"""Recalibration: the running statistics of a network's batch norms as averages over data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from odenets.inputs import call, inputs_of
from odenets.modes import inputs_for, keeping_modes
from odenets.normalization.stage_batch_norm import StageBatchNorm
from odenets.normalization.statistics import note_recalibration

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(network: nn.Module, batches: Iterable[Any], run: Callable[[Any], object] | None = None) -> int:
    """Recompute the running statistics of every batch norm as plain averages over the samples of ``batches``.

    Small data leave the running averages behind the weights, and a depth edit changes what a layer sees. Blocks take
    their closing stages too, which training leaves out and the embedded error reads; their statistics do not follow
    further training, after which they are refused until this is called again. A norm, or a stage of one, that is not
    run keeps its statistics, and so does one that is frozen: in eval mode and without gradients in a network in
    training mode.

    Args:
        network: the network. Its modes are restored, and after an error its statistics too.
        batches: of inputs ``(B, *S)`` or of pairs ``(inputs, labels)``, whose labels are not read, taken to the
            network's device and dtype; the average weighs each batch by its samples.
        run: what to run on each batch as it comes; if not given, the network itself on the inputs, or its ``run_all``,
            which calls all the heads of a :class:`~odenets.module_wise.ModuleWise`.

    Returns:
        The number of norms with new statistics; 0 if the network has none that keep any, and then nothing is run and
        ``batches`` may hold anything, or nothing.

    Raises:
        ValueError: no norm is run, one is lazy and has not seen an input, or there are norms and no batch.
        TypeError: one tensor in place of batches, or there are norms and batches without inputs.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.ConvField(4, norm="batch"), depth=2)
    >>> recalibrate(flow, [torch.randn(8, 4, 6, 6) for _ in range(3)])
    4
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches must hold batches of inputs, got one tensor: [x] for one batch")
    tracked = [m for m in network.modules() if _keeps_statistics(m)]
    norms = [norm for norm in tracked if not (network.training and _is_frozen(norm))]
    if not tracked:
        return 0
    averages = [_Average(norm) for norm in norms]
    whole, empty = getattr(network, "run_all", network), True
    try:
        with keeping_modes(network), taking_closing_stages(network, norms), _uncompiled():
            network.eval()
            for average in averages:
                average.begin()
            for x in batches if run else inputs_of(batches, "batches"):
                empty = False
                if run is None:
                    call(whole, inputs_for(network, x))
                else:
                    run(inputs_for(network, x) if isinstance(x, Tensor) else x)
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
    kinds = StageBatchNorm | nn.modules.batchnorm._BatchNorm
    flows: list[Any] = [flow for flow in network.modules() if getattr(flow, "closing_apart", False)]
    flows = [flow for flow in flows if chosen.issuperset(m for m in flow.modules() if isinstance(m, kinds))]
    for flow in flows:
        flow.takes_closing = True
    try:
        yield
    finally:
        for flow in flows:
            flow.takes_closing = False


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
            stage = norm.stage_of(args[1] if len(args) > 1 else kwargs.get("stage"))
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
                note_recalibration(self.norm, calls)
                self.norm.running_mean.copy_(mean / samples)
                self.norm.running_var.copy_(variance / samples)
        if isinstance(self.norm, StageBatchNorm):
            self.norm.reread()
