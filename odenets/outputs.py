"""Outputs of a network: a tensor, or what holds one beside others, as Hugging Face's models return it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["logits_in"]


def logits_in(output: Any) -> Any:
    """The logits of an output: a tensor itself, or ``output["logits"]`` or ``output.logits`` where it has such.

    A ``loss`` that a model computes for itself stands beside them and is not read. Anything else is left as it is, a
    tuple too, whose parts have no names to be told by, or several logits, as those of GoogLeNet's auxiliary heads.

    >>> import torch
    >>> logits_in({"loss": torch.zeros(()), "logits": torch.ones(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor | tuple):
        return output
    inner = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if inner is None else inner
