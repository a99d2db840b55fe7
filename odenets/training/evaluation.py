"""Evaluation: loss and accuracy of a network on a data set, which leaves no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.modes import evaluating, inputs_for, keeping_state, total_dtype
from odenets.network import Network
from odenets.training.data import Batches
from odenets.training.objectives import logits_and_labels, right_answers

__all__ = ["Evaluation", "evaluate", "evaluate_schemes"]


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy on a data set."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(network: nn.Module, batches: Batches) -> Evaluation:
    """Cross-entropy and accuracy in eval mode on the samples as they are, neither cropped nor mirrored.

    Inputs are taken to the network's device and dtype; its modes, buffers and random state are left as they were, and
    the device is waited for once.

    Raises:
        TypeError, ValueError: the network returns no logits, or not one for each class.
    """
    return _evaluate(network, batches, lambda x: {"": network(x)})[""]


@torch.no_grad()
def evaluate_schemes(network: Network, batches: Batches, *, full_passes: bool = False) -> dict[str, Evaluation]:
    """:func:`evaluate` of every output of :meth:`Network.outputs`: each embedded scheme, and "ensemble".

    Raises:
        TypeError: a network without such outputs.
        TypeError, ValueError: as :func:`evaluate` raises.
    """
    if not hasattr(network, "outputs"):
        raise TypeError(f"network must be an odenets.Network, whose schemes have outputs, got {type(network).__name__}")
    return _evaluate(network, batches, lambda x: network.outputs(x, full_passes=full_passes))


def _evaluate(
    network: nn.Module, batches: Batches, outputs: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Evaluation]:
    data, totals = batches.data, {}
    with keeping_state(network), evaluating(network):
        for x, y in batches.in_order():
            for name, output in outputs(inputs_for(network, x)).items():
                output, y = logits_and_labels(output, y.to(output.device) if isinstance(output, Tensor) else y)
                if name not in totals:
                    logits = output.shape[1]
                    if logits < data.classes and logits <= (largest := int(data.y.max())):
                        raise ValueError(
                            f"the network has {logits} logits, and the labels of {data.name} go up to {largest}"
                        )
                    totals[name] = torch.zeros(2, dtype=total_dtype(output.device), device=output.device)
                totals[name] += torch.stack([F.cross_entropy(output, y, reduction="sum"), right_answers(output, y)])
    values = (torch.stack(list(totals.values())) / len(data)).tolist()
    return {name: Evaluation(*value) for name, value in zip(totals, values, strict=True)}
