"""States at the door: what a solver takes, and tuples and dictionaries of tensors as one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Packing", "check_state", "exact", "is_mapped", "is_transformed", "real_dtype"]


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
    _check_finite(x, name)


def _check_finite(x: Tensor, name: str) -> None:
    """Looks for NaN and infinity on CPUs only: elsewhere it would wait for the device."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_mapped(x):
        return
    try:  # the sum of finite numbers takes one pass; where it overflows every number is looked at
        total = x.detach().sum()
        torch._assert_async(total - total == 0)  # type: ignore[attr-defined]
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


def is_transformed(x: Tensor) -> bool:
    """Whether a transform of ``torch.func`` is at work on the tensor: vmap, grad, jvp and what is made of them."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)  # type: ignore[attr-defined]


def is_mapped(x: Tensor) -> bool:
    """Whether the tensor stands for many under ``torch.vmap``, within grad or jvp too, and has no values of its own."""
    mapped = torch._C._functorch.is_batchedtensor  # type: ignore[attr-defined]
    if mapped(x) or torch.compiler.is_compiling():  # which does not trace what follows
        return mapped(x)
    while is_transformed(x):
        x = torch._C._functorch.get_unwrapped(x)  # type: ignore[attr-defined]
        if mapped(x):
            return True
    return False


class Packing:
    """How a state is laid out: a tensor stays as it is, a tuple or dictionary of tensors becomes one.

    Args:
        state: a tensor, or a tuple or dictionary of tensors of one dtype and device.
        name: of the argument, for errors.
        batched: the first dimension of all parts is the batch ``B``: they become one ``(B, N)``, not one vector.

    Raises:
        TypeError: something else, or an integer tensor.
        ValueError: nothing in it, dtypes, devices or batches that differ, or NaN or infinity (looked for on CPUs only).
    """

    def __init__(self, state: Any, name: str = "y0", *, batched: bool = False) -> None:
        self.keys = tuple(state) if isinstance(state, Mapping) else None
        self.single = isinstance(state, Tensor)
        if not self.single and not isinstance(state, tuple | Mapping):
            raise TypeError(f"{name} must be a tensor, or a tuple or dictionary of tensors, got {type(state).__name__}")
        parts = self._parts(state)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{name} must hold tensors, got {[type(part).__name__ for part in parts]}")
        if sum(part.numel() for part in parts) == 0:
            raise ValueError(f"{name} must hold at least one number, got shapes {[tuple(p.shape) for p in parts]}")
        if len({(part.dtype, part.device) for part in parts}) > 1:
            raise ValueError(
                f"{name} must have one dtype and device, got {[(str(p.dtype), str(p.device)) for p in parts]}"
            )
        first = parts[0]
        if not (first.is_floating_point() or first.is_complex()):
            raise TypeError(f"{name} must be floating or complex, got {first.dtype}; convert it with .float()")
        if (batched and len({part.shape[:1] for part in parts}) > 1) or (batched and not first.ndim):
            raise ValueError(f"{name} must have one batch size, got shapes {[tuple(p.shape) for p in parts]}")
        for part in parts:
            _check_finite(part, name)
        self.batched = batched
        self.shapes = [part.shape[batched:] for part in parts]

    def _parts(self, state: Any) -> tuple[Any, ...]:
        if self.single:
            return (state,)
        return tuple(state) if self.keys is None else tuple(state[key] for key in self.keys)

    def pack(self, state: Any, name: str = "y0") -> Tensor:
        """The state as one tensor.

        Raises:
            ValueError: another structure than the first state's, or other shapes.
        """
        if self.single:
            return state
        if self.keys is not None and (not isinstance(state, Mapping) or set(state) != set(self.keys)):
            raise ValueError(f"{name} must be a dictionary with keys {list(self.keys)}, got {state!r:.100}")
        if self.keys is None and not (isinstance(state, tuple | list) and len(state) == len(self.shapes)):
            raise ValueError(f"{name} must be a tuple of {len(self.shapes)} tensors, got {type(state).__name__}")
        parts = self._parts(state)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{name} must hold tensors, got {[type(part).__name__ for part in parts]}")
        shapes = [part.shape[self.batched :] for part in parts]
        if shapes != self.shapes:
            raise ValueError(
                f"{name} must keep the shapes {[tuple(s) for s in self.shapes]}, got {[tuple(s) for s in shapes]}"
            )
        if self.batched:
            return torch.cat([part.reshape(len(part), -1) for part in parts], 1)
        return torch.cat([part.reshape(-1) for part in parts])

    def unpack(self, packed: Tensor) -> Any:
        """The state in ``packed`` ``(*L, N)``, every tensor with the leading dimensions ``L``."""
        if self.single:
            return packed
        lead = packed.shape[:-1]
        parts = packed.split([shape.numel() for shape in self.shapes], -1)
        parts = tuple(part.reshape((*lead, *shape)) for part, shape in zip(parts, self.shapes, strict=True))
        return parts if self.keys is None else dict(zip(self.keys, parts, strict=True))

    def expand(self, tolerance: Any, dtype: torch.dtype = torch.float64) -> Any:
        """A tolerance per part as one per number, of a dtype; a number or tensor stays."""
        if self.single or isinstance(tolerance, int | float | Tensor):
            return tolerance
        parts = self._parts(tolerance)
        if len(parts) != len(self.shapes):
            raise ValueError(f"a tolerance per part needs {len(self.shapes)} entries, got {len(parts)}")
        wide = [torch.as_tensor(p, dtype=dtype) for p in parts]
        return torch.cat([p.expand(s).reshape(-1) for p, s in zip(wide, self.shapes, strict=True)])
