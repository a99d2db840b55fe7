"""The measures of the library: action, residue, error and others of a step, one number per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from odenets.measures.marking import measure
from solvers import Step, finish_step
from solvers.reductions import power_mean, weighted_action, weighted_root_mean_square

__all__ = [
    "acceleration",
    "action",
    "cosine",
    "displacement",
    "error",
    "residue",
    "square_norm",
    "step_size",
    "wide_residue",
]


def _computed(step: Step, name: str) -> Tensor | None:
    return None if step.reductions is None else step.reductions.get(name)


def _residue(step: Step, name: str) -> Tensor:
    value = _computed(step, name)
    if value is None:
        value = finish_step(step.x0, step.stages, step.tableau, step.h, state=False, residue=True)[1][name]
    return value


def _mean_power(v: Tensor, p: float = 2.0) -> Tensor:
    return power_mean(v, p)


@measure(closing=False, reduction="action", integrand=_mean_power)
def action(step: Step, *, p: float = 2.0) -> Tensor:
    """Kinetic action ``h sum_i b_i <|p_i|^p>``, ``<.>`` the mean over features, ``(B,)``.

    With p = 2, the energy, it is the quadrature of ``int <v^2> dt`` over the step with the tableau's own weights; for
    Euler with h = 1 it is the transport cost as computed in [K24], ``<r^2>``: the cost ``|r|^2`` of its section 3
    over the dimension of the state (with another p, ``|r|_p^p`` over it). A weight ``1 / (2 tau)`` on it is thus a
    proximal step of size ``tau`` times the dimension; :func:`square_norm` is the cost without the mean. For another
    exponent record ``action.bind(p=...)``. The unit is that of the state squared over that of time.

    Args:
        step: the step.
        p: the exponent, at least 1.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider.

    Raises:
        ValueError: p below 1.

    >>> import odenets
    >>> flow, x = odenets.Flow(solver="euler", h=1.0, depth=1), torch.randn(4, 3)
    >>> step = next(iter(flow.steps(x)))
    >>> torch.allclose(action(step), (step.x1 - x).square().mean(1))
    True
    """
    if p != 2:
        pairs = zip(step.tableau.b, step.stages)  # noqa: B905 - torch 2.8's compiler takes strict=False for True
        powers: Tensor = sum(b * power_mean(stage, p) for b, stage in pairs if b)  # type: ignore[assignment]  # never 0
        return step_size(step) * powers
    value = _computed(step, "action")
    return weighted_action(step.stages, step.tableau.b, step.h) if value is None else value


@measure(closing=False, reduction="residue")
def residue(step: Step, *, p: float = 2.0) -> Tensor:
    """Mean over the features of ``|r|^p`` with the residue ``r = (x1 - x0) / h``, ``(B,)``.

    Its mean square with p = 2 [K24, eq. 34], the square of its norm over the dimension; :func:`square_norm` is the sum.

    Args:
        step: the step.
        p: the exponent, at least 1.

    Returns:
        One number per sample, ``(B,)``, in float32 or wider.

    Raises:
        ValueError: p below 1.
    """
    return _residue(step, "residue") if p == 2 else power_mean(wide_residue(step), p)


def step_size(step: Step) -> float | Tensor:
    """The size h of a ``step``, a number or one per sample, ``(B,)``, as a measure multiplies numbers of samples by it.

    >>> import odenets
    >>> [step_size(step) for step in odenets.Flow(depth=2).steps(torch.randn(4, 3))]
    [0.5, 0.5]
    """
    if not isinstance(step.h, Tensor):
        return step.h
    return step.h.to(step.x0.device, torch.promote_types(step.x0.dtype, torch.float32)).reshape(-1)


def wide_residue(step: Step) -> Tensor:
    """The residue of a ``step``, ``(B, *S)``, in float32 or wider, in which its stages are added up.

    >>> import odenets
    >>> step = next(iter(odenets.Flow(depth=2).steps(torch.randn(4, 3))))
    >>> wide_residue(step).shape
    torch.Size([4, 3])
    """
    dtype = torch.promote_types(step.x0.dtype, torch.float32)
    return step._replace(stages=tuple(p.to(dtype) for p in step.stages)).residue


@measure(closing=False, reduction="residue")
def square_norm(step: Step) -> Tensor:
    """Sum of the squares of the residue of a ``step`` over the features, ``(B,)``, ``|r|^2`` of [K24, section 3]."""
    return residue(step) * math.prod(step.x0.shape[1:])


@measure(closing=False, reduction="residue")
def cosine(step: Step) -> Tensor:
    """Cosine of the residue of a ``step`` with the vector of ones, ``(B,)``.

    It is 0 where r = 0. These are the last features of [K24, eq. 34].
    """
    return _residue(step, "cosine")


@measure(reduction="error")
def error(step: Step) -> Tensor:
    """Root mean square over the features of the embedded error of a ``step``, ``(B,)``, in the unit of the state.

    :meth:`solvers.Step.error` is the error itself.

    Raises:
        ValueError: the method has no embedded lower order, or the closing stage was not evaluated.

    >>> import odenets
    >>> step = next(iter(odenets.Flow(solver="bs23", depth=1).steps(torch.randn(4, 3))))
    >>> torch.allclose(error(step), step.error().square().mean(1).sqrt())
    True
    """
    value = _computed(step, "error")
    if value is None:
        weights = step.error_weights()
        value = weighted_root_mean_square(step.stages, weights, step.h)
    return value


@measure
def acceleration(step: Step) -> Tensor:
    """Energy of a ``step``'s acceleration, ``<(p_k - p_1)^2> / (c_k^2 |h|)``, ``<.>`` the mean over features, ``(B,)``.

    p_k is the last stage of the largest time ``c_k h``. With ``a = dv/dt`` along the path that is ``int <a^2> dt`` over
    the step, up to a share of it of ``O(h)``, and of ``O(h^2)`` with the closing stage of an FSAL method. Where a path
    is straight and its speed constant it is 0, however far it leads, and any method takes it in one step. Its sum over
    the steps is the regularizer ``R_2`` of Kelly et al. (2020), there by Taylor-mode differentiation, here from the
    velocities that the steps evaluate anyway. The stages of an untied block are not samples of one velocity, and it
    then measures how far they differ. The unit is that of the state squared over that of time cubed.

    Raises:
        ValueError: a method whose stages are all at the time of the first, as Euler's, or the closing stage was not
            evaluated.

    References:
        Kelly, Bettencourt, Johnson, Duvenaud. Learning differential equations that are easy to solve. NeurIPS 2020.

    >>> import torch, odenets
    >>> ode = odenets.NeuralODE(lambda t, x: torch.full_like(x, 6 * t), solver="bs23", steps=1)
    >>> acceleration(next(iter(ode.steps(torch.zeros(1, 2)))))
    tensor([36.])
    """
    c = step.tableau.c
    last = max(range(len(c)), key=lambda i: (c[i], i))
    if not c[last]:
        raise ValueError(
            f"{step.tableau.name} has no stage after its first, whose velocity would differ: take heun, midpoint, "
            "bs23 or dopri5"
        )
    if last >= len(step.stages):
        raise ValueError(
            f"acceleration needs the closing stage of {step.tableau.name}: take the step with closing=True"
        )
    difference = weighted_root_mean_square(step.stages, (-1.0, *(0.0,) * (last - 1), 1.0), 1.0)
    return difference.square() / (c[last] ** 2 * abs(step_size(step)))


@measure(closing=False)
def displacement(step: Step) -> Tensor:
    """Root mean square over the features of the displacement ``x1 - x0 = h r`` of a ``step``, ``(B,)``.

    It is in the unit of the state.
    """
    return weighted_root_mean_square(step.stages, step.tableau.b, step.h)
