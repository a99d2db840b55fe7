"""Fields that several tests of neural ODEs take."""

import torch
from torch import nn


class Conditioned(nn.Module):
    """``v = tanh(W x + c)``."""

    def __init__(self, features=3):
        super().__init__()
        self.layer = nn.Linear(features, features)

    def forward(self, t, x, c):
        return torch.tanh(self.layer(x) + c)


class Bound(nn.Module):
    """A module with a method that is a velocity."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def velocity(self, t, x):
        return self.layer(x)
