"""Where batch norm of a velocity field mixes the states of several evaluations in its statistics."""

from __future__ import annotations

import warnings

from torch import nn

from odenets.normalization.stage_batch_norm import StageBatchNorm

__all__ = ["refuse_statistics", "warn_of_mixed_statistics"]


def warn_of_mixed_statistics(field: nn.Module, evaluated: str, remedy: str, *, by_stage: bool) -> None:
    """Warn where a ``field`` that is evaluated several times holds batch norm in training mode with one statistic.

    Args:
        field: the field, or what holds fields.
        evaluated: by what, for the message.
        remedy: what to take instead.
        by_stage: whether a :class:`StageBatchNorm` has statistics for each evaluation.
    """
    for name, module in field.named_modules():
        mixed = isinstance(module, nn.modules.batchnorm._NormBase) or (
            isinstance(module, StageBatchNorm) and not by_stage
        )
        if mixed and module.training and module.running_mean is not None:
            warnings.warn(
                f"{name or 'field'} is {type(module).__name__} in a field that {evaluated}: their states share its "
                f"running statistics, so that eval mode computes something else than training mode. {remedy}",
                UserWarning,
                stacklevel=2,
            )
            return


def refuse_statistics(flow: nn.Module, method: str, calls: str = "calls its field until a stage is found") -> None:
    """Refuse a ``flow`` of an implicit ``method`` with batch norm in training mode, or another that ``calls`` so.

    Raises:
        ValueError: there is one.
    """
    for name, module in flow.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | StageBatchNorm) and module.training:
            raise ValueError(
                f"{name} is {type(module).__name__} in training mode, and {method} {calls}: every call "
                " would count in the statistics, and samples depend on each other. Take "
                "nn.GroupNorm, as with norm='group', or eval()"
            )
