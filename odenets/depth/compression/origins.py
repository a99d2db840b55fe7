"""Origins of modules: the names that they have in the whole network, which their copies keep."""

from __future__ import annotations

from torch import nn

__all__ = ["forget_origins", "name_origins", "origin_of"]

ORIGIN = "_origin_in_whole"


def name_origins(model: nn.Module) -> nn.Module:
    """Write into every module of a ``model`` its name there.

    >>> import copy
    >>> model = name_origins(nn.Sequential(nn.Linear(2, 2)))
    >>> origin_of(copy.deepcopy(model)[0]), origin_of(nn.Linear(2, 2))
    ('0', None)
    """
    for name, module in model.named_modules():
        vars(module)[ORIGIN] = name
    return model


def origin_of(module: nn.Module) -> str | None:
    """The name of the module of which this one is, or is a copy; None for a new one."""
    return vars(module).get(ORIGIN)


def forget_origins(model: nn.Module) -> None:
    """Take the names out of the modules of a ``model``."""
    for module in model.modules():
        vars(module).pop(ORIGIN, None)
