"""Branches that end in a batch norm, of whose residues a penalty moves nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.program.places import Place

__all__ = ["warn_of_norms"]


def warn_of_norms(model: nn.Module, specs: Iterable[BlockSpec], stacklevel: int) -> None:
    """Warn of blocks of a ``model`` whose recorded branches end in a batch norm.

    Warns:
        UserWarning: there are some.
    """
    normed = [spec.name for spec in specs if spec.branch and _ends_in_batch_norm(model, spec.branch)]
    if normed:
        warnings.warn(
            f"the branches of {len(normed)} blocks ({normed[0]}, ...) end in a batch norm: in training the mean square "
            "of their residues is gamma^2 + beta^2 of that layer, and a penalty on it moves nothing else; "
            'adapt(model, residue="displacement") takes what the block truly adds',
            stacklevel=stacklevel + 1,
        )


def _ends_in_batch_norm(model: nn.Module, branch: Place) -> bool:
    module = model.get_submodule(str(branch.of))
    last = [m for m in module.modules() if not any(m.children())][-1]
    return isinstance(last, nn.modules.batchnorm._BatchNorm)
