"""Checks of what a solver takes; numbers of the host as tensors, and back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "called",
    "check_call",
    "check_finite",
    "check_state",
    "exact",
    "in_state_shape",
    "is_mapped",
    "is_transformed",
    "mismatch",
    "real_dtype",
    "to_state_shape",
]


def check_call(
    function: Any, args: Sequence[Any] | None = (), name: str = "field", remedy: str = "", **unseen: Any
) -> None:
    """That a field or an event takes t, x and these further arguments, or, where they are None, t and x at least.

    Nothing is looked at in a compiled graph.

    Raises:
        TypeError: it does not; keywords ``unseen``, which it takes besides, are not named.
    """
    plain = isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__
    called = function.forward if plain else function
    problem = None
    if not torch.compiler.is_compiling():
        problem = mismatch(called, 0.0, None, *(args or ()), least=args is None, **unseen)
    if problem is not None:
        further = f"t, x and {len(args)} further, as v(t, x, c)" if args else "t and x, as v(t, x)"
        kind = getattr(function, "__name__", type(function).__name__)
        raise TypeError(f"{name} must take {further}, but {kind} takes {problem}{remedy}")


def mismatch(function: Any, *args: Any, least: bool = False, **unseen: Any) -> str | None:
    """Its signature and why a function cannot be called so, or with ``least`` so and with more; None if it can."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is compiled
        return None
    parameters = [p.replace(annotation=p.empty) for key, p in signature.parameters.items() if key not in unseen]
    seen = inspect.Signature(parameters)
    if least and seen.parameters and [*seen.parameters][1:2] in (["t"], ["time"]):
        return f"{seen} (t is its first argument)"
    try:
        for one, keywords in ((seen, {}), (signature, unseen)):
            (one.bind_partial if least else one.bind)(*args, **keywords)
    except TypeError as error:
        return f"{seen} ({str(error).replace('too many positional arguments', 'no further arguments by position')})"
    return None


def called(function: Any, name: str, t: Any, x: Tensor, *args: Any) -> Any:
    """A part of a field, called.

    Raises:
        ValueError: it fails, and is a module of another precision than the state.
    """
    try:
        return function(t, x, *args)
    except RuntimeError as error:
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        other = next((p.dtype for p in parameters if p.is_floating_point() and p.dtype != real_dtype(x)), None)
        if other is None:
            raise
        raise ValueError(
            f"{name} must have the dtype of the state, {x.dtype}, got parameters of {other}: take field.to(x0), or "
            f"x0.to({other})"
        ) from error


def check_state(x: object, name: str = "x") -> None:
    """Reject what is not a batch of finite floating states, naming the argument.

    Values are looked at on the CPU only: on another device this would wait for it.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: no feature dimension, no sample, or NaN or infinity.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (B, *S), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {x.dtype}; convert it with {name}.float()")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (B, *S) with at least one feature dimension, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must hold at least one sample and one feature, got shape {tuple(x.shape)}")
    check_finite(x, name)


def check_finite(x: Tensor, name: str) -> None:
    """Looks for NaN and infinity on CPUs only: elsewhere it would wait for the device."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_mapped(x):
        return
    try:  # the sum of finite numbers takes one pass; where it overflows every number is looked at
        total = x.detach().sum()
        torch._assert_async(total - total == 0)  # type: ignore[attr-defined] - torch's own, untyped
    except RuntimeError:
        bad = ~x.detach().isfinite()
        samples = bad.flatten(1).any(1).nonzero().flatten().tolist() if x.ndim > 1 else []
        if bad.any():
            where = f" in sample(s) {samples[:8]}" if samples else ""
            raise ValueError(f"{name} must be finite, got NaN or infinity{where}") from None


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the numbers of a floating or complex tensor, which is that of its times and step sizes."""
    return x.dtype.to_real() if x.is_complex() else x.dtype


def exact(numbers: Any, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, float64, or float32 on a device that has no float64."""
    wide = np.array(numbers, dtype=np.float64)
    try:
        return torch.from_numpy(wide).to(device)
    except (TypeError, RuntimeError):
        return torch.from_numpy(wide.astype(np.float32)).to(device)


def to_state_shape(values: np.ndarray, x: Tensor) -> Tensor:
    """A value per sample, ``(B,)``, as it broadcasts against states ``(B, *S)`` on their device.

    Numbers of float64 or float32 states keep that precision, narrower ones get float32.
    """
    if values.dtype == np.float64 and real_dtype(x) != torch.float64:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    return torch.from_numpy(values).to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


def in_state_shape(values: Tensor, x: Tensor) -> Tensor:
    """A tensor of a value per sample, ``(B,)``, as it broadcasts against states ``(B, *S)``; a scalar as it is."""
    return values.view(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def is_transformed(x: Tensor) -> bool:
    """Whether a transform of ``torch.func`` is at work on the tensor: vmap, grad, jvp and what is made of them."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined] - torch's own, untyped


def is_mapped(x: Tensor) -> bool:
    """Whether the tensor stands for many under ``torch.vmap``, within grad or jvp too, and has no values of its own."""
    mapped = torch._C._functorch.is_batchedtensor  # type: ignore[attr-defined] - torch's own, untyped
    if mapped(x) or torch.compiler.is_compiling():  # which does not trace what follows
        return mapped(x)
    while is_transformed(x):
        x = torch._C._functorch.get_unwrapped(x)  # type: ignore[attr-defined] - torch's own, untyped
        if mapped(x):
            return True
    return False
