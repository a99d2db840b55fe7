"""One explicit Runge-Kutta step: the object that every measure looks at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling

from solvers.reductions import SMALL, combination, combine, finish_step
from solvers.tableaus import ButcherTableau

__all__ = ["Field", "Step", "check_unchanged", "rk_step", "step_state", "velocity", "versions_of"]

Field = Callable[[float | Tensor, Tensor], Tensor]
"""A velocity field ``v(t, x)``, of a time (a number, or a tensor that broadcasts) and a state ``(B, *S)``."""
_SEVERAL = (list, tuple)


def _weighted_sum(stages: Sequence[Tensor], weights: Sequence[float], h: float | Tensor) -> Tensor:
    """``h * sum_i w_i p_i``: as many tensor operations as non-zero weights."""
    (p, weight), *rest = [(p, w) for p, w in zip(stages, weights) if w != 0]  # noqa: B905 - torch 2.8's compiler takes strict=False for True
    add = combination if p.numel() <= SMALL else combine
    return add(p * (h * weight), [p for p, _ in rest], [w for _, w in rest], h)


class Step(NamedTuple):
    """A step of an explicit Runge-Kutta method on ``[t, t + h]``.

    Attributes:
        t: time at the start, a number.
        h: step size, a number or a tensor that broadcasts against the state.
        x0: state at the start, ``(B, *S)``.
        x1: state at the end, ``(B, *S)``.
        stages: velocities ``p_i``, each ``(B, *S)``. The closing stages, on which ``x1`` does not depend, are absent
            if the step is taken without them: the last one of an FSAL method, and all behind the solution of
            :meth:`~solvers.ButcherTableau.forwarding`.
        tableau: the method.
        reductions: numbers of each sample computed with ``x1``, by the names of :func:`solvers.finish_step`, or None.

    >>> from solvers import get_tableau
    >>> step = rk_step(lambda t, x: -x, 0.0, torch.ones(4, 2), 0.1, get_tableau("bs23"))
    >>> step.residue.shape, step.error().abs().max() < 1e-4
    (torch.Size([4, 2]), tensor(True))
    """

    t: float | Tensor
    h: float | Tensor
    x0: Tensor
    x1: Tensor
    stages: tuple[Tensor, ...]
    tableau: ButcherTableau
    reductions: dict[str, Tensor] | None = None

    @property
    def residue(self) -> Tensor:
        """``(x1 - x0) / h = sum_i b_i p_i``, from the stages, ``(B, *S)``."""
        return _weighted_sum(self.stages, self.tableau.b, 1.0)

    def error(self) -> Tensor:
        """Embedded error ``h * sum_i (b_i - b_low_i) p_i``, ``(B, *S)``.

        With one smooth field for all stages (tied) it is ``O(h^(q+1))`` for the lower order q: halving h divides
        BS23's by 8. A field with kinks has no such order: by 5.5 to 5.8 for the ReLU fields of ``ConvField`` at their
        first weights. With a field per stage (untied) the stages are not samples of one velocity, their differences do
        not vanish with h, and halving h only halves it.

        Raises:
            ValueError: the method has no embedded lower order, or the closing stage was not evaluated.
        """
        return _weighted_sum(self.stages, self.error_weights(), self.h)

    def error_weights(self) -> tuple[float, ...]:
        """The weights ``b_i - b_low_i`` of the stages in :meth:`error`.

        Raises:
            ValueError: as there.
        """
        weights = self.tableau.error_weights
        if weights is None:
            raise ValueError(f"{self.tableau.name} carries no embedded error; use one of bs23, dopri5, heun, midpoint")
        self._needs_stages(weights, "error()")
        return weights

    def output(self, name: str) -> Tensor:
        """The embedded output ``name`` of the method, ``(B, *S)``: ``x0 + h * sum_i b_i p_i`` with its weights.

        Those of a method are ``step.tableau.outputs``; BS23 has "euler", "midpoint", "order2" and "order3".

        Raises:
            ValueError: no such output, or it needs the closing stage and that was not evaluated.
        """
        weights = self.tableau.solution(name).b
        if weights == self.tableau.b:
            return self.x1
        self._needs_stages(weights, f"output({name!r})")
        return combine(self.x0, self.stages, weights, self.h)

    def at(self, theta: float | Tensor) -> Tensor:
        """The state at ``t + theta * h`` from the method's own interpolant, ``(B, *S)``.

        Args:
            theta: in [0, 1]; a tensor that broadcasts against the state lets gradients through.

        Returns:
            The state, ``(B, *S)``.

        Raises:
            ValueError: the method has no interpolant of its own, or it needs the closing stage and that was not
                evaluated.
        """
        weights = self.tableau.weights_at(theta)
        if not isinstance(theta, Tensor):
            self._needs_stages(weights, "at()")
            return combine(self.x0, self.stages, weights, self.h)
        if len(self.stages) < len(weights):
            raise ValueError(f"at() needs the closing stage of {self.tableau.name}: take the step with closing=True")
        x = self.x0
        for p, weight in zip(self.stages, weights, strict=True):
            x = x + (weight * self.h).to(p.dtype) * p
        return x

    def select(self, samples: Tensor) -> Step:
        """The step of some ``samples`` alone, indices ``(n,)`` or a mask ``(B,)``; it has no reductions."""
        t, h = (v[samples] if isinstance(v, Tensor) and v.ndim else v for v in (self.t, self.h))
        stages = tuple(p[samples] for p in self.stages)
        return Step(t, h, self.x0[samples], self.x1[samples], stages, self.tableau)

    def not_finite(self) -> np.ndarray:
        """The first stage of each sample that holds NaN or infinity, -1 where none does, ``(B,)``.

        A state of less than two dimensions is one sample.
        """
        rows = len(self.x0) if self.x0.ndim > 1 else 1
        bad = torch.stack([(~p.detach().isfinite()).reshape(rows, -1).any(1) for p in self.stages]).cpu().numpy()
        return np.where(bad.any(0), bad.argmax(0), -1)

    def _needs_stages(self, weights: Sequence[float], what: str) -> None:
        if any(weights[len(self.stages) :]):
            raise ValueError(f"{what} needs the closing stage of {self.tableau.name}: take the step with closing=True")


def _checked(p: Tensor, x: Tensor, stage: int) -> Tensor:
    """The stage, in the dtype of x: autocast computes it in a narrower one."""
    if isinstance(p, Tensor) and p.shape == x.shape and p.dtype == x.dtype and p.device == x.device:
        return p
    if not isinstance(p, Tensor):
        raise TypeError(f"field must return a tensor, got {type(p).__name__} at stage {stage}")
    if p.shape != x.shape:
        raise ValueError(
            f"field must keep the shape of x: stage {stage} has shape {tuple(p.shape)}, x has {tuple(x.shape)}"
        )
    if p.device != x.device:
        raise ValueError(f"field must keep the device of x: stage {stage} is on {p.device}, x on {x.device}")
    if p.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"field must keep the dtype of x: stage {stage} is {p.dtype}, x is {x.dtype}")
    return p.to(x.dtype)


def rk_step(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: ButcherTableau,
    first: Tensor | None = None, *, closing: bool = True, reductions: Collection[str] = ()
) -> Step:  # fmt: skip
    """One step from ``x`` at ``t``.

    A field may return its input, or the same tensor again and again, but neither write into its input nor into what it
    has returned: torch's counts of such writes are compared. Where torch does not count (``torch.compile``,
    ``torch.func``) the field gets a copy of x and its stages are copied; in ``torch.inference_mode`` it counts, for the
    step is taken under ``torch.no_grad`` instead. Writes that pass torch by (``x.data``, NumPy) are not noticed.

    Args:
        field: the velocity ``v(t, x)``, or one callable per stage.
        t: time at the start.
        x: state, ``(B, *S)``, floating.
        h: step size: a number, or a tensor that broadcasts against ``x``.
        tableau: the method.
        first: the first stage, when it is known already (FSAL), ``(B, *S)``.
        closing: evaluate the stages that the error needs and ``x1`` does not, the last one of an FSAL method.
        reductions: what to compute in the same pass over memory as ``x1``: "error" (of methods without closing
            stage), "action", "residue".

    Returns:
        The step; ``step.x1`` is the state at its end.

    Raises:
        ValueError, TypeError: the field changes shape, device or (outside autocast) dtype, or writes where it must not.

    >>> import torch
    >>> from solvers import get_tableau
    >>> step = rk_step(lambda t, x: -x, 0.0, torch.ones(1, 1), 0.1, get_tableau("bs23"))
    >>> round(step.x1.item(), 5)
    0.90483
    """
    if not is_compiling() and is_inference_mode_enabled():
        with _counting():
            x, first = _countable(x), None if first is None else _countable(first)
            return rk_step(field, t, x, h, tableau, first, closing=closing, reductions=reductions)
    fields = field if isinstance(field, _SEVERAL) else None
    if fields is not None and len(fields) != tableau.stages:
        raise ValueError(f"field must be one callable or one per stage of {tableau.name}, got {len(fields)}")
    (stages, versions, add), computed = _evaluate(field, t, x, h, tableau, () if first is None else (first,)), None
    if reductions and (not isinstance(h, Tensor) or h.numel() in (1, len(x))):
        end, computed = finish_step(
            x, stages, tableau, h,
            error="error" in reductions and len(stages) == tableau.stages,
            action="action" in reductions, residue="residue" in reductions,
        )  # fmt: skip
        assert end is not None
        x1 = end
    else:
        x1 = add(x, stages, tableau.b, h)
    for i in range(len(stages), tableau.stages if closing else 0):
        ends = tableau.fsal and i == tableau.stages - 1
        point, time = (x1, t + h) if ends else (add(x, stages, tableau.a[i], h), t + tableau.c[i] * h)
        v = field if fields is None else fields[i]
        stages = (*stages, _velocity(v, time, point, i, versions is None, own=not ends and point is not x))  # type: ignore[arg-type]
    if versions and len(stages) > 1:
        check_unchanged(stages, versions)
    return Step(t, h, x, x1, stages, tableau, computed)


def step_state(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: ButcherTableau
) -> Tensor:
    """The state at the end of a step; :func:`rk_step` says more."""
    if not is_compiling() and is_inference_mode_enabled():
        with _counting():
            return step_state(field, t, _countable(x), h, tableau)
    stages, versions, add = _evaluate(field, t, x, h, tableau, ends=True)
    if versions and len(stages) > 1:
        check_unchanged(stages, versions)
    return add(x, stages, tableau.b, h)


def _evaluate(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: ButcherTableau,
    stages: tuple[Tensor, ...] = (), ends: bool = False
) -> tuple[tuple[Tensor, ...], list[int] | None, Callable[..., Tensor]]:  # fmt: skip
    """The stages that the end of a step needs, those given first; their versions, or None; and what adds them up.

    Where the step ``ends`` with it, nothing calls the field again while the last stage is in use.

    One function without calls of ours but :func:`combine`, since a small field takes no longer than a few of them.
    """
    one, a, c = not isinstance(field, _SEVERAL), tableau.a, tableau.c
    if _uncounted(x):
        for i in range(len(stages), tableau.interior):
            point = combine(x, stages, a[i], h) if i else x
            point = x.clone() if point is x else point  # lest a write of the field reaches x
            v = field if one else field[i]  # type: ignore[index] - one, or one per stage
            p = _checked(v(t + c[i] * h if i else t, point), x, i)  # type: ignore[operator] - one, or one per stage
            stages = (*stages, p if ends and i == tableau.interior - 1 else p.clone())
        return stages, None, combine
    shape, dtype, device, version = x.shape, x.dtype, x.device, x._version
    add = combination if x.numel() <= SMALL else combine
    versions = [p._version for p in stages] if stages else []
    for i in range(len(stages), tableau.interior):
        point = add(x, stages, a[i], h) if i else x
        p = (field if one else field[i])(t + c[i] * h if i else t, point)  # type: ignore[operator, index]
        if x._version != version:
            raise _overwritten(i)
        if type(p) is not Tensor or p.dtype != dtype or p.device != device or p.shape != shape:
            p = _checked(p, x, i)
        try:
            versions.append(p._version)
        except RuntimeError:  # made by the field in inference mode, where torch does not count
            p = p.clone()
            versions.append(p._version)
        stages = (*stages, p)
    return stages, versions, add


def velocity(field: Field, t: float | Tensor, x: Tensor, stage: int = 0) -> Tensor:
    """One call of the field, checked as :func:`rk_step` checks it.

    Raises:
        ValueError, TypeError: as there.
    """
    if not is_compiling() and is_inference_mode_enabled():
        with _counting():
            return velocity(field, t, _countable(x), stage)
    return _velocity(field, t, x, stage, _uncounted(x))


def _velocity(field: Field, t: float | Tensor, x: Tensor, stage: int, uncounted: bool, own: bool = False) -> Tensor:
    if uncounted:  # copies, lest a write reaches x, unless it is the step's own, or what has come back
        return _checked(field(t, x if own else x.clone()), x, stage).clone()
    version = x._version
    p = field(t, x)
    if x._version != version:
        raise _overwritten(stage)
    p = _checked(p, x, stage)
    return p.clone() if p.is_inference() else p


def _uncounted(x: Tensor) -> bool:
    """Whether torch counts no writes: in a compiled graph, under torch.func, and for tensors of inference mode."""
    return is_compiling() or maybe_current_level() is not None or x.is_inference()


@contextmanager
def _counting() -> Iterator[None]:
    """In inference mode: torch counts writes again, and keeps no graph all the same."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _countable(x: Tensor) -> Tensor:
    """The tensor, or a copy of one of inference mode: the first state of a solve, the others are none."""
    return x.clone() if x.is_inference() else x


def versions_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """How often torch counted a write into each, for :func:`check_unchanged`; None where it does not count."""
    try:
        return None if is_compiling() else [p._version for p in tensors]
    except RuntimeError:  # tensors of inference mode
        return None


def check_unchanged(stages: Sequence[Tensor], versions: Sequence[int] | None) -> None:
    """Raise if a stage was written into since its version was taken.

    Raises:
        ValueError: it was; the message names the stage.
    """
    for i, version in enumerate(versions or ()):
        if stages[i]._version != version:
            raise ValueError(
                f"field must not write into what it has returned: stage {i} was overwritten while it was in use; let "
                "the field return a new tensor at every call, as with p.clone()"
            )


def _overwritten(stage: int) -> ValueError:
    return ValueError(
        f"field must not write into its input: stage {stage} changed x in place; let it begin with x = x.clone(), or "
        "make its first operation a new tensor, as nn.ReLU(inplace=False)"
    )
