"""``odeint_adjoint``: gradients by the continuous adjoint, with memory that does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from solvers.backsolve import adjoint_rates
from solvers.events import link
from solvers.odeint import odeint, solve
from solvers.odeint_events import event_of, find_event
from solvers.problem import Problem, largest_rms, make_problem

__all__ = ["odeint_adjoint"]


def odeint_adjoint(
    func: Callable[[Tensor, Any], Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[[Tensor, Any], Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """:func:`~solvers.odeint`, with gradients from the adjoint equation solved backwards in time.

    ``da/dt = -a^T df/dy``, ``dL/dtheta = -int a^T df/dtheta dt`` (Chen et al., 2018, Neural ordinary differential
    equations); the state is solved backwards along with it and set right at every output time. The gradients are those
    of the ODE, not of the discrete solve, and can be differentiated once.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as in :func:`~solvers.odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; the forward ones if not given.
        adjoint_options: of the backward solve; the forward ones without their norm if not given. The norm is called on
            ``(grad_t, y, grad_y, *grad_params)``; "seminorm" leaves the parameters out (Kidger et al., 2021).
        adjoint_params: tensors that get gradients; the parameters of ``func`` if not given.

    Raises:
        ValueError: ``func`` is no module and ``adjoint_params`` is not given, or options cannot be inferred.
    """
    if adjoint_params is None:
        if not isinstance(func, nn.Module):
            raise ValueError("func must be a torch module, or adjoint_params must say what gets gradients, () nothing")
        adjoint_params = func.parameters()
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise ValueError("adjoint_options must be given, where adjoint_method differs from method and options is given")
    params = tuple(p for p in adjoint_params if p.requires_grad)
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (options or {}).items() if k != "norm"}
    problem = make_problem(func, y0, t, rtol, atol, method, options)
    norm = problem.tolerance.norm or _rms
    backward = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
        "method": adjoint_method or method,
        "options": {**adjoint_options, "norm": _adjoint_norm(adjoint_options.get("norm"), norm, problem)},
    }
    if event_fn is None:
        return problem.packing.unpack(_Adjoint.apply(problem, func, backward, problem.x0, problem.t, *params))
    event = event_of(problem, event_fn)
    with torch.no_grad():
        time, _ = find_event(problem, event)
    if time == problem.times[0]:
        return problem.t[0], problem.packing.unpack(torch.stack([problem.x0, problem.x0]))
    span = torch.stack([problem.t[0], problem.t.new_tensor(time)])
    until = problem._replace(t=span, times=[problem.times[0], time])
    x = _Adjoint.apply(until, func, backward, until.x0, span, *params)[-1]
    # the state carries the gradient to t[0]: at a fixed time, so that this one is fixed
    at, x = link(problem.field, event, torch.tensor(time, dtype=torch.float64, device=x.device), x)
    return at.to(problem.t.dtype), problem.packing.unpack(torch.stack([problem.x0, x]))


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5


def _adjoint_norm(given: Any, norm: Callable[[Tensor], Tensor], problem: Problem) -> Callable[[Sequence[Tensor]], Any]:
    if callable(given):
        if problem.packing.single:
            return given

        def spread(parts: Sequence[Tensor]) -> Any:
            grad_t, y, grad_y, *rest = parts
            states = [problem.packing.unpack(x) for x in (y, grad_y)]
            flat = [part for s in states for part in (s.values() if isinstance(s, dict) else s)]
            return given((grad_t, *flat, *rest))

        return spread
    if given not in (None, "seminorm"):
        raise ValueError(f"adjoint_options: norm must be a function or 'seminorm', got {given!r}")

    def largest(parts: Sequence[Tensor]) -> Tensor:
        grad_t, y, grad_y, *rest = parts
        norms = [grad_t.abs(), norm(y), norm(grad_y)]
        if given is None and any(part.numel() for part in rest):
            norms.append(largest_rms(rest))
        return torch.stack([torch.as_tensor(n, device=y.device).to(grad_t.abs().dtype) for n in norms]).max()

    return largest


class _Augmented:
    """The adjoint system ``(grad_t, y, grad_y, *grad_params)``, with the adjoint callbacks of the field."""

    def __init__(self, problem: Problem, func: Any, params: Sequence[Tensor], needs_t: bool) -> None:
        self.problem, self.params, self.needs_t = problem, params, needs_t
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            callback = getattr(func, name + "_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _, y, a, *_ = state
        v, *rates = adjoint_rates(self.problem.field, t, y, a, self.params, needs_t=self.needs_t)
        grad_t = rates.pop() if self.needs_t else torch.zeros_like(t)
        return (grad_t.to(a.dtype), v, *(rate.to(a.dtype) for rate in rates))


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, func: Any, backward: Any, x0: Tensor, t: Tensor, *params: Tensor) -> Tensor:
        ctx.problem, ctx.func, ctx.solve = problem, func, backward
        plain = problem._replace(x0=x0, t=t.detach())
        with torch.no_grad():
            states = solve(plain)
        ctx.save_for_backward(t, states, *params)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> Any:  # type: ignore[override]
        t, states, *params = ctx.saved_tensors
        problem: Problem = ctx.problem
        needs_t = ctx.needs_input_grad[4]
        augmented = _Augmented(problem, ctx.func, params, needs_t)
        grad_t = torch.zeros(len(t), dtype=states.dtype, device=states.device)
        a = grads[-1]
        sums = [torch.zeros_like(p, dtype=states.dtype) for p in params]
        since = torch.zeros((), dtype=states.dtype, device=states.device)
        for i in range(len(t) - 1, 0, -1):
            if needs_t:
                moved = (problem.field(problem.times[i], states[i]).conj() * grads[i]).sum()
                grad_t[i] = moved
                since = since - moved
            start = (since, states[i], a, *sums)
            span = t.detach()[[i, i - 1]]
            since, _, a, *sums = (part[-1] for part in odeint(augmented, start, span, **ctx.solve))
            a = a + grads[i - 1]
        grad_t[0] = since
        times = grad_t.real.to(t.dtype) if needs_t else None
        sums = [(s if p.is_complex() else s.real).to(p.dtype) for s, p in zip(sums, params, strict=True)]
        return (None, None, None, a, times, *sums)
