"""Loops of our own on the threads of torch's own operations.

A second pool beside them would share its cores with threads of torch that wait for work by spinning. Torch's OpenMP
runtime runs a function on the team that it keeps by ``GOMP_parallel``; where another serves torch, one thread does it.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from typing import Any

import torch
from numba import njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic

__all__ = ["FUNCTION", "TASKS", "next_share", "share"]

WORTH = 1 << 20  # bytes read from which threads pay
SHARES = 4  # shares of the tasks per thread: one that is late takes fewer

NEXT, TASKS, SHARE = 0, 1, 2  # where the loops find the first task that nobody has taken, their number, and a share's


FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _parallel() -> Any:
    """``GOMP_parallel(function, data, threads, flags)`` of the runtime that torch was linked with, or None."""
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = [FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return found


def share(loop: Any, given: array[int], tasks: int, read: int) -> None:
    """Run a loop over all tasks, on as many threads as torch uses if the bytes to read are worth it.

    The loop is a function of C of the address of ``given``, which takes tasks by :func:`next_share` until none is left.
    """
    threads, parallel = min(torch.get_num_threads(), tasks) if read >= WORTH else 1, _parallel()
    given[NEXT], given[TASKS], given[SHARE] = 0, tasks, tasks if threads == 1 else -(-tasks // (SHARES * threads))
    if threads == 1 or parallel is None:
        loop(given.buffer_info()[0])
    else:
        parallel(loop, given.buffer_info()[0], threads, 0)


@intrinsic
def _fetch_and_add(_: Any, given: Any, amount: Any) -> Any:
    """The first number of an array before the amount was added to it, as one operation whatever thread asks."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, arguments[1], "monotonic")

    return types.int64(given, types.int64), generate


_take: Any = _fetch_and_add


@njit
def next_share(given):
    """First and end of the tasks to do next; they are the same when none is left."""
    first = _take(given, given[SHARE])
    return first, min(first + given[SHARE], given[TASKS])
