"""``odeint_adjoint``: gradients by the continuous adjoint, with memory that does not grow with the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solvers.events import attach_event_gradient, first_crossing_fn
from solvers.gradients.backsolve import adjoint_rates, restored, stored
from solvers.gradients.captured import Captured, owner_of
from solvers.packing import Packing
from solvers.solve import Task
from solvers.torchdiffeq.odeint import find_event, odeint, solve
from solvers.torchdiffeq.problem import ADAPTIVE, check_options, ending_at, largest_rms, make_task
from solvers.validation import real_dtype

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
    """:func:`~solvers.torchdiffeq.odeint`, with gradients from the adjoint equation solved backwards in time.

    ``da/dt = -a^T df/dy``, ``dL/dtheta = -int a^T df/dtheta dt`` (Chen et al., 2018, Neural ordinary differential
    equations); the state is solved backwards along with it and set right at every output time. The gradients are those
    of the ODE, not of the discrete solve, and can be differentiated once.

    The backward solve reads the parameters and modes of the forward pass, whatever has become of the module since.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn: as in :func:`~solvers.torchdiffeq.odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; the forward ones if not given. A tolerance
            per part or entry of the state is also that of its adjoint, and the smallest that of the parameters; a tuple
            may instead have an entry for each of ``(grad_t, y, grad_y, *grad_params)``.
        adjoint_options: of the backward solve; the forward ones without their norm if not given. The norm is called on
            ``(grad_t, y, grad_y, *grad_params)``; "seminorm" leaves the parameters out (Kidger et al., 2021).
        adjoint_params: a collection of the tensors that get gradients. If not given, the parameters of ``func``, which
            must then be a module, a method of one or a ``functools.partial`` of these, and what else it reads.

    Returns:
        As :func:`~solvers.torchdiffeq.odeint`.

    Raises:
        ValueError: ``func`` is no module and ``adjoint_params`` is not given, options cannot be inferred, or ``func``
            draws random numbers at every call.
        TypeError: ``adjoint_params`` is no collection of tensors.
        RuntimeError: under a transform of ``torch.func``; or, in the backward pass, what ``func`` reads was changed in
            place since the forward pass.

    >>> class Decay(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rate = torch.nn.Parameter(torch.tensor(1.0))
    ...
    ...     def forward(self, t, y):
    ...         return -self.rate * y
    >>> func = Decay()
    >>> odeint_adjoint(func, torch.ones(1), torch.tensor([0.0, 1.0]))[-1].sum().backward()
    >>> round(func.rate.grad.item(), 4)  # that of exp(-rate)
    -0.3679
    """
    if adjoint_params is None and owner_of(func) is None:
        raise ValueError("func must be a torch module, or adjoint_params must say what gets gradients, () nothing")
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise ValueError("adjoint_options must be given, where adjoint_method differs from method and options is given")
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (options or {}).items() if k != "norm"}
    back = adjoint_method or method or "dopri5"
    check_options(back, adjoint_options, "adjoint_options", norms=("seminorm",))
    captured = Captured(func, adjoint_params, names=("func", "adjoint_params", "odeint"))
    if not torch.is_grad_enabled():
        return odeint(func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn)
    packing, fixed_t = Packing(y0), t.detach() if isinstance(t, Tensor) else t
    task = make_task(captured, packing, y0, fixed_t, rtol, atol, method, options, event_fn, watched=func)
    t, event = t.to(task.x0.device), None
    with captured.forward(task.x0.device), torch.no_grad():
        if task.event is not None:
            time = find_event(task).t1
            if time == task.t0:
                return t[0], packing.unpack(torch.stack([task.x0, task.x0]))
            event = first_crossing_fn(task.event, task.t0, task.x0)
            task = ending_at(task, time, options)
        states = solve(task)
    if event is not None:
        t = torch.stack([t[0].to(task.t), task.t[1]])
    if adjoint_options.get("norm") is not None or back in ADAPTIVE:
        norm = _adjoint_norm(adjoint_options.get("norm"), task.tolerance.norm or _rms, packing)
        adjoint_options = {**adjoint_options, "norm": norm}
    solving = {
        "rtol": _spread("adjoint_rtol", rtol if adjoint_rtol is None else adjoint_rtol, packing, task.x0, captured),
        "atol": _spread("adjoint_atol", atol if adjoint_atol is None else adjoint_atol, packing, task.x0, captured),
        "method": back,
        "options": adjoint_options,
    }
    x: Any = _Adjoint.apply(task, captured, solving, [states], task.x0, t, *captured.tensors)
    if event is None:
        return packing.unpack(x)
    # the state carries the gradient to t[0]: at a fixed time, so that this one is fixed
    with captured.again():
        at, end = attach_event_gradient(task.field, event, task.t[1], x[-1])
    return at, packing.unpack(torch.stack([task.x0, end]))


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5


def _adjoint_norm(
    adjoint_norm: Any, norm: Callable[[Tensor], Tensor], packing: Packing
) -> Callable[[Sequence[Tensor]], Any]:
    if callable(adjoint_norm):
        if packing.single:
            return adjoint_norm

        def spread(parts: Sequence[Tensor]) -> Any:
            grad_t, y, grad_y, *rest = parts
            states = [packing.unpack(x) for x in (y, grad_y)]
            flat = [part for s in states for part in (s.values() if isinstance(s, dict) else s)]
            return adjoint_norm((grad_t, *flat, *rest))

        return spread

    def largest(parts: Sequence[Tensor]) -> Tensor:
        grad_t, y, grad_y, *rest = parts
        norms = [grad_t.abs(), norm(y), norm(grad_y)]
        if adjoint_norm is None and any(part.numel() for part in rest):
            norms.append(largest_rms(rest))
        return torch.stack([torch.as_tensor(n, device=y.device).to(grad_t.abs().dtype) for n in norms]).max()

    return largest


def _spread(name: str, tolerance: Any, packing: Packing, x0: Tensor, captured: Captured) -> Any:
    """A tolerance of the state as one of the backward solve: a number, or one per part of its state."""
    count = len(captured.tensors)
    if isinstance(tolerance, Tensor) and not tolerance.ndim:
        return float(tolerance)
    if isinstance(tolerance, tuple | list) and (packing.single or len(tolerance) != len(packing.shapes)):
        if len(tolerance) != 3 + count:
            parts = "" if packing.single else f"{len(packing.shapes)} entries, one per part of y0, or "
            raise ValueError(
                f"{name} must be a number, a tensor or have {parts}{3 + count} entries, for grad_t, y, grad_y and "
                f"{count} parameters, got {len(tolerance)}"
            )
        return tuple(tolerance)
    each = packing.expand(tolerance, torch.promote_types(real_dtype(x0), torch.float32))
    if not isinstance(each, Tensor):
        return each
    positive = each[each > 0]
    smallest = float(positive.min()) if len(positive) else 0.0
    return (smallest, each, each, *[smallest] * count)


class _Augmented:
    """The adjoint system ``(grad_t, y, grad_y, *grad_params)``, with the adjoint callbacks of the field."""

    def __init__(self, task: Task, func: Any, params: Sequence[Tensor], needs_t: bool) -> None:
        self.task, self.params, self.needs_t = task, params, needs_t
        for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
            callback = getattr(func, name + "_adjoint", None)
            if callback is not None:
                setattr(self, name, callback)

    def __call__(self, t: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _, y, a, *_ = state
        dtype = self.task.x0.dtype
        v, *rates = adjoint_rates(self.task.field, t, y.to(dtype), a.to(dtype), self.params, needs_t=self.needs_t)
        rates.insert(0, rates.pop() if self.needs_t else torch.zeros_like(t))
        grad_t, grad_y, *grads = (stored(rate, a) for rate in rates)
        return (grad_t, v.to(a), grad_y, *grads)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, task: Task, captured: Captured, solving: Any, states: Any, x0: Tensor, t: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.task, ctx.captured, ctx.solving, ctx.params = task, captured, solving, params
        out = states.pop()
        ctx.save_for_backward(t, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> Any:  # type: ignore[override] - torch's has *grads
        with ctx.captured.again(cut=True) as params:
            return _solved_backwards(ctx, grads, params)


def _solved_backwards(ctx: Any, grads: Tensor, params: Sequence[Tensor]) -> Any:
    t, states = ctx.saved_tensors
    task: Task = ctx.task
    needs_t = ctx.needs_input_grad[5]
    augmented = _Augmented(task, ctx.captured.field, params, needs_t)
    dtype = torch.promote_types(states.dtype, torch.float32)
    grads, since = grads.to(dtype), torch.zeros((), dtype=dtype, device=states.device)
    grad_t = torch.zeros(len(t), dtype=dtype, device=states.device)
    a = grads[-1]
    sums = [torch.zeros_like(stored(p, a)) for p in params]
    for i in range(len(t) - 1, 0, -1):
        if needs_t:
            moved = (task.field(task.at[i], states[i]).conj() * grads[i]).sum()
            grad_t[i] = moved
            since = since - moved
        start = (since, states[i].to(dtype), a, *sums)
        span = t.detach()[[i, i - 1]]
        since, _, a, *sums = (part[-1] for part in odeint(augmented, start, span, **ctx.solving))
        a = a + grads[i - 1]
    grad_t[0] = since
    times = grad_t.real.to(t.dtype) if needs_t else None
    return (None, None, None, None, a.to(states.dtype), times, *map(restored, sums, ctx.params))
