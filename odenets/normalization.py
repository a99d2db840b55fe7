"""Normalisation of velocity fields: group norm, batch norm with statistics per stage, and its recalibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from solvers.states import is_mapped

__all__ = ["StageBatchNorm", "make_norm", "recalibrate"]


class StageBatchNorm(nn.Module):
    """Batch normalisation of a field shared by the stages of a step: one scale and shift, statistics per stage.

    A tied field sees the states of every stage; one set of statistics would mix them and be updated several times a
    step. With one stage this is :class:`torch.nn.BatchNorm2d` to the last bit.

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
        self.expand_stages(stages)

    def expand_stages(self, stages: int) -> None:
        """Set the number of stages; statistics start anew."""
        device, dtype = self.weight.device, self.weight.dtype
        self.register_buffer("running_mean", torch.zeros(stages, self.features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(stages, self.features, device=device, dtype=dtype))
        self.register_buffer("batches", torch.zeros(stages, dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.batches.zero_()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0, no statistics."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.reset_running_stats()

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        """Normalise ``x`` ``(B, C, ...)`` with the statistics of a stage."""
        momentum = self.momentum
        if self.training:
            self.batches[stage] += 1
            if momentum is None:
                momentum = 1.0 / float(self.batches[stage])
        mean, variance = self.running_mean[stage], self.running_var[stage]
        if is_mapped(mean):  # vmap updates a copy of what is not one run of memory
            mean, variance = mean.clone(), variance.clone()
        x = F.batch_norm(
            x,
            mean,
            variance,
            self.weight,
            self.bias,
            self.training,
            0.0 if momentum is None else momentum,
            self.eps,
        )
        if self.training and is_mapped(mean):
            self.running_mean[stage], self.running_var[stage] = mean, variance
        return x


class _Norm(nn.Module):
    """A norm that takes no notice of the stage."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, stage: int = 0) -> Tensor:
        return self.norm(x)


def make_norm(kind: str | None, features: int, groups: int = 8) -> nn.Module:
    """A normalisation layer called as ``norm(x, stage)``.

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
    """Recompute the running statistics of every batch norm as plain averages over ``batches``.

    Small data leave the running averages behind the weights, and a depth edit changes what a layer sees.

    Args:
        network: the network; its mode is restored.
        batches: inputs, each ``(B, *S)``.
        run: what to run on each input; the network itself if not given.

    Returns:
        The number of batch norms found; 0 means that nothing was run.
    """
    found = [m for m in network.modules() if isinstance(m, StageBatchNorm | nn.modules.batchnorm._BatchNorm)]
    if not found:
        return 0
    modes = [(m, m.training) for m in network.modules()]
    momenta = [m.momentum for m in found]
    network.eval()
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        for x in batches:
            (run or network)(x)
    finally:
        for norm, momentum in zip(found, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(found)
