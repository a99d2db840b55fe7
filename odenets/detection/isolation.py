"""What attacks a network leaves no trace: its modes and gradients, and the random states, are as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

__all__ = ["device_of", "frozen", "seeded"]


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters lie; the CPU if it has none."""
    return next((p.device for p in network.parameters()), torch.device("cpu"))


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in eval mode, its parameters without gradients.

    Afterwards the mode of each of its modules is restored, and of each parameter the gradient and whether it asks for
    one.

    Raises:
        ValueError: a flow has not seen an input yet and has no field.
    """
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("network has a flow without a field: call network(x) once before attacking it")
    modes = [(module, module.training) for module in network.modules()]
    held = [(p, p.requires_grad, p.grad) for p in network.parameters()]
    network.eval()
    for p, _, _ in held:
        p.grad = None
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, asks, gradient in held:
            p.requires_grad_(asks)
            p.grad = gradient


@contextmanager
def seeded(*seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Draws of torch, of NumPy's global state (which ART uses) and of ``random`` by a seed; restored afterwards.

    Other devices' draws are left alone.

    Args:
        seed: non-negative integers that together are the seed.
        device: a CUDA device whose draws are seeded besides the CPU's.

    Raises:
        ValueError: a negative seed.
    """
    if any(s < 0 for s in seed):
        raise ValueError(f"seed must not be negative, got {', '.join(map(str, seed))}")
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that ART draws from
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(word)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(word)
        np.random.seed(word)  # noqa: NPY002
        random.seed(word)
        try:
            yield
        finally:
            np.random.set_state(numpy_before)  # noqa: NPY002
            random.setstate(before)
