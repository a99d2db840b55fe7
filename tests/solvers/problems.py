"""Initial value problems that several tests solve."""

import math

import torch

D = torch.float64
CONTROLS = [{}, {"control": "sample"}]


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
