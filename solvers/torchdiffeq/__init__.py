"""The functions of torchdiffeq, with their names, arguments and returns, on the engine of :func:`solvers.integrate`.

>>> import torch
>>> from solvers.torchdiffeq import odeint  # in place of: from torchdiffeq import odeint
>>> odeint(lambda t, y: -y, torch.ones(3, 2), torch.tensor([0.0, 0.5, 1.0])).shape
torch.Size([3, 3, 2])
"""

from solvers.torchdiffeq.adjoint import odeint_adjoint
from solvers.torchdiffeq.odeint import odeint, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]
