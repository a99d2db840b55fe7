"""Steps that are made of shears, and gradients that undo them: one call of the field serves both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.gradients.captured import Captured
from solvers.gradients.collected import Collected
from solvers.gradients.pair import sizes
from solvers.gradients.repeats import random_state, set_random_state
from solvers.gradients.reversible import check_precision
from solvers.saved_tensors import saved_uncounted

__all__ = ["Shear", "growth", "loss", "undone", "with_gradients"]

Parts = tuple[Tensor, Tensor]

_LOOKS = 8  # steps from one look at how large parts are to the next


class Shear(NamedTuple):
    """``part[target] <- scale part[target] + weight v`` with v a velocity at ``part[source]``, or that part itself.

    Attributes:
        target, source: which of the two parts of a state, one 0 and one 1.
        scale: 0 where the part before is nothing, as at a first step.
        weight: of v.
        t: time of the velocity.
        call: which velocity of the step, or None for the part itself.
    """

    target: int
    source: int
    scale: float
    weight: float
    t: float = 0.0
    call: int | None = None

    def forward(self, part: Tensor, v: Tensor) -> Tensor:
        """The part behind it."""
        if self.scale == 0:
            return v * self.weight
        return (part if self.scale == 1 else part * self.scale).add(v, alpha=self.weight)

    def back(self, part: Tensor, v: Tensor) -> Tensor:
        """The part before it."""
        if self.scale == 0:
            return torch.zeros_like(part)
        before = part.sub(v, alpha=self.weight)
        return before if self.scale == 1 else before / self.scale


def loss(shears: Sequence[Shear]) -> float:
    """By how much undoing a step may enlarge the rounding of a part; infinite where nothing of it is left."""
    factor = 1.0
    for shear in shears:
        factor *= max(1.0, 1 / abs(shear.scale)) if shear.scale else float("inf")
    return factor


def growth(dtype: torch.dtype) -> float:
    """The factor of rounding up to which steps are undone, ``eps^(-1/3)``, 203 in float32: then a pair is kept."""
    return torch.finfo(dtype).eps ** (-1 / 3)


def undone(shears: Sequence[Shear], parts: Parts, velocity: Any) -> Parts:
    """The parts before a step; ``velocity(shear, x)`` is what a shear adds."""
    now = list(parts)
    for shear in reversed(shears):
        x = now[shear.source]
        now[shear.target] = shear.back(now[shear.target], x if shear.call is None else velocity(shear, x))
    return now[0], now[1]


class _Course(NamedTuple):
    """Steps as they were taken.

    Attributes:
        captured: what the velocities call, of a time, a state, the number of the step and that of the call.
        steps: the shears of each.
        args: of the velocities.
        kept: the numbers of the steps before which a pair is kept.
        size: the largest value of each sample on the way, ``(2, B)``.
        drawn: by step and shear, the state of the random numbers before a call that drew some.
        owner: what took them, for errors.
    """

    captured: Captured
    steps: Sequence[Sequence[Shear]]
    args: Sequence[Any]
    kept: list[int]
    size: Tensor
    drawn: dict[tuple[int, int], list[Tensor]]
    owner: str


def with_gradients(
    captured: Captured,
    steps: Sequence[Sequence[Shear]],
    parts: Parts,
    args: Sequence[Any],
    owner: str,
    watch: bool = True,
) -> Parts:
    """The parts of a state behind steps, whose gradients undo the steps: two parts are kept, whatever their number.

    The backward pass calls each velocity once: with that value it undoes the shear, and with its graph it carries the
    gradient. It is that of the steps taken. Where scales below 1 would make more than :func:`growth` of rounding a
    pair of parts is kept on the way. Random numbers that a velocity draws it draws again.

    Args:
        captured: called with a time, a state, the number of the step, that of the call, and ``args``; it may draw.
        steps: the shears of each.
        parts: two tensors ``(B, *S)`` of float32 or float64.
        args: further arguments of the velocities.
        owner: what takes the steps, for errors.
        watch: at what every velocity reads, and not only those of the first step; what is read besides raises then.

    Raises:
        TypeError: parts of half precision.
        RuntimeError: in the backward pass, undone steps do not lead back to the parts.
    """
    check_precision(parts[0], owner)
    device, now, most = parts[0].device, [part.detach() for part in parts], growth(parts[0].dtype)
    kept, states, drawn, factor = list[int](), list[Tensor](), dict[tuple[int, int], list[Tensor]](), 1.0
    size = _sizes(now)
    with captured.forward(device), torch.no_grad(), saved_uncounted():
        for m, shears in enumerate(steps):
            factor *= loss(shears) if m else 1.0
            if factor > most:  # the step is not undone for those before it, which begin at the pair that is kept
                kept, states, factor = [*kept, m], [*states, *now], 1.0
            for k, shear in enumerate(shears):
                v = now[shear.source]
                if shear.call is not None:
                    before = random_state(device)
                    if watch or m == 0:
                        captured.anew()  # each reads weights of its own
                    v = captured(shear.t, v, m, shear.call, *args)
                    if not all(map(torch.equal, before, random_state(device))):
                        drawn[m, k] = before
                now[shear.target] = shear.forward(now[shear.target], v)
            if m % _LOOKS == 0 or m == len(steps) - 1:
                size = torch.maximum(size, _sizes(now))
    course, anchor = _Course(captured, steps, args, kept, size, drawn, owner), None
    if not any(x.requires_grad for x in (*parts, *captured.tensors)) and captured.may_read_more:
        anchor = torch.zeros((), requires_grad=True)  # so that a backward pass looks
    return _Sheared.apply(course, states, anchor, *now, *parts, *captured.tensors)  # type: ignore[return-value]


def _sizes(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([sizes(part) for part in parts])


class _Sheared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, course: _Course, states: list[Tensor], anchor: Any, a: Tensor, b: Tensor, *before: Tensor
    ) -> Parts:
        ctx.course = course
        ctx.save_for_backward(a, b, *before[:2], *states)
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        course: _Course = ctx.course
        captured = course.captured
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{course.owner} has no second derivatives, which create_graph=True asks for: they would be lost. Take "
                f"{captured.direct}"
            )
        a, b, *kept = ctx.saved_tensors
        known = dict(zip([0, *course.kept], zip(kept[::2], kept[1::2], strict=True), strict=True))
        now, due, off = [a, b], list(grads), torch.zeros_like(course.size[0])
        with captured.again(cut=True) as params:
            collected = Collected(captured, params)
            for m in range(len(course.steps) - 1, -1, -1):
                for k in range(len(course.steps[m]) - 1, -1, -1):
                    _undo(course, m, k, now, due, collected)
                if m in known:
                    off = torch.maximum(off, _off(course, m, now, known[m]))
                    now = list(known[m])
            others = collected.close()
        _check(off, course)
        return (None, None, None, None, None, *due, *others)


def _undo(course: _Course, m: int, k: int, now: list[Tensor], due: list[Tensor], collected: Collected) -> None:
    """Undo shear k of step m: the parts, and their gradients, are those before it."""
    shear = course.steps[m][k]
    gradient, source = due[shear.target], now[shear.source].detach()
    if shear.call is None:
        v = source
        due[shear.source] = due[shear.source].add(gradient, alpha=shear.weight)
    else:
        with torch.enable_grad(), _drawing(course.drawn.get((m, k)), source.device):
            source.requires_grad_()
            v = course.captured(shear.t, source, m, shear.call, *course.args)
        pulled = collected.pull(v, source, gradient if shear.weight == 1 else gradient * shear.weight)
        due[shear.source] = due[shear.source] + pulled
    now[shear.target] = shear.back(now[shear.target], v.detach())
    if shear.scale != 1:
        due[shear.target] = gradient * shear.scale if shear.scale else torch.zeros_like(gradient)


@contextmanager
def _drawing(state: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """While random numbers are drawn as from a state; None where there are none."""
    if state is None:
        yield
        return
    outer = random_state(device)
    set_random_state(state, device)
    try:
        yield
    finally:
        set_random_state(outer, device)


def _off(course: _Course, m: int, now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """How far undone parts are from those before step m, relative to the largest on the way, ``(B,)``.

    A part of which the step has left nothing, or less than its rounding, is not looked at.
    """
    off, tiny = torch.zeros_like(course.size[0]), torch.finfo(course.size.dtype).tiny
    for i, (part, own, size) in enumerate(zip(now, before, course.size, strict=True)):
        if loss([shear for shear in course.steps[m] if shear.target == i]) <= growth(size.dtype):
            off = torch.maximum(off, sizes(part - own) / size.clamp(min=tiny))
    return off


def _check(off: Tensor, course: _Course) -> None:
    """That undoing the steps led each sample back to where it began; waits for the device, once.

    Raises:
        RuntimeError: it did not; the gradient would be wrong.
    """
    limit = 10 * max(torch.finfo(off.dtype).eps ** 0.5, course.captured.precision)
    most = off.amax().item() if off.numel() else 0.0
    if not most <= limit:
        raise RuntimeError(
            f"{course.owner}: undone, {len(course.steps)} steps end {most:.2g} (relative) away from where they began, "
            f"more than {limit:.2g}: the gradient would be wrong. Rounding grows on the way back where steps contract: "
            f"take smaller steps, float64, fewer blocks, or {course.captured.instead}"
        )
