"""How the neural ODEs of a network are solved, as files of weights tell it."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping

from torch import nn

from odenets.functions import described
from odenets.neural_ode import NeuralODE
from solvers import Reversible

__all__ = ["check_solves", "solves"]

TIMES = ("t0", "t1")
SHOWN = ("tableau", "steps", "tolerance", "controller", "control")


def solves(network: nn.Module) -> dict[str, dict[str, str]]:
    """The settings of the solve of each neural ODE, by its name, as text that is equal where it computes the same.

    >>> import odenets
    >>> solves(NeuralODE(odenets.MLPField(2), t1=2.0))[""]["t1"]
    '2.0'
    """
    return {
        name: {key: _text(module.settings[key], key) for key in (*TIMES, *SHOWN)}
        | {"coupling": str(_coupling(module.gradient))}
        for name, module in network.named_modules()
        if isinstance(module, NeuralODE)
    }


def _coupling(gradient: object) -> float | None:
    """That of the pair of states that are solved; the other gradients are of one and the same solution."""
    pair = Reversible() if gradient == "reversible" else gradient
    return pair.coupling if isinstance(pair, Reversible) else None


def _text(value: object, key: str) -> str:
    if value is None or isinstance(value, int | float | str):
        return str(value)
    shown = getattr(value, "name", None) or re.sub(r" at 0x\w+", "", str(value))
    return f"{shown} ({hashlib.sha256(described(value, key).encode()).hexdigest()[:8]})"


def check_solves(network: nn.Module, saved: Mapping[str, Mapping[str, str]], place: str, stacklevel: int) -> None:
    """That the neural ODEs of a ``network`` are solved as those were of which :func:`solves` returned ``saved``.

    Args:
        network: that gets the weights.
        saved: by name; what has no entry is not compared.
        place: of the file.
        stacklevel: of the warning.

    Raises:
        ValueError: one goes over other times.

    Warns:
        UserWarning: one is solved in another way.
    """
    others = []
    for name, own in solves(network).items():
        for key, value in own.items():
            before = saved.get(name, {}).get(key, value)
            if before == value:
                continue
            if key in TIMES:
                raise ValueError(f"{_named(name)} must have the {key} that it was saved with, {before}, got {value}")
            others.append(f"{_named(name)} has {_word(key)} {value}, saved with {before}")
    if others:
        warnings.warn(
            f"{place}{'; '.join(others)}: outputs are not those of the saved network", stacklevel=stacklevel + 1
        )


def _named(name: str) -> str:
    return f"neural ODE {name!r}" if name else "the neural ODE"


def _word(key: str) -> str:
    words = {"tableau": "the solver", "tolerance": "the tolerance", "controller": "the controller"}
    return (words | {"coupling": "gradient='reversible' with the coupling"}).get(key, key)
