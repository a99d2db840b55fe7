"""Taking a Runge-Kutta step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, is_inference_mode_enabled
from torch.compiler import is_compiling

from solvers.coefficients import as_numbers_or_tensors
from solvers.field_calls import (
    Field,
    call_field,
    check_unchanged,
    checked,
    countable,
    counting,
    overwritten,
    uncounted,
)
from solvers.implicit import check_found, implicit_steps
from solvers.learned import LearnedTableau
from solvers.reductions import SMALL, combination, combine, finish_step
from solvers.step import Step
from solvers.structured import structured_steps
from solvers.tableaus import ButcherTableau

__all__ = ["rk_step", "step_state"]

_SEVERAL = (list, tuple)


def rk_step(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor,
    tableau: ButcherTableau | LearnedTableau, first: Tensor | None = None, *, closing: bool = True,
    reductions: Collection[str] = ()
) -> Step:  # fmt: skip
    """One step from ``x`` at ``t``.

    A field may return its input, or the same tensor again and again, but neither write into its input nor into what it
    has returned: torch's counts of such writes are compared. Where torch does not count (``torch.compile``,
    ``torch.func``) the field gets a copy of x and its stages are copied; in ``torch.inference_mode`` it counts, for the
    step is taken under ``torch.no_grad`` instead. Writes that pass torch by (``x.data``, NumPy) are not noticed.

    Args:
        field: the velocity ``v(t, x)``, or one callable per stage; a :class:`~solvers.Separable` or
            :class:`~solvers.SemiLinear` field where the method takes such.
        t: time at the start.
        x: state, ``(B, *S)``, floating.
        h: step size: a number, or a tensor that broadcasts against ``x``.
        tableau: the method.
        first: the first stage, when it is known already (FSAL), ``(B, *S)``; of no use to an implicit first stage.
        closing: evaluate the stages that the error needs and ``x1`` does not, the last one of an FSAL method.
        reductions: what to compute in the same pass over memory as ``x1``: "error" (of methods without closing
            stage), "action", "residue".

    Returns:
        The step; ``step.x1`` is the state at its end.

    Raises:
        ValueError, TypeError: the field changes shape, device or (outside autocast) dtype, or writes where it must not.
        NewtonError: a stage of an implicit method is not found.

    >>> import torch
    >>> from solvers import get_tableau
    >>> step = rk_step(lambda t, x: -x, 0.0, torch.ones(1, 1), 0.1, get_tableau("bs23"))
    >>> round(step.x1.item(), 5)
    0.90483
    """
    if not tableau.explicit:
        return _other_step(field, t, x, h, tableau, first, reductions)
    if not is_compiling() and is_inference_mode_enabled():
        with counting():
            x, first = countable(x), None if first is None else countable(first)
            return rk_step(field, t, x, h, tableau, first, closing=closing, reductions=reductions)
    if not isinstance(tableau, ButcherTableau):
        tableau = as_numbers_or_tensors(tableau, x)
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
        stages = (*stages, call_field(v, time, point, i, versions is None, own=not ends and point is not x))  # type: ignore[arg-type]
    if versions and len(stages) > 1:
        check_unchanged(stages, versions)
    return Step(t, h, x, x1, stages, tableau, computed)


def step_state(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: ButcherTableau
) -> Tensor:
    """The state at the end of a step; :func:`rk_step` says more."""
    if isinstance(tableau, ButcherTableau) and not tableau.explicit:
        return _other_step(field, t, x, h, tableau).x1
    if not is_compiling() and is_inference_mode_enabled():
        with counting():
            return step_state(field, t, countable(x), h, tableau)
    stages, versions, add = _evaluate(field, t, x, h, tableau, ends=True)
    if versions and len(stages) > 1:
        check_unchanged(stages, versions)
    return add(x, stages, tableau.b, h)


def _other_step(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: Any,
    first: Tensor | None = None, reductions: Collection[str] = ()
) -> Step:  # fmt: skip
    """A step of an implicit method, or of one that reads the structure of its field."""
    take = implicit_steps(tableau) if tableau.implicit else structured_steps(tableau)
    step = take(field, t, x, h, first)
    check_found(step)
    if not reductions or (isinstance(h, Tensor) and h.numel() not in (1, len(x))):
        return step
    _, computed = finish_step(
        x, step.stages, tableau, h, state=False,
        error="error" in reductions, action="action" in reductions, residue="residue" in reductions,
    )  # fmt: skip
    return step._replace(reductions=computed)


def _evaluate(
    field: Field | Sequence[Field], t: float | Tensor, x: Tensor, h: float | Tensor, tableau: ButcherTableau,
    stages: tuple[Tensor, ...] = (), ends: bool = False
) -> tuple[tuple[Tensor, ...], list[int] | None, Callable[..., Tensor]]:  # fmt: skip
    """The stages that the end of a step needs, those given first; their versions, or None; and what adds them up.

    Where the step ``ends`` with it, nothing calls the field again while the last stage is in use.

    One function without calls of ours but :func:`combine`, since a small field takes no longer than a few of them.
    """
    one, a, c = not isinstance(field, _SEVERAL), tableau.a, tableau.c
    if uncounted(x):
        for i in range(len(stages), tableau.interior):
            point = combine(x, stages, a[i], h) if i else x
            point = x.clone() if point is x else point  # lest a write of the field reaches x
            v = field if one else field[i]  # type: ignore[index] - one, or one per stage
            p = checked(v(t + c[i] * h if i else t, point), x, i)  # type: ignore[operator] - one, or one per stage
            stages = (*stages, p if ends and i == tableau.interior - 1 else p.clone())
        return stages, None, combine
    shape, dtype, device, version = x.shape, x.dtype, x.device, x._version
    add = combination if x.numel() <= SMALL and type(tableau.b) is tuple else combine
    versions = [p._version for p in stages] if stages else []
    for i in range(len(stages), tableau.interior):
        point = add(x, stages, a[i], h) if i else x
        p = (field if one else field[i])(t + c[i] * h if i else t, point)  # type: ignore[operator, index]
        if x._version != version:
            raise overwritten(i)
        if type(p) is not Tensor or p.dtype != dtype or p.device != device or p.shape != shape:
            p = checked(p, x, i)
        try:
            versions.append(p._version)
        except RuntimeError:  # made by the field in inference mode, where torch does not count
            p = p.clone()
            versions.append(p._version)
        stages = (*stages, p)
    return stages, versions, add
