"""What is known of the statistics of batch norms: nothing, those of a recalibration, or of training since."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from odenets.normalization.stage_batch_norm import NOTHING, TRAINED, StageBatchNorm
from solvers.validation import is_transformed

__all__ = ["check_closing_statistics", "known_statistics", "note_recalibration"]

_READ: WeakKeyDictionary[nn.Module, tuple[Tensor, int, int]] = WeakKeyDictionary()
_RECALIBRATED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def known_statistics(norm: nn.Module) -> int:
    """What is known of a batch ``norm``, as :meth:`StageBatchNorm.known` says it of a stage.

    0 of one without statistics, 1 of one whose statistics are those of a recalibration, 2 where training set them
    since, or where there is nothing to look at. Waits for the device once after its count of batches changed.

    >>> norm = nn.BatchNorm1d(3)
    >>> before, _ = known_statistics(norm), norm(torch.randn(8, 3))
    >>> before, known_statistics(norm)
    (0, 2)
    """
    if isinstance(norm, StageBatchNorm):
        return max(norm.known())
    count = cast(Tensor | None, norm.num_batches_tracked)
    if count is None or torch.compiler.is_compiling() or count.is_meta or is_transformed(count) or count.is_inference():
        return TRAINED  # it keeps none, or has no values here
    before, version, known = _READ.get(norm, (None, -1, NOTHING))
    if before is not count or version != count._version:
        batches = int(count)
        known = (batches > 0) + (batches > _RECALIBRATED.get(norm, 0))
        _READ[norm] = (count, count._version, known)
    return known


def note_recalibration(norm: nn.Module, calls: int) -> None:
    """Remember that the statistics of a norm of torch are those of ``calls`` batches of a recalibration."""
    _RECALIBRATED[norm] = calls


def check_closing_statistics(fields: Iterable[nn.Module], interior: int, block: int) -> None:
    """Refuse fields of closing stages in eval mode whose batch norms know less than those of the other stages.

    Args:
        fields: one per stage.
        interior: how many come before those of the closing stages.
        block: the number of the block whose they are.

    Raises:
        ValueError: they do.
    """
    norms = [[m for m in field.modules() if isinstance(m, StageBatchNorm | _BatchNorm)] for field in fields]
    inner, closing = chain(*norms[:interior]), chain(*norms[interior:])
    least = min((known_statistics(norm) for norm in closing if not norm.training), default=TRAINED)
    if least < TRAINED and least < max(map(known_statistics, inner), default=NOTHING):
        what = "no statistics" if least == NOTHING else "statistics that are behind further training"
        raise ValueError(
            f"batch norms in the closing fields of block {block} have {what}, for training does not call these "
            "fields: train a flow that reads them, solver=get_tableau('bs23').forwarding('order2'), or call "
            "odenets.recalibrate(network, batches) first"
        )
