"""Exceptions of trainings, of libraries that are not installed, and of arguments; those of solves: :mod:`solvers`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["DivergedError", "WorkerLostError", "check_count", "check_number", "needs", "refuse", "renamed"]


class DivergedError(RuntimeError):
    """An epoch left a loss that is not finite or too large, or weights that are not finite, and no callback helped.

    The last checkpoint stands: what such an epoch left is not saved. A lower learning rate, finer steps or normalized
    inputs help, or :class:`odenets.depth.AdaptiveDepth`, which refines the blocks and trains the epoch again.

    >>> from functools import partial
    >>> import torch
    >>> from odenets.training import fit
    >>> from odenets.models import points_network
    >>> batches, adam = [(torch.rand(4, 2), torch.tensor([0, 1, 1, 0]))], partial(torch.optim.Adam, lr=0.1)
    >>> try:
    ...     training = fit(points_network(depth=2), batches, epochs=1, optimizer=adam, loss_limit=0.0)
    ... except DivergedError as error:
    ...     print(str(error)[:16])
    epoch 1 diverged
    """


class WorkerLostError(RuntimeError):
    """Another process of the group is gone or silent, or the group was told to end; the modules' checkpoints stand.

    :func:`odenets.module_wise.fit_in_processes` raises it; called again with the same run, it goes on from the newest
    epoch that all modules have completed.
    """


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of optional libraries: one that is not installed is an error that names the ``extra`` with it.

    One that is installed and does not load, or is too old to have what is imported, raises its own error, with a note.

    Raises:
        ModuleNotFoundError: a library is not installed.

    >>> with needs("training"):
    ...     import no_such_library
    Traceback (most recent call last):
        ...
    ModuleNotFoundError: no_such_library is needed here and not installed: pip install 'odenets[training]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or str(error)).partition(".")[0]
        if sys.modules.get(name) is not None or find_spec(name) is not None:
            raise  # it is there, and lacks something of its own
        raise ModuleNotFoundError(
            f"{name} is needed here and not installed: pip install 'odenets[{extra}]'", name=name
        ) from error
    except ImportError as error:
        error.add_note(f"pip install --upgrade 'odenets[{extra}]' brings the versions that this needs")
        raise


def check_count(name: str, value: object, least: int) -> None:
    """That the argument called ``name`` has a ``value`` that is a whole number, and not below the ``least``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below the least.

    >>> check_count("depth", 2.5, 1)
    Traceback (most recent call last):
        ...
    TypeError: depth must be a whole number, got 2.5
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must " + (f"be at least {least}" if least else "not be negative") + f", got {value}")


def check_number(name: str, value: Any) -> float:
    """The number that the argument called ``name`` has for its ``value``, also of a tensor of no dimensions.

    Raises:
        TypeError: it is no number: text, a flag, or a tensor that takes gradients, which its number does not.

    >>> import torch
    >>> check_number("tolerance", torch.tensor(0.5))
    0.5

    >>> check_number("tolerance", "1e-3")
    Traceback (most recent call last):
        ...
    TypeError: tolerance must be a number, got '1e-3'
    """
    if getattr(value, "ndim", None) == 0 and not getattr(value, "requires_grad", False):
        value = value.item()  # of NumPy or torch, which need not load for this
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return cast(float, value)


def refuse(owner: str, unknown: Iterable[str], known: Mapping[str, str]) -> None:
    """Refuse ``unknown`` arguments by their names; ``known`` says what takes their place.

    Args:
        owner: what was called, for the error.
        unknown: the names.
        known: by name what takes its place.

    Raises:
        TypeError: there are any.

    >>> refuse("train()", ["rate"], {"rate": "lr_scheduler"})
    Traceback (most recent call last):
        ...
    TypeError: train() takes no 'rate': that is lr_scheduler
    """
    for name in unknown:
        raise TypeError(f"{owner} takes no {name!r}" + (f": that is {known[name]}" if name in known else ""))


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function names its arguments where they are called by ``names`` that they have elsewhere.

    >>> @renamed(epoch_count="epochs")
    ... def train(epochs=1):
    ...     return epochs
    >>> train(epoch_count=2)
    Traceback (most recent call last):
        ...
    TypeError: train() takes no 'epoch_count': that is epochs
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            refuse(f"{function.__name__}()", kwargs.keys() & names.keys(), names)
            return function(*args, **kwargs)

        return call

    return wrap
