"""Initial value problems that several tests solve."""

import math
from functools import partial

import torch
from torch import nn

D = torch.float64
CONTROLS = [{}, {"control": "sample"}]
X0 = torch.tensor([[1.0, 1.0], [1.5, 0.7], [0.4, 2.0]], dtype=D)
TIMES = [0.0, 0.1, 0.1, 1.3, 2.0, 2.9]
EACH = [[0.0, 0.1, 2.9], [0.3, 0.3, 0.4], [3.0, 3.0, 3.0]]
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
rounding = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def decay(t, x):
    return -x + math.cos(3 * t)


def lotka(t, x):
    """Prey and predator."""
    u, v = x.unbind(-1)
    return torch.stack([u * (1.5 - v), v * (u - 3)], -1)


def van_der_pol(t, x):
    a, b = x[:, :1], x[:, 1:]
    return torch.cat([b, 5 * (1 - a**2) * b - a], 1)


def constant(t, x):
    """Whose steps grow without limit."""
    return torch.ones_like(x)


def growth(t, x):
    """Whose solution is x0 exp(t^2 / 2)."""
    return t * x


class Net(nn.Module):
    """With further arguments that shift the velocity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 2, dtype=D)

    def forward(self, t, x, *shift):
        return torch.tanh(self.linear(x)) * t + sum(shift, torch.zeros(()))
