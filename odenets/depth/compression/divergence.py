"""Divergence of a network's outputs from those of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from odenets.depth.compression.positions import at_tokens, tokens_in
from odenets.depth.compression.units import positional
from odenets.inputs import kind_of
from odenets.outputs import logits_in

__all__ = ["Kind", "Outputs", "are_logits", "checked_run", "kl_divergence", "run", "tensor_in"]

Kind = Literal["auto", "logits", "values"]
"""What the outputs of a network are."""


def run(network: nn.Module, inputs: Any) -> Any:
    """The output of a network for the inputs of a batch."""
    args, kwargs = positional(inputs)
    return network(*args, **kwargs)


def checked_run(network: nn.Module, inputs: Any, name: str) -> Any:
    """The same for inputs that a user gives, in the argument of a ``name``.

    Raises:
        ValueError: the network does not take them.
    """
    try:
        return run(network, inputs)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{name} must hold batches of inputs that {type(network).__name__} takes, or pairs of such and labels, got "
            f"{kind_of(inputs)} for one batch: {error}"
        ) from error


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
    def of(cls, network: nn.Module, inputs: Sequence[Any], kind: Kind = "auto") -> Outputs:
        """The outputs of a ``network`` for some ``inputs`` of the calibration, of a ``kind``; see :func:`are_logits`.

        Raises:
            ValueError: the network does not take them.
        """
        outputs = [checked_run(network, one, "calibration") for one in inputs]
        return cls(inputs, [tensor_in(one) for one in outputs], are_logits(outputs[0], kind))

    def only(self, number: int) -> Outputs:
        """Those of the first batches."""
        return Outputs(self.inputs[:number], self.outputs[:number], self.classifies)

    @torch.no_grad()
    def divergence(self, network: nn.Module, before: Callable[[int], object] | None = None) -> float:
        """That of the outputs of another ``network``, padding aside; infinite where they are not finite.

        ``before`` is called with the number of a batch before it.
        """
        error, scale = 0.0, 0.0
        for b, (one, wanted) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            if before is not None:
                before(b)
            output, wanted = (at_tokens(x, tokens_in(one)).float() for x in (tensor_in(run(network, one)), wanted))
            if self.classifies:
                divergences = kl_divergence(output, wanted)
                error += divergences.sum().item()
                scale += len(divergences)
            else:
                error += (output - wanted).square().sum().item()
                scale += (wanted - wanted.mean()).square().sum().item()
        value = error / (scale or 1.0)
        return max(value, 0.0) if value == value else float("inf")


def are_logits(output: Any, kind: Kind) -> bool:
    """Whether an ``output`` is of logits along its last axis: of the ``kind`` "logits".

    With "auto" it is if it is called so, or is a tensor ``(B, K)`` of more than one number.
    """
    if kind != "auto":
        return kind == "logits"
    inner = logits_in(output)
    if inner is not output:
        return True
    return isinstance(output, Tensor) and output.ndim == 2 and output.shape[-1] > 1


def kl_divergence(output: Tensor, wanted: Tensor) -> Tensor:
    """That of Kullback and Leibler of probabilities from those wanted, of logits ``(..., K)``, in nats for each row.

    Classes whose probability is to be 0 cost nothing.

    >>> wanted = torch.tensor([[0.0, 0.0, -float("inf")]])
    >>> kl_divergence(torch.tensor([[0.0, 0.0, -float("inf")]]), wanted)
    tensor([0.])
    """
    logs, others = (x.flatten(0, -2).log_softmax(-1) for x in (output, wanted))
    never = others == -torch.inf
    return (others.exp() * (others - logs).masked_fill(never, 0.0)).sum(-1)


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
