"""Fields of two halves, positions and momenta, each of which moves by the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from solvers.validation import check_call

__all__ = ["Separable", "halves"]


class Separable(nn.Module):
    """The field ``dq/dt = velocity(t, p)``, ``dp/dt = force(t, q)`` of positions q and momenta p.

    Methods such as "leapfrog" call its two functions one by one; for every other method it is a field as any. Modules
    among the two are submodules, whose parameters train.
    Reference: Hairer, Lubich, Wanner, *Geometric Numerical Integration*, I.1.

    Args:
        velocity: of the positions, from time and momenta ``(B, *S)`` to the same shape.
        force: on the momenta, from time and positions ``(B, *S)`` to the same shape.

    Raises:
        TypeError: one of the two is no function of a time and a state.

    >>> from solvers import integrate
    >>> pendulum = Separable(velocity=lambda t, p: p, force=lambda t, q: -q.sin())
    >>> q, p = torch.ones(4, 1), torch.zeros(4, 1)
    >>> q1, p1 = integrate(pendulum, (q, p), 0.0, 10.0, solver="leapfrog", steps=100).x1
    >>> energy = p1**2 / 2 - q1.cos() + q.cos()
    >>> q1.shape, energy.abs().max() < 1e-2
    (torch.Size([4, 1]), tensor(True))
    """

    structure = "separable"

    def __init__(self, velocity: Callable[..., Tensor], force: Callable[..., Tensor]) -> None:
        super().__init__()
        for name, function in (("velocity", velocity), ("force", force)):
            if not callable(function):
                raise TypeError(f"{name} must be a function (t, x), got {type(function).__name__}")
            check_call(function, None, name)
        self.velocity, self.force = velocity, force

    def forward(self, t: Any, x: Any, *args: Any) -> Any:
        """The velocity of a state.

        Args:
            t: time.
            x: a tuple ``(q, p)``, each ``(B, *S)``, or one tensor ``(B, 2 d, *S)`` whose first half along dimension 1
                is q.
            args: what both functions take besides.

        Returns:
            The same as x.

        Raises:
            TypeError: another kind of state.
            ValueError: an odd dimension, or q and p of different shapes.
        """
        q, p = halves(x)
        rates = self.velocity(t, p, *args), self.force(t, q, *args)
        return torch.cat(rates, 1) if isinstance(x, Tensor) else rates

    def part(self, t: Any, x: Any, name: str, *args: Any) -> Any:
        """What a method reads of the field.

        Args:
            t: time.
            x: momenta for "velocity" and positions for "force", ``(B, *S)``; for "whole" a state.
            name: "velocity", "force" or "whole".
            args: what both functions take besides.

        Returns:
            The same as x.
        """
        return (self if name == "whole" else getattr(self, name))(t, x, *args)


def halves(x: Any) -> tuple[Tensor, Tensor]:
    """Positions and momenta in a state.

    Raises:
        TypeError: neither a tensor nor a tuple of two.
        ValueError: a tensor without an even dimension 1, or halves of different shapes.
    """
    if isinstance(x, Tensor):
        if x.ndim < 2 or x.shape[1] % 2:
            raise ValueError(
                "x0 must have shape (B, 2 d, *S) for a Separable field, positions and momenta along dimension 1, got "
                f"{tuple(x.shape)}; or be a tuple (q, p)"
            )
        q, p = x.chunk(2, 1)
        return q, p
    if not isinstance(x, (tuple, list)) or len(x) != 2 or not all(isinstance(half, Tensor) for half in x):
        kind = f"{len(x)} entries" if isinstance(x, (tuple, list)) else type(x).__name__
        raise TypeError(f"x0 must be a tuple (q, p) of tensors, or one tensor, for a Separable field, got {kind}")
    if x[0].shape != x[1].shape:
        raise ValueError(
            "x0 must have positions and momenta of one shape for a Separable field, got q "
            f"{tuple(x[0].shape)} and p {tuple(x[1].shape)}"
        )
    return x[0], x[1]
