"""Trees of tensors: a state that is a tuple or a dictionary of tensors, packed into one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.validation import check_finite

__all__ = ["Packing"]


class Packing:
    """How a state is laid out: a tensor stays as it is, a tuple or dictionary of tensors becomes one.

    Args:
        state: a tensor, or a tuple or dictionary of tensors of one dtype and device.
        name: of the argument, for errors.
        batched: the first dimension of all parts is the batch ``B``: they become one ``(B, N)``, not one vector.
        finite: whether NaN and infinity are looked for.

    Raises:
        TypeError: something else, or an integer tensor.
        ValueError: nothing in it, dtypes, devices or batches that differ, or NaN or infinity (looked for on CPUs only).
    """

    def __init__(self, state: Any, name: str = "y0", *, batched: bool = False, finite: bool = True) -> None:
        self.keys = tuple(state) if isinstance(state, Mapping) else None
        self.single = isinstance(state, Tensor)
        if not self.single and not isinstance(state, (tuple, Mapping)):
            raise TypeError(f"{name} must be a tensor, or a tuple or dictionary of tensors, got {type(state).__name__}")
        parts = self._parts(state, name)
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
        for part in parts if finite else ():
            check_finite(part, name)
        self.batched = batched
        self.shapes = [part.shape[batched:] for part in parts]

    def _parts(self, state: Any, name: str) -> tuple[Any, ...]:
        parts = (state,) if self.single else tuple(state) if self.keys is None else tuple(state[k] for k in self.keys)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{name} must hold tensors, got {[type(part).__name__ for part in parts]}")
        return parts

    def pack(self, state: Any, name: str = "y0") -> Tensor:
        """The state as one tensor.

        Raises:
            ValueError: another structure than the first state's, or other shapes.
        """
        if self.single:
            return state
        if self.keys is not None and (not isinstance(state, Mapping) or set(state) != set(self.keys)):
            raise ValueError(f"{name} must be a dictionary with keys {list(self.keys)}, got {state!r:.100}")
        if self.keys is None and not (isinstance(state, (tuple, list)) and len(state) == len(self.shapes)):
            raise ValueError(f"{name} must be a tuple of {len(self.shapes)} tensors, got {type(state).__name__}")
        parts = self._parts(state, name)
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
        if self.single or isinstance(tolerance, (int, float, Tensor)):
            return tolerance
        parts = tuple(tolerance if self.keys is None else (tolerance[key] for key in self.keys))
        if len(parts) != len(self.shapes):
            raise ValueError(f"a tolerance per part needs {len(self.shapes)} entries, got {len(parts)}")
        wide = [torch.as_tensor(p, dtype=dtype) for p in parts]
        return torch.cat([p.expand(s).reshape(-1) for p, s in zip(wide, self.shapes, strict=True)])
