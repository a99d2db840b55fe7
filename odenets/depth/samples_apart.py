"""Where samples part ways: what a network must be then, and that it cannot be exported."""

from __future__ import annotations

from numbers import Real

import torch
from torch import nn

from odenets.normalization import StageBatchNorm

__all__ = ["check_evaluating", "check_not_exported"]


def check_evaluating(network: nn.Module, together: str) -> None:
    """That no layer of a ``network`` makes a sample's way depend on chance.

    That would be a batch norm that takes the statistics of the samples that happen to be ``together``, or a dropout.

    Raises:
        ValueError: one is in training mode.

    >>> check_evaluating(nn.Sequential(nn.BatchNorm1d(2)), "behind one module")
    Traceback (most recent call last):
        ...
    ValueError: '0' is a batch norm in training mode, which would ...
    """
    for name, module in network.named_modules():
        if not module.training:
            continue
        if isinstance(module, StageBatchNorm | nn.modules.batchnorm._NormBase):
            raise ValueError(
                f"{name!r} is a batch norm in training mode, which would take the statistics of the samples that "
                f"happen to be {together}: call eval() before"
            )
        if _draws(module):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} in training mode, which draws anew in each call: call eval() "
                "before"
            )


def check_not_exported(what: str, remedy: str) -> None:
    """That nobody exports what computes other samples by other layers: one way of them would be that of all.

    Raises:
        RuntimeError: ``torch.export``, or ``torch.jit.trace`` does; the ``remedy`` is part of it.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(f"{what} takes a way for each sample, by its numbers, and cannot be exported: {remedy}")


def _draws(module: nn.Module) -> bool:
    """Whether a layer drops at random: torch's own, a model's stochastic depth, or one with a rate of dropout."""
    drops = any(word in type(module).__name__ for word in ("Drop", "Stochastic"))
    names = ("dropout", "attention_dropout", *(("p", "drop_prob") if drops else ()))
    rates = [rate for name in names if isinstance(rate := getattr(module, name, None), Real)]
    return isinstance(module, nn.RReLU) or any(rates)
