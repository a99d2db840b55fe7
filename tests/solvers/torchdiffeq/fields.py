"""Fields as torchdiffeq's callers write them."""

import torch
from torch import nn

D = torch.float64


class Lotka(nn.Module):
    """Prey and predator."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=D))

    def forward(self, t, y):
        a, b, c, d = self.rates.to(y.dtype)
        u, v = y.unbind(-1)
        return torch.stack([u * (a - b * v), v * (d * u - c)], -1)


class VanDerPol(nn.Module):
    def forward(self, t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


class Forced(nn.Module):
    """Linear, not autonomous."""

    def forward(self, t, y):
        return -0.5 * y + torch.cos(3 * t) * y.new_tensor([1.0, -2.0])
