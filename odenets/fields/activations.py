"""Activations by name."""

from __future__ import annotations

from torch import nn

__all__ = ["ACTIVATIONS", "make_activation"]

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "gelu": nn.GELU, "relu6": nn.ReLU6}


def make_activation(name: str) -> nn.Module:
    """The layer of an activation.

    Args:
        name: "relu", "silu", "tanh", "gelu" or "relu6".

    Raises:
        ValueError: another name.

    >>> make_activation("relu")
    ReLU()
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
