"""Batch norm with statistics per stage, and the layers of a field by name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.errors import check_count
from solvers.validation import is_mapped, is_transformed

__all__ = ["NOTHING", "TRAINED", "StageBatchNorm", "at_stage", "expand_stages", "make_norm"]

NOTHING, TRAINED = 0, 2
"""What is known of statistics; 1 is between them, a recalibration after which no batch was seen."""


class _Evaluated:
    """The stage that a block evaluates."""

    stage: int | None = None


class _EvaluatedInThread(_Evaluated, threading.local):
    """The same of each thread."""


_EVALUATED, _TRACED = _EvaluatedInThread(), _Evaluated()  # and in a graph that is being traced


def at_stage(field: Callable[..., Tensor], stage: int) -> Callable[..., Tensor]:
    """The ``field``, whose batch norms take the statistics of a ``stage`` where they are not told one."""

    def velocity(t: float | Tensor, x: Tensor) -> Tensor:
        now = _TRACED if torch.compiler.is_compiling() else _EVALUATED
        before = now.stage
        now.stage = stage
        try:
            return field(t, x)
        finally:
            now.stage = before

    return velocity


class StageBatchNorm(nn.Module):
    """Batch normalization of a field shared by the stages of a step: one scale and shift, statistics per stage.

    A tied field sees the states of every stage; one set of statistics would mix them and be updated several times a
    step. With one stage this is :class:`torch.nn.BatchNorm2d` to the last bit.

    Training never takes the closing stages of a method, and so sets no statistics for them. A stage without statistics
    beside stages that have them, or whose statistics stayed behind where training moved those of others, is refused in
    eval mode; :func:`~odenets.recalibrate` sets all. Where no stage has any, as in a new network, mean 0 and variance 1
    are taken, as torch does.

    Within a flow the layer learns the stage from the block that evaluates the field, in any module: called as
    ``norm(x)`` like torch's layers, or as ``norm(x, stage)``.
    ``update_bn`` and ``convert_sync_batchnorm`` of torch pass over this layer.

    Args:
        features: number of channels, dimension 1 of the input.
        stages: number of stages that share the layer.
        eps: what is added to the variance.
        momentum: the weight of a batch in the running statistics; None for their plain average.

    >>> norm = StageBatchNorm(3, stages=2)
    >>> norm(torch.randn(8, 3, 4, 4), stage=1).shape, norm.batches.tolist()
    (torch.Size([8, 3, 4, 4]), [0, 1])
    """

    def __init__(self, features: int, stages: int = 1, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        check_count("features", features, 1)
        check_count("stages", stages, 1)
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
        self._known = [NOTHING] * stages  # of each stage, as ``batches`` had it when last read
        self._read: tuple[Tensor, int] | None = None  # the buffer from which that was read, and its version

    @property
    def stages(self) -> int:
        """Number of stages with statistics of their own."""
        return len(self.batches)

    def expand_stages(self, stages: int) -> None:
        """Set the number of ``stages``: each begins with the statistics of a layer of one stage.

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

    def reread(self) -> None:
        """Look at the counts of batches again, which were set in a way that torch may not have counted."""
        self._read = None
        self.known()

    def stage_of(self, stage: int | None = None) -> int:
        """The ``stage`` that a call takes: that of the block that evaluates the field where None, or else the first.

        Raises:
            ValueError: there is no such stage, or it is not known in training mode.
        """
        if stage is None:
            now = (_TRACED if torch.compiler.is_compiling() else _EVALUATED).stage
            stage = now or 0
            if now is None and self.training and len(self._known) > 1:
                raise ValueError(
                    f"stage must be known where batch norm with statistics of {len(self._known)} stages trains: call "
                    "norm(x, stage), or let a flow call the field; a norm that is put into a flow's block later is "
                    "not seen, nor is one within torch.utils.checkpoint told: hand the stage of v(t, x, stage=i) on"
                )
        if stage >= len(self._known):
            raise ValueError(
                f"stage must be below {len(self._known)}, the stages that batch norm has statistics of, got {stage}: "
                f"StageBatchNorm({self.features}, stages=n) with the n stages of the method"
            )
        return stage

    def forward(self, x: Tensor, stage: int | None = None) -> Tensor:
        """Normalize ``x`` ``(B, C, ...)`` with the statistics of a ``stage``, counted from 0.

        Where it is None it is that which the block of a flow evaluates; outside of one, in eval mode, the first.

        Raises:
            ValueError: in eval mode, the stage has no statistics, or older ones, and others have; in training mode,
                the stage is not known; there is no such stage.
        """
        if stage is None or stage >= len(self._known):
            stage = self.stage_of(stage)
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
        momentum = 0.0 if momentum is None else momentum
        try:
            x = F.batch_norm(x, mean, variance, self.weight, self.bias, training, momentum, self.eps)
        except RuntimeError as error:
            if x.ndim > 1 and x.shape[1] == self.features:
                raise
            hint = ": a sample without a batch dimension is x[None]" if x.shape[0] == self.features else ""
            raise ValueError(
                f"x must have shape (B, {self.features}, ...) where batch norm has {self.features} features, got "
                f"{tuple(x.shape)}{hint}"
            ) from error
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
            what, which = "statistics that are behind further training", "newer ones"
            if known[stage] == NOTHING:
                what, which = "no statistics", "only"
            raise ValueError(
                f"batch norm has {what} of stage {stage + 1} of {len(known)}, {which} of "
                f"{[i for i, each in enumerate(known, 1) if each == most]}: training does not take the closing stages, "
                "which embedded errors and outputs read. Call odenets.recalibrate(network, batches) first; mark a "
                "measure that reads none, @odenets.measures.measure(closing=False)"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **named: Any) -> None:
        _, _, missing_keys, _, error_msgs = args  # as torch passes them
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
        super()._load_from_state_dict(state_dict, prefix, *args, **named)
        if old:  # saved when recalibrations were not counted
            if f"{prefix}recalibrated" in missing_keys:
                missing_keys.remove(f"{prefix}recalibrated")
            self.recalibrated.zero_()
        self.reread()


def expand_stages(field: nn.Module, stages: int) -> None:
    """Give every :class:`StageBatchNorm` in a ``field`` statistics for each of some stages."""
    for module in field.modules():
        if isinstance(module, StageBatchNorm):
            module.expand_stages(stages)


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

    Returns:
        The layer; only "batch" looks at the stage.

    Raises:
        ValueError: an unknown kind.

    >>> make_norm("group", 16)(torch.randn(2, 16, 4, 4), 0).shape
    torch.Size([2, 16, 4, 4])
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
