"""Objectives: what training minimises, a function of a network's output and of what was measured on its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from odenets.flow import Records
from odenets.measures import Measure

__all__ = ["Batch", "CrossEntropy", "Objective", "ReverseCrossEntropy"]

Batch = tuple[Tensor, Tensor]


class Objective(nn.Module):
    """What is minimised. What it must remember from step to step are its buffers: they are saved and restored.

    Attributes:
        measures: the measures that the network is to record, by name.
        group: the processes that share its batches; all of them if None.
    """

    group: Any = None

    def __init__(self, measures: Mapping[str, Measure] | None = None) -> None:
        super().__init__()
        self.measures: dict[str, Measure] = dict(measures or {})

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
    def looks_again(self) -> bool:
        """Whether :meth:`after_step` will call the network after the coming step."""
        return False

    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """Called after each step of the optimiser with the batch, or with its last part where it came in parts."""


class CrossEntropy(Objective):
    """Cross-entropy of the output.

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
        return F.cross_entropy(output, batch[1], label_smoothing=self.label_smoothing)


class ReverseCrossEntropy(Objective):
    """``-1/(C-1) sum over c != y of log softmax_c(-z)``: the classes that are not right are to be equally likely.

    The network of Pang et al. (2018) has outputs ``-z`` while it learns and is asked with their negatives. Here z is
    the network's output throughout, so that the most likely class is its largest, as for any other classifier, and an
    attacker who differentiates it knows of the negation.
    """

    def forward(self, network: nn.Module, batch: Batch, output: Tensor, records: Records) -> Tensor:
        likely = F.log_softmax(-output, 1)
        others = likely.scatter(1, batch[1][:, None], 0.0).sum(1)
        return -others.mean() / (output.shape[1] - 1)
