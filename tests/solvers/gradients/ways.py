"""Every way to a gradient that calls the field again, as functions of a field and a first state."""

import pytest
import torch
from torch import nn

from solvers import Tolerance, integrate, odeint_adjoint

D = torch.float64
X0 = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.3]], dtype=D)


def adjoint(field, x, parameters=None):
    t = torch.tensor([0.0, 0.5], dtype=D)
    return odeint_adjoint(field, x, t, rtol=1e-6, atol=1e-7, adjoint_params=parameters)[-1]


def by(gradient, **options):
    def solve(field, x, parameters=None, args=()):
        more = {"parameters": parameters, "args": args, **options}
        return integrate(field, x, 0.0, 0.5, gradient=gradient, solver="dopri5", **more).x1

    return solve


TIGHT = {"tolerance": Tolerance(1e-6, 1e-7)}
SOLVES = {
    "odeint_adjoint": adjoint,
    "backsolve": by("backsolve", **TIGHT),
    "backsolve, steps": by("backsolve", steps=12),
    "checkpoint": by("checkpoint", **TIGHT),
    "checkpoint, steps": by("checkpoint", steps=5),
}
directly = by("direct", **TIGHT)
every = pytest.mark.parametrize("way", SOLVES)
solving_backwards = pytest.mark.parametrize("way", ["odeint_adjoint", "backsolve", "backsolve, steps"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 2, dtype=D), nn.Linear(2, 2, dtype=D)
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        return torch.tanh(self.a(x)) * self.b(x)

    def velocity(self, t, x):
        return self(t, x)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=1e-6)


def gradients(make, solve, change=lambda net: None, tensors=lambda net: list(net.parameters())):
    net = make()
    inputs = tensors(net)
    x1 = solve(net)
    change(net)
    return torch.autograd.grad(x1.square().sum(), inputs)


class Held(nn.Module):
    """Calls a solve, as the field of a larger network."""

    def __init__(self, solve):
        super().__init__()
        self.field, self.head, self.solve = Net(), nn.Linear(2, 1, dtype=D), solve

    def forward(self, x):
        return self.head(self.solve(self.field, x))
