"""Which kernels the reductions of a step use on a device, and why."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from odenets.command.mistakes import one_line
from solvers.reductions import SMALL, operator
from solvers.reductions.functional import SMALL_ON_GPU

__all__ = ["ALWAYS", "PLAIN", "kernels_on", "triton"]

PLAIN = "the plain expression"
ALWAYS = "under torch.compile, torch.func and forward-mode differentiation, and for complex numbers"
"""Where that is used whatever the device and the size."""


def triton() -> str:
    """Triton's version, or why it does not serve."""
    if find_spec("triton") is None:
        return "not installed"
    try:
        return str(import_module("triton").__version__)
    except Exception as error:  # whatever a broken install raises
        return f"installed and does not load: {type(error).__name__}: {one_line(error)}"


def kernels_on(device: torch.device) -> dict[str, Any]:
    """Which kernels :mod:`solvers.reductions` uses there, from which size on, why, and whether they run.

    A step's reductions and its finish are one of two operators where operands are large, and the plain expression
    elsewhere.
    """
    x = torch.ones(2, 8, device=device)
    if not operator.has_kernel(x):
        lacking = "Triton is not installed, pip install triton"
        why = lacking if device.type == "cuda" else f"there are no kernels for {device.type}"
        return {"kernels": PLAIN, "why": why, "runs": None}
    if device.type == "cpu":
        return {
            "kernels": "torch's own operations, on blocks that stay in the caches",
            "why": f"for operands of more than {SMALL:,} numbers; {PLAIN} for fewer, where it is faster",
            "runs": _runs(x),
        }
    interpreted = " interpreted in Python, slowly: unset TRITON_INTERPRET" if _interpreted() else ""
    return {
        "kernels": f"Triton kernels{interpreted}",
        "why": f"for operands of more than {SMALL_ON_GPU:,} numbers together, and for errors under error control; "
        f"{PLAIN} for fewer, since a call of an operator keeps the host busy for longer",
        "runs": _runs(x),
    }


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _runs(x: torch.Tensor) -> str:
    """Whether a kernel runs, and its value is right."""
    try:
        (value, *_) = operator.row_moments([2 * x], (1.0,), 2.0, False)[0].tolist()
    except Exception as error:  # of a compiler, a driver
        return f"fails: {type(error).__name__}: {one_line(error)}"
    return "tried, and right" if abs(value - 4) < 1e-4 else f"tried, and wrong: the mean square of 2 is {value}"
