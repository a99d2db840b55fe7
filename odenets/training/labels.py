"""Labels: what classifiers must return and be told, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from odenets.outputs import logits_in
from solvers.validation import is_transformed

__all__ = ["check_labels", "cross_entropy", "logits_and_labels", "without_label"]


def logits_and_labels(output: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Checked: logits ``(B, classes)``, in float32 at least, and labels.

    The output is a tensor, or holds one named "logits", as a ModelOutput of Hugging Face's models does.
    Labels are classes, ``(B,)`` int64, or shares of the classes, ``(B, classes)`` of the logits' dtype.

    Raises:
        TypeError: the output is no floating tensor, or the labels are none.
        ValueError: other shapes, or a single logit, whose cross-entropy is 0 whatever it is.
    """
    output = logits_in(output)
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        raise TypeError(
            "the network must return logits, a floating tensor (B, classes), got "
            f"{output.dtype if isinstance(output, Tensor) else type(output).__name__}: Task(lambda output, "
            "y: F.cross_entropy(output[0], y)) reads any other"
        )
    if output.ndim != 2 or output.shape[1] < 2:
        remedy = ""
        if output.ndim > 2:
            of_each = "output.logits.flatten(0, 1), y.flatten()" if output.ndim == 3 else "output, y"
            remedy = f": Task(lambda output, y: F.cross_entropy({of_each})) is of several labels a sample"
        raise ValueError(
            f"the network must return logits (B, classes) of two classes or more, got {_shape(output)}{remedy}"
        )
    if not isinstance(y, Tensor) or y.is_complex():
        raise TypeError(f"labels must be a tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.is_floating_point() and y.shape != output.shape:
        raise ValueError(
            f"labels must be classes (B,), whole numbers, or shares of all classes {_shape(output)}, got {y.dtype} "
            f"{_shape(y)}"
        )
    if not y.is_floating_point() and y.shape != output.shape[:1]:
        remedy = {output.shape: ": y.argmax(1), or y.float() for shares", (len(output), 1): ": y.squeeze(1)"}
        raise ValueError(
            f"labels must be one class for each of {len(output)} outputs, got {_shape(y)}{remedy.get(y.shape, '')}"
        )
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    return output, y.to(output.dtype) if y.is_floating_point() else y.long()


def cross_entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Torch's cross-entropy of what :func:`logits_and_labels` returns.

    Raises:
        ValueError: a class that has no logit, where torch can tell; it cannot on a GPU.
    """
    try:
        return F.cross_entropy(logits, y, **options)
    except IndexError:
        if not is_transformed(y):
            check_labels(logits, y, "the batch")
        raise


def without_label(values: Tensor, y: Tensor) -> Tensor:
    """Values of the classes, ``(B, classes)``, with 0 for that of each label.

    Raises:
        ValueError: as :func:`cross_entropy`.
    """
    try:
        return values.scatter(1, y[:, None], 0.0)
    except RuntimeError:
        if not is_transformed(y):
            check_labels(values, y, "the batch")
        raise


def check_labels(output: Any, y: Any, name: str) -> None:
    """That labels which are classes have a logit each, -100 counting for nothing, and that shares of the classes are
    some. Waits for the device.

    Raises:
        ValueError: they are not.
    """
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)) or not y.numel():
        return
    if y.is_floating_point():
        if y.ndim == 2 and not bool(((y >= 0).all(1) & ((y.sum(1) - 1).abs() < 1e-2)).all()):
            raise ValueError(
                f"the labels of {name} must be shares of the classes, not negative and with a sum of 1, where they are "
                "floating: for targets of another kind give objective=Task(F.mse_loss)"
            )
        return
    smallest, largest = (int(end) for end in torch.stack(y.aminmax()).tolist())
    if largest >= output.shape[1]:
        raise ValueError(f"the network has {output.shape[1]} logits, and the labels of {name} go up to {largest}")
    if smallest < 0 and bool(((y < 0) & (y != -100)).any()):
        raise ValueError(f"the labels of {name} must lie in [0, {output.shape[1]}), or be -100, got {smallest}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
