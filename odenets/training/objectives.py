"""Objectives: what training minimizes, a function of a network's output and of what was measured on its steps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from odenets.measures import StepFunction
from odenets.modes import keeping_state
from odenets.recording import Records

__all__ = [
    "Batch",
    "CrossEntropy",
    "Objective",
    "ReverseCrossEntropy",
    "after_step",
    "check_loss",
    "logits_and_labels",
    "right_answers",
]

Batch = tuple[Tensor, Tensor]


def logits_and_labels(output: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Checked: logits ``(B, classes)``, in float32 at least, and labels.

    Labels are classes, ``(B,)`` int64, or shares of the classes, ``(B, classes)`` of the logits' dtype.

    Raises:
        TypeError: the output is no floating tensor, or the labels are none.
        ValueError: other shapes, or a single logit, whose cross-entropy is 0 whatever it is.
    """
    if not (isinstance(output, Tensor) and output.is_floating_point()):
        raise TypeError(
            "the network must return logits, a floating tensor (B, classes), got "
            f"{output.dtype if isinstance(output, Tensor) else type(output).__name__}: put a module around it that "
            "returns them"
        )
    if output.ndim != 2 or output.shape[1] < 2:
        raise ValueError(f"the network must return logits (B, classes) of two classes or more, got {_shape(output)}")
    if not isinstance(y, Tensor) or y.is_complex():
        raise TypeError(f"labels must be a tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.is_floating_point() and y.shape != output.shape:
        raise ValueError(
            f"labels must be classes (B,), whole numbers, or shares of all classes {_shape(output)}, got {y.dtype} "
            f"{_shape(y)}"
        )
    if not y.is_floating_point() and y.shape != output.shape[:1]:
        raise ValueError(f"labels must be one class for each of {len(output)} outputs, got {_shape(y)}")
    if output.dtype in (torch.float16, torch.bfloat16):
        output = output.float()
    return output, y.to(output.dtype) if y.is_floating_point() else y.long()


def right_answers(output: Any, y: Any) -> Tensor:
    """How many of the largest logits are at the label, a float32 scalar; NaN where the output is no logits."""
    try:
        output, y = logits_and_labels(output, y)
    except (TypeError, ValueError):
        leaf = next((leaf for leaf in tree_leaves((output, y)) if isinstance(leaf, Tensor)), torch.empty(()))
        return torch.full((), torch.nan, device=leaf.device)
    return (output.argmax(1) == (y.argmax(1) if y.is_floating_point() else y)).sum().float()


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _labels(batch: Any) -> Any:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"batch must be a pair (inputs, labels), got {got}")
    return batch[1]


class Objective(nn.Module):
    """What is minimized. What it must remember from step to step are its buffers: they are saved and restored.

    Attributes:
        measures: the measures that the network is to record, by name.
        group: the processes that share its batches; all of them if None.
    """

    group: Any = None

    def __init__(self, measures: Mapping[str, StepFunction] | None = None) -> None:
        super().__init__()
        self.measures: dict[str, StepFunction] = dict(measures or {})

    def __call__(self, network: nn.Module, batch: Batch, output: Tensor, records: Mapping[str, Tensor]) -> Tensor:
        """:meth:`forward`, once all measures are there.

        Raises:
            TypeError: records are no mapping.
            ValueError: a measure is missing.
        """
        if not isinstance(records, Mapping):
            raise TypeError(f"records must hold measures by name, got {type(records).__name__}")
        if missing := [name for name in self.measures if name not in records]:
            raise ValueError(
                f"records must hold {missing}, which {type(self).__name__} reads, got {list(records)}: record them, "
                "output, records = network.record(x, **objective.measures)"
            )
        return super().__call__(network, batch, output, records)

    def forward(self, network: nn.Module, batch: Batch, output: Tensor, records: Records) -> Tensor:
        """The loss, a scalar.

        Args:
            network: the network, in training mode.
            batch: inputs and labels.
            output: the network's output, ``(B, classes)``.
            records: per measure ``(blocks, B)``.
        """
        raise NotImplementedError

    @property
    def needs_second_forward(self) -> bool:
        """Whether :meth:`after_step` will call the network after the coming step."""
        return False

    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """Called after each step of the optimizer with the batch, or with its last part where it came in parts.

        Where it calls the network, which :attr:`needs_second_forward` says, the network's buffers and random state are
        then put back: running statistics count a batch once.
        """


class CrossEntropy(Objective):
    """Cross-entropy of the output, in float32 at least. Labels are classes, or shares of the classes.

    A sample with the label -100 counts for nothing, as in torch; its action counts.

    Args:
        label_smoothing: share of the target that is spread over all classes, in [0, 1).

    Raises:
        ValueError: a share outside [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, network: nn.Module, batch: Batch, output: Tensor, records: Records) -> Tensor:
        output, y = logits_and_labels(output, _labels(batch))
        return F.cross_entropy(output, y, label_smoothing=self.label_smoothing)


class ReverseCrossEntropy(Objective):
    """``-1/(C-1) sum over c != y of log softmax_c(-z)``: the classes that are not right are to be equally likely.

    The network of Pang et al. (2018) has outputs ``-z`` in training and is used with their negatives. Here z is
    the network's output throughout, so that the most likely class is its largest, as for any other classifier, and an
    attacker who differentiates it knows of the negation.
    """

    def forward(self, network: nn.Module, batch: Batch, output: Tensor, records: Records) -> Tensor:
        output, y = logits_and_labels(output, _labels(batch))
        if y.is_floating_point():
            raise ValueError(f"labels must be classes (B,), whole numbers, got shares of the classes {_shape(y)}")
        others = F.log_softmax(-output, 1).scatter(1, y[:, None], 0.0).sum(1)
        return -others.mean() / (output.shape[1] - 1)


def check_loss(loss: Any, objective: Objective) -> None:
    """That a loss is one that a backward pass can start from.

    Raises:
        TypeError: no tensor.
        ValueError: no scalar, or one that depends on no parameter.
    """
    name = type(objective).__name__
    if not isinstance(loss, Tensor):
        raise TypeError(f"objective must return a loss, a scalar tensor, but {name} returns {type(loss).__name__}")
    if loss.ndim:
        raise ValueError(f"objective must return a scalar, but {name} returns a loss of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"the loss of {name} depends on no parameter that requires a gradient: nothing would train")


def after_step(objective: Objective, network: nn.Module, batch: Batch) -> None:
    """Tell an objective of a step; where it looks at the network again, that leaves no trace there."""
    with keeping_state(network) if objective.needs_second_forward else nullcontext():
        objective.after_step(network, batch)
