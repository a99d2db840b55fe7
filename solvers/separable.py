"""Fields of two halves, positions and momenta, each of which moves by the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from solvers.validation import called, check_call, is_transformed, mismatch

__all__ = ["Separable", "Slope", "halves"]


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

    @classmethod
    def of_energies(cls, kinetic: Callable[..., Tensor], potential: Callable[..., Tensor]) -> Separable:
        """The field of the energy ``H(q, p) = kinetic(p) + potential(q)``.

        ``dq/dt = d kinetic / dp`` and ``dp/dt = -d potential / dq``, by autograd, also where no gradients are kept.
        Energies that are networks make a Hamiltonian network, whose parameters train. They must be smooth: that of ReLU
        has a force that jumps.

        Args:
            kinetic: of momenta ``(B, *S)`` to an energy for each sample, ``(B,)`` or ``(B, 1)``.
            potential: of positions, likewise. Both take what further ``args`` the field gets.

        Returns:
            The field, whose modules ``velocity`` and ``force`` hold the energies as ``energy``.

        Raises:
            TypeError: one of the two is no function of a state.
            ValueError: when called, an energy of another shape, or one that does not depend on the state by autograd.

        >>> from solvers import integrate
        >>> spring = Separable.of_energies(lambda p: p.square().sum(1) / 2, lambda q: q.square().sum(1) / 2)
        >>> x0 = torch.tensor([[1.0, 0.0]])
        >>> q, p = integrate(spring, x0, 0.0, 100.0, solver="leapfrog", steps=1000).x1[0]
        >>> round((q**2 + p**2).item(), 2)
        1.0
        """
        for name, energy in (("kinetic", kinetic), ("potential", potential)):
            if not callable(energy):
                raise TypeError(f"{name} must be a function of a state, got {type(energy).__name__}")
            if problem := mismatch(energy.forward if isinstance(energy, nn.Module) else energy, None, least=True):
                raise TypeError(f"{name} must take a state alone, as energy(x), but it takes {problem}")
        return cls(Slope("kinetic", kinetic), Slope("potential", potential, -1.0))

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
        rates = self.part(t, p, "velocity", *args), self.part(t, q, "force", *args)
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
        return self(t, x, *args) if name == "whole" else called(getattr(self, name), name, t, x, *args)


class Slope(nn.Module):
    """The derivative of an energy by the state, times a sign, as a function of time and state.

    Args:
        name: of the energy, for errors.
        energy: of states ``(B, *S)``, a number for each.
        sign: 1 or -1.
    """

    def __init__(self, name: str, energy: Callable[..., Tensor], sign: float = 1.0) -> None:
        super().__init__()
        self.name, self.energy, self.sign = name, energy, sign

    def forward(self, t: Any, x: Tensor, *args: Any) -> Tensor:
        """The slope at states ``x``; gradients flow through it where they are kept."""
        keeps = torch.is_grad_enabled()
        if torch.compiler.is_compiling() or is_transformed(x):
            return self.sign * torch.func.grad(self._total)(x, *args)
        with torch.enable_grad():
            x = x if keeps and x.requires_grad else x.detach().requires_grad_()
            total = self._total(x, *args)
            if not total.requires_grad:
                raise ValueError(f"{self.name} must depend on the state by operations of torch, got a constant")
            (slope,) = torch.autograd.grad(total, x, create_graph=keeps, materialize_grads=True)
        return self.sign * slope

    def _total(self, x: Tensor, *args: Any) -> Tensor:
        energy = self.energy(x, *args)
        if not isinstance(energy, Tensor) or energy.shape not in ((len(x),), (len(x), 1)):
            got = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise ValueError(f"{self.name} must return an energy for each sample, ({len(x)},), got {got}")
        return energy.sum()


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
