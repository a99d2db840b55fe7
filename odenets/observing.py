"""Observing: who watches a forward pass is handed the records of the flows in it, in the pass itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from odenets.measures import StepFunction, measure, needs_closing
from odenets.recording import check_values
from odenets.records import Records
from solvers import Step
from solvers.field_calls import check_unchanged, versions_of

__all__ = ["Observer", "keeping", "observed", "observed_steps", "observing", "running_recorder"]

Method = TypeVar("Method", bound=Callable[..., Any])

_RESERVED = {"check", "readout", "at"}
"""What the methods of recorders take by name beside measures."""


class Observer(Protocol):
    """What watches a forward pass, as that of an adapted model watches the flows in it."""

    def measures_of(self, recorder: nn.Module) -> Mapping[str, StepFunction] | None:
        """What it measures on the steps of a ``recorder`` that is called; None leaves that to those inside of it."""
        ...

    def receive(self, recorder: nn.Module, output: Any, records: Records) -> None:
        """A ``recorder`` that it measures has made its ``output``; ``records`` are those measures."""
        ...


class _Thread(threading.local):
    """Who watches in this thread, and which recorder runs for them."""

    observer: Observer | None = None
    recorder: nn.Module | None = None


_THREAD = _Thread()


@contextmanager
def observing(observer: Observer | None) -> Iterator[None]:
    """Let an ``observer`` watch what this thread records for a while, in place of the one before; None lets nobody.

    Flows, neural ODEs and networks of them tell it their steps, by whatever way they are run: called, by ``record`` or
    by ``steps``. The outermost that it measures tells those of all within.

    >>> import odenets
    >>> from odenets import measures
    >>> class Rows(list):
    ...     def measures_of(self, recorder):
    ...         return {"action": measures.action}
    ...
    ...     def receive(self, recorder, output, records):
    ...         self.append(records)
    >>> model = nn.Sequential(nn.Linear(3, 3), odenets.Flow(depth=2), nn.ReLU(), odenets.Flow(depth=3))
    >>> rows = Rows()
    >>> with observing(rows):
    ...     output = model(torch.randn(5, 3))
    >>> [records["action"].shape for records in rows]
    [torch.Size([2, 5]), torch.Size([3, 5])]
    """
    before = _THREAD.observer
    _THREAD.observer = observer
    try:
        yield
    finally:
        _THREAD.observer = before


def running_recorder() -> nn.Module | None:
    """The recorder that an observer of this thread measures and that runs now, if any."""
    return _THREAD.recorder


@contextmanager
def _running(recorder: nn.Module) -> Iterator[None]:
    """A recorder runs for the observer, who is not asked about those inside of it."""
    before = _THREAD.observer, _THREAD.recorder
    _THREAD.observer, _THREAD.recorder = None, recorder
    try:
        yield
    finally:
        _THREAD.observer, _THREAD.recorder = before


def observed(record: Method) -> Method:
    """A method ``record`` whose steps the observer of the thread measures too, besides what the caller measures.

    As a decorator, of what takes ``(x, *args, **measures)`` and returns the output and records. The output is that
    without an observer.
    """

    @wraps(record)
    def observed_record(self: nn.Module, /, *inputs: Any, **options: Any) -> tuple[Any, Records]:
        observer = _THREAD.observer
        measures = None if observer is None else observer.measures_of(self)
        if observer is None or measures is None:
            return record(self, *inputs, **options)
        names = _unused_names(measures, {*options, *_RESERVED})
        with _running(self):
            output, records = record(self, *inputs, **options, **{names[name]: measures[name] for name in measures})
        own, taken = records, {*names.values()}
        if taken:
            own = Records({name: values for name, values in records.items() if name not in taken}, *records.layout)
        theirs = {name: records[names[name]] for name in measures}
        observer.receive(self, output, Records(theirs, *records.layout))
        return output, own

    return cast(Method, observed_record)


def observed_steps(steps: Method) -> Method:
    """A method ``steps`` whose steps the observer of the thread measures as they are taken, and is told at their end.

    As a decorator, of what takes ``(x, *args, closing=True)`` and returns the steps.
    """

    @wraps(steps)
    def steps_observed(self: nn.Module, x: Any, *args: Any, closing: bool = True, **options: Any) -> Iterable[Step]:
        observer = _THREAD.observer
        measures = None if observer is None else observer.measures_of(self)
        if observer is None or measures is None:
            return steps(self, x, *args, closing=closing, **options)
        closing = closing or any(map(needs_closing, measures.values()))
        with _running(self):
            taken = iter(steps(self, x, *args, closing=closing, **options))
        return _telling(observer, self, dict(measures), taken)

    return cast(Method, steps_observed)


def _telling(
    observer: Observer, recorder: nn.Module, measures: dict[str, StepFunction], steps: Iterator[Step]
) -> Iterator[Step]:
    """The steps, whose records the observer gets when there are no more, or no more are asked for."""
    rows: dict[str, list[Tensor]] = {name: [] for name in measures}
    count, last = 0, None
    try:
        while True:
            with _running(recorder):
                step = next(steps, None)
                if step is None:
                    return
                for name, one in measures.items():
                    rows[name].append(check_values(name, one(step), step.x0))
            count, last = count + 1, step
            yield step
    finally:
        if last is not None:
            names = tuple(getattr(recorder, "names", ()))
            blocks = names[:count] if len(names) >= count else None
            values = {name: torch.stack(each) for name, each in rows.items()}
            observer.receive(recorder, last.x1, Records(values, blocks=blocks or [f"step {m}" for m in range(count)]))


def _unused_names(measures: Iterable[str], taken: set[str]) -> dict[str, str]:
    """For each measure the name that it has beside those that are taken."""
    names: dict[str, str] = {}
    for name in measures:
        names[name] = name
        while names[name] in taken:
            names[name] += "_"
        taken.add(names[name])
    return names


def keeping(steps: list[Step], *, closing: bool = True) -> StepFunction:
    """A measure that appends each step to a list; its values are 0.

    Args:
        steps: the list.
        closing: whether the steps carry the closing stage of an FSAL method.

    Returns:
        The measure. It raises a ValueError of a step that each sample takes by itself, and of a field that writes into
        what it returned in the step before.

    >>> import odenets
    >>> flow, steps = odenets.Flow(depth=2), []
    >>> _ = flow.record(torch.randn(4, 3), steps=keeping(steps))
    >>> len(steps), steps[1].x0 is steps[0].x1
    (2, True)
    """
    versions: list[Any] = [None]

    def keep(step: Step) -> Tensor:
        if isinstance(step.h, Tensor) and step.h.ndim:
            raise ValueError(
                "steps are those of the batch: a neural ODE has them with control='batch'; record(x, name=measure) "
                "measures those of each sample, and solution(x).steps are they"
            )
        if versions[0] is not None:
            check_unchanged(*versions[0])
        versions[0] = step.stages, versions_of(step.stages)
        steps.append(step)
        return step.x1.real.new_zeros(len(step.x1))

    return measure(closing=closing)(keep)
