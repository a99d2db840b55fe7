"""What an adaptive solve accepts: the error ratio of a step, the first step, the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.reductions import SMALL, finish_step
from solvers.step import Field, Step, velocity
from solvers.validation import is_mapped

__all__ = ["Tolerance", "numbers"]


@dataclass(frozen=True, eq=False)
class Tolerance:
    """What an adaptive solve accepts and how far it goes.

    Attributes:
        rtol, atol: the error of each feature is divided by ``atol + rtol * max(|x0|, |x1|)``; a step is good if the
            root mean square of these ratios, over the batch and the features, is at most 1. Numbers, or tensors that
            broadcast against the state. The thesis (appendix A.3) has ``eps * (1 + max(|order3|, |order2|))``, the two
            solutions at the end of the step, for one sample: here ``rtol = atol = eps``, the states at the two ends of
            the step as in Hairer, Norsett and Wanner (II.4), and the mean also over the batch, unless
            ``control="sample"``. An error of 0 is within any tolerance.
        norm: what takes the place of the root mean square, ``Tensor -> scalar``.
        first_step: size of the first attempted step; None derives it from two field evaluations
            (Hairer, Norsett, Wanner, II.4).
        min_step: a step that asks for this size or less takes it and is accepted whatever its error, if finite.
        max_step: largest step.
        max_steps: largest number of attempted steps, which bounds every solve.

    Raises:
        ValueError: a limit or tolerance is out of range.
    """

    rtol: float | Tensor = 1e-3
    atol: float | Tensor = 1e-6
    norm: Callable[[Tensor], Tensor] | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 10_000
    _exact: bool = field(init=False, repr=False, default=False)  # whether atol holds a 0: 0 / 0 may occur

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            tensor = isinstance(value, Tensor)
            if tensor and value.requires_grad:
                raise ValueError(f"{name} must not require a gradient")
            good = bool((value.isfinite() & (value >= 0)).all()) if tensor else math.isfinite(value) and value >= 0
            if not good:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not any(bool(value.any()) if isinstance(value, Tensor) else value for value in (self.rtol, self.atol)):
            raise ValueError("rtol and atol must not both be 0")
        if self.first_step is not None and not (math.isfinite(self.first_step) and self.first_step > 0):
            raise ValueError(f"first_step must be positive and finite, got {self.first_step}")
        if not 0 <= self.min_step < math.inf:
            raise ValueError(f"min_step must be finite and not negative, got {self.min_step}")
        if not self.max_step > 0 or self.max_step < self.min_step:
            raise ValueError(f"max_step must be positive and not below min_step, got {self.max_step}")
        if not 1 <= self.max_steps < math.inf:
            raise ValueError(f"max_steps must be at least 1 and finite, got {self.max_steps}")
        exact = bool((self.atol == 0).any()) if isinstance(self.atol, Tensor) else self.atol == 0
        object.__setattr__(self, "_exact", exact)

    def scaled(self, error: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        """The error over its tolerance, ``error / (atol + rtol * max(|x0|, |x1|))``, in float32 or wider."""
        if error.dtype in (torch.float16, torch.bfloat16):
            error, x0, x1 = error.float(), x0.float(), x1.float()
        return self._over(error, torch.maximum(x0.abs(), x1.abs()).mul_(self.rtol).add_(self.atol))

    def _over(self, value: Tensor, scale: Tensor) -> Tensor:
        quotient = value / scale
        return torch.where(value == 0, 0, quotient) if self._exact else quotient

    def size(self, scaled: Tensor) -> Tensor:
        """The norm of :meth:`scaled`, a scalar tensor; nothing here waits for the device."""
        if self.norm is not None:
            return torch.as_tensor(self.norm(scaled), device=scaled.device).abs()
        return torch.linalg.vector_norm(scaled) / math.sqrt(scaled.numel())

    def sizes(self, scaled: Tensor) -> Tensor:
        """The norm of each sample, ``(B,)``."""
        if self.norm is not None:
            return torch.vmap(self.norm)(scaled).abs()
        return torch.linalg.vector_norm(scaled.flatten(1), dim=1) / math.sqrt(scaled[0].numel())

    def ratio(self, step: Step) -> float:
        """Norm of the embedded error of a step over its tolerance; waits for the device, once."""
        if (each := self._in_one_pass(step)) is not None:
            return numbers(torch.linalg.vector_norm(each)) / math.sqrt(len(each))
        scaled = self.scaled(step.error(), step.x0, step.x1)
        if self.norm is None:  # the root of the count as a number: a tensor operation less
            return numbers(torch.linalg.vector_norm(scaled)) / math.sqrt(scaled.numel())
        return numbers(self.size(scaled))

    def ratios(self, step: Step) -> np.ndarray:
        """:meth:`ratio` for each sample, ``(B,)``."""
        if (each := self._in_one_pass(step)) is None:
            each = self.sizes(self.scaled(step.error(), step.x0, step.x1))
        return np.array(numbers(each))

    def _in_one_pass(self, step: Step) -> Tensor | None:
        """:meth:`ratios` of large states, if tolerances and norm are the usual ones."""
        x = step.x0
        if x.numel() <= SMALL or x.ndim < 2 or self.norm is not None:
            return None
        if isinstance(self.rtol, Tensor) or isinstance(self.atol, Tensor) or self._exact:
            return None
        _, found = finish_step(
            x, step.stages, step.tableau, step.h, state=False, error=True, rtol=self.rtol, atol=self.atol
        )
        return found["error"]

    def choose_first_step(
        self,
        field: Field,
        t: float,
        x: Tensor,
        first: Tensor,
        direction: int,
        order: int,
        span: float = math.inf,
    ) -> float:
        """Starting step of Hairer, Norsett, Wanner (II.4): one field evaluation, two waits for the device.

        Args:
            field: velocity ``v(t, x)``.
            t, x: where the solve begins.
            first: the velocity there.
            direction: 1 or -1, of time.
            order: order q of the lower solution.
            span: how far the solve goes; the field is not asked beyond. It is asked with gradients as the solve is.
        """
        scale = self._scale(x.detach())
        d0, d1 = (numbers(self.size(self._over(v.detach(), scale))) for v in (x, first))
        if not math.isfinite(d0 + d1):
            return math.nan
        h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, span * (1 - 1e-15))
        second = velocity(field, t + direction * h0, torch.add(x, first.detach(), alpha=direction * h0))
        change = second.detach() - first.detach()
        slope = max(numbers(self.size(self._over(change, scale))) / h0, d1) if h0 else d1
        if not math.isfinite(slope):
            return h0  # so far the field is not defined: let the error control find how far it is
        return min(100 * h0, max(1e-6, h0 * 1e-3) if slope <= 1e-15 else (0.01 / slope) ** (1 / (order + 1)))

    def choose_first_steps(
        self,
        field: Field,
        t: Tensor,
        x: Tensor,
        first: Tensor,
        direction: Tensor,
        order: int,
        span: Tensor,
    ) -> Tensor:
        """:meth:`choose_first_step` for each sample, ``(B,)``; ``t`` and ``direction`` broadcast against the state."""
        scale = self._scale(x.detach())
        d0, d1 = (self.sizes(self._over(v.detach(), scale)) for v in (x, first))
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        near = torch.where(span > 0, torch.minimum(h0, span.to(h0)), 0)  # where it is 0 no step will be taken
        h = direction * near.reshape(direction.shape).to(direction.dtype)
        second = velocity(field, t + h, torch.addcmul(x, first.detach(), h).to(x.dtype))
        h0 = torch.where(near > 0, near, h0)
        slope = torch.maximum(self.sizes(self._over(second.detach() - first.detach(), scale)) / h0, d1)
        h1 = torch.where(slope <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / slope) ** (1 / (order + 1)))
        h1 = torch.where(slope.isfinite() | ~(d0 + d1).isfinite(), h1, h0)
        return torch.minimum(100 * h0, h1)

    def _scale(self, x: Tensor) -> Tensor:
        real = torch.promote_types(x.dtype, torch.float32).to_real()
        return x.abs().to(real).mul_(self.rtol).add_(self.atol)


def numbers(x: Tensor) -> Any:
    """The values of a tensor, as a number or a list; waits for the device.

    Raises:
        RuntimeError: under ``torch.vmap``, where a tensor has no values.
    """
    if is_mapped(x):
        raise RuntimeError(
            "an adaptive solve chooses its steps by numbers and cannot be mapped by torch.vmap: give the samples as "
            "one batch to integrate(..., control='sample'), where each has its own steps, or take fixed steps"
        )
    return x.tolist() if x.ndim else x.item()
