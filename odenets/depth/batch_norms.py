"""Batch norms where samples part ways: they must be in eval mode."""

from __future__ import annotations

from torch import nn

from odenets.normalization import StageBatchNorm

__all__ = ["check_evaluating"]


def check_evaluating(network: nn.Module, together: str) -> None:
    """That no batch norm of a ``network`` would take the statistics of samples that are ``together`` by chance.

    Raises:
        ValueError: one is in training mode.

    >>> check_evaluating(nn.Sequential(nn.BatchNorm1d(2)), "behind one module")
    Traceback (most recent call last):
        ...
    ValueError: '0' is a batch norm in training mode, which would ...
    """
    for name, module in network.named_modules():
        if isinstance(module, StageBatchNorm | nn.modules.batchnorm._NormBase) and module.training:
            raise ValueError(
                f"{name!r} is a batch norm in training mode, which would take the statistics of the samples that "
                f"happen to be {together}: call eval() before"
            )
