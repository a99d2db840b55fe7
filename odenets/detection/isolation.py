"""A network under attack or observation: modes, gradients and random states restored, inputs and logits checked."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from odenets.modes import device_of, dtype_of, evaluating, inputs_for
from odenets.outputs import logits_in

__all__ = [
    "Logits",
    "check_weights",
    "checked_logits",
    "frozen",
    "in_float32",
    "keeping_random_states",
    "seeded",
    "to_network",
]

N = TypeVar("N", bound=nn.Module)


@contextmanager
def frozen(network: N) -> Iterator[N]:
    """The network in eval mode, its parameters without gradients; gradients of inputs are enabled.

    Afterwards the mode of each of its modules is restored, of each parameter ``grad`` and ``requires_grad``, and the
    random states. A network made under ``torch.inference_mode``, whose tensors take no gradients, is replaced by a
    copy.

    Raises:
        ValueError: a flow has not seen an input yet and has no field, or weights on the meta device.
    """
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("network has a flow without a field: call network(x) once before attacking it")
    check_weights(network)
    with torch.inference_mode(False), torch.enable_grad(), keeping_random_states(device_of(network)):
        if any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers())):
            network = copy.deepcopy(network)
        state = [(p, p.requires_grad, p.grad) for p in network.parameters()]
        try:
            with evaluating(network):
                for p, _, _ in state:
                    p.grad = None
                    p.requires_grad_(False)
                yield network
        finally:
            for p, requires_grad, gradient in state:
                p.requires_grad_(requires_grad)
                p.grad = gradient


def check_weights(network: nn.Module) -> None:
    """That the weights of a ``network`` are numbers.

    Raises:
        ValueError: some are on the meta device.

    >>> check_weights(nn.Linear(2, 2, device="meta"))
    Traceback (most recent call last):
        ...
    ValueError: network must have weights, got 'weight' on the meta device: load them, network.load_state_dict(..., ...
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            remedy = "load them, network.load_state_dict(..., assign=True)"
            raise ValueError(f"network must have weights, got {name!r} on the meta device: {remedy}")


@contextmanager
def keeping_random_states(device: torch.device | None = None) -> Iterator[None]:
    """Restore the random states of torch, of NumPy's global generator (which ART uses) and of ``random`` on leaving.

    Of torch these are the CPU's and that of ``device``, if it is a CUDA device.
    """
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that ART draws from
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_before)  # noqa: NPY002
            random.setstate(before)


@contextmanager
def seeded(*seed: int, device: torch.device | None = None) -> Iterator[None]:
    """:func:`keeping_random_states`, and meanwhile draws by a seed of non-negative integers."""
    if any(s < 0 for s in seed):
        raise ValueError(f"seed must not be negative, got {', '.join(map(str, seed))}")
    word = int(np.random.SeedSequence(seed).generate_state(1)[0])
    with keeping_random_states(device):
        torch.default_generator.manual_seed(word)
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(word)
        np.random.seed(word)  # noqa: NPY002
        random.seed(word)
        yield


def to_network(network: nn.Module, x: Any) -> Any:
    """Inputs on the network's device and, if they are floating, in its precision; as they are where it holds none.

    A tensor, or of a mapping of inputs by keyword each tensor.
    """
    return inputs_for(network, x)


def in_float32(network: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``call`` of inputs taken to the network's precision, its result in float32 or wider, on the network's device.

    Gradients that pass back through a network in float16 are scaled meanwhile, each sample's to a largest entry of
    about 1: that of a confident prediction, or of a mean over a batch, is 0 in half precision.
    """
    half = dtype_of(network, x.dtype) == torch.float16
    scale: list[Tensor] = []

    def scaled(gradient: Tensor) -> Tensor:
        largest = gradient.flatten(1).abs().amax(1)
        exponent = torch.frexp(largest).exponent
        scale[:] = [torch.ldexp(torch.ones_like(largest), -exponent)]
        return gradient * scale[0].reshape(-1, *[1] * (gradient.ndim - 1))

    def restored(gradient: Tensor) -> Tensor:
        return gradient / scale[0].reshape(-1, *[1] * (gradient.ndim - 1)) if scale else gradient

    if half and x.requires_grad:
        x = x.view_as(x)
        x.register_hook(restored)
    z = call(to_network(network, x))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if half and z.requires_grad:
        z.register_hook(scaled)
    return z


def checked_logits(output: Any, samples: int, fewest: int = 1) -> Tensor:
    """The output of a network for a batch, or the logits in it, if they are a floating tensor ``(samples, classes)``.

    Raises:
        TypeError, ValueError: it is not, or there are fewer classes than ``fewest``.
    """
    rule = "network must return logits, one floating tensor of shape (B, classes)"
    output = logits_in(output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(f"{rule}, got {kind}: wrap it in a module that returns the logits alone")
    if output.ndim != 2 or len(output) != samples or output.shape[1] < fewest:
        least = f" with at least {fewest} classes" if fewest > 1 else ""
        raise ValueError(f"{rule}{least}, got shape {tuple(output.shape)} for {samples} inputs")
    return output


def _finite(gradient: Tensor) -> None:
    """Refuse a gradient that is not finite: ART replaces NaN by 0, and the image stays as it is."""
    if not gradient.isfinite().all():
        raise ValueError("network must have finite gradients to be attacked, got NaN or infinity")


class Logits(nn.Module):
    """A network as attacks see it: float32 pixels in, logits ``(B, classes)`` out, float32 whatever its precision.

    Args:
        network: from pixels in [0, 1] to logits; it computes in its own precision, on its own device.

    Raises:
        TypeError, ValueError: when called, if the network returns something else, see :func:`checked_logits`, logits
            that are not finite, or has no gradient or one that is not finite.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(B, C, H, W)``, ``(B, classes)`` float32 on the network's device."""
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(_finite)
        z = in_float32(self.network, lambda x: checked_logits(self.network(x), len(x), 2), x).float()
        if x.requires_grad and torch.is_grad_enabled() and not z.requires_grad:
            raise ValueError(
                "network must pass gradients from its logits to the images, got none: leave no_grad, detach and NumPy "
                'out of its forward pass, or choose an attack by predictions, "HSJ" or "BA"'
            )
        return z

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Predicted classes, ``(B,)`` int64 on the CPU."""
        logits = checked_logits(self.network(to_network(self.network, x)), len(x), 2)
        if not (logits < torch.inf).all():
            raise ValueError("network must return finite logits, got NaN or infinity: does it diverge on these images?")
        return logits.argmax(1).cpu()
