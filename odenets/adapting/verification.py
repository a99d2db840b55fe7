"""What is recorded of a model beside its program: the same output, and the steps that were found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.copying import copied
from odenets.adapting.finding import Blocks
from odenets.adapting.layouts import with_distinct_samples
from odenets.adapting.program.graph import FailedPass
from odenets.adapting.program.places import tensors_in
from odenets.adapting.program.tracing import without_fast_path
from odenets.modes import device_of, in_eval_mode, keeping_attributes

__all__ = ["check_example"]


def check_example(adapted: AdaptedModel, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Find the blocks of an ``adapted`` model by an example, ``inputs`` and ``keywords``, and record it once.

    Raises:
        ValueError: the model does not take the example, as :meth:`AdaptedModel.find`, or its outputs differ.
    """
    inputs, keywords = with_distinct_samples(inputs, keywords)
    try:
        found = adapted.find(*inputs, **keywords)
    except FailedPass as failed:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for _, x in tensors_in((inputs, dict(keywords))))
        error = failed.__cause__
        raise ValueError(
            f"example must be inputs that {type(adapted.model).__name__} takes, got {shapes}: {error}"
        ) from error
    try:
        _check(adapted, found, inputs, keywords)
    except BaseException:
        adapted.hooks.detach()
        raise


def _check(adapted: AdaptedModel, found: Blocks | None, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    with torch.no_grad(), keeping_attributes(adapted.model), in_eval_mode(adapted), without_fast_path():
        torch.rand(1, device=device_of(adapted.model))  # so that random numbers of this pass are others
        inputs, keywords = copied((inputs, dict(keywords)))
        output = adapted.record(*inputs, **keywords)[0]
    if found is not None and not _same(found.output, output):
        draws = f", which draws random numbers: {'; '.join(found.draws)}" if found.draws else ""
        raise ValueError(
            f"two passes of {type(adapted.model).__name__} in eval mode differ{draws}: switch off what is random in "
            "eval mode, as functional dropout with training=True, or what counts its calls"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs are equal but for rounding."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=False)
    return all(_close(a, b) for (_, a), (_, b) in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.is_quantized:
        a, b = a.dequantize(), b.dequantize()
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.float(), b.float()
    return torch.allclose(
        a, b, rtol=1e-2, atol=1e-3 * float(a.abs().nan_to_num(0).amax()) if a.numel() else 0, equal_nan=True
    )
