"""Divergence of a network's outputs from those of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from odenets.depth.compression.units import positional
from odenets.outputs import logits_in

__all__ = ["Outputs", "run"]


def run(network: nn.Module, inputs: Any) -> Any:
    """The output of a network for the inputs of a batch."""
    args, kwargs = positional(inputs)
    return network(*args, **kwargs)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network on some batches, from which those of others diverge.

    Attributes:
        inputs: of the batches.
        outputs: of the network.
        classifies: whether they are logits, along the last axis: the divergence is that of Kullback and Leibler of
            the probabilities, in nats for each row; otherwise the square of the error over that of the output about its
            mean.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Tensor]
    classifies: bool

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, inputs: Sequence[Any], classifies: bool | None = None) -> Outputs:
        """The outputs of a ``network`` for some ``inputs``, which are logits if it ``classifies``.

        That is taken from the output itself if not told: what is called logits, or more than one number for a sample.
        """
        outputs = [tensor_in(run(network, one)) for one in inputs]
        if classifies is None:
            classifies = outputs[0].ndim in (2, 3) and outputs[0].shape[-1] > 1
        return cls(inputs, outputs, classifies)

    @torch.no_grad()
    def divergence(self, network: nn.Module, before: Callable[[int], object] | None = None) -> float:
        """That of the outputs of another ``network``; infinite where they are not finite.

        ``before`` is called with the number of a batch before it.
        """
        error, scale = 0.0, 0.0
        for b, (one, wanted) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if before is not None:
                before(b)
            output = tensor_in(run(network, one)).float()
            wanted = wanted.float()
            if self.classifies:
                logs, others = (x.flatten(0, -2).log_softmax(-1) for x in (output, wanted))
                error += F.kl_div(logs, others, reduction="sum", log_target=True).item()
                scale += len(logs)
            else:
                error += (output - wanted).square().sum().item()
                scale += (wanted - wanted.mean()).square().sum().item()
        value = error / (scale or 1.0)
        return max(value, 0.0) if value == value else float("inf")


def tensor_in(output: Any) -> Tensor:
    """The logits in an output, or its first floating tensor.

    Raises:
        TypeError: it holds none.
    """
    output = logits_in(output)
    if isinstance(output, Tensor):
        return output
    for leaf in tree_leaves(output if isinstance(output, tuple | list | dict) else [*vars(output).values()]):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise TypeError(f"the output of the network must hold a floating tensor, got a {type(output).__name__}")
