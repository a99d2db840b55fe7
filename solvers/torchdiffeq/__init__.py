"""The functions of torchdiffeq, with their names, arguments and returns, on the engine of :func:`solvers.integrate`."""

from solvers.torchdiffeq.adjoint import odeint_adjoint
from solvers.torchdiffeq.odeint import odeint, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]
