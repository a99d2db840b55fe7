"""A conditioned flow in modules that regress, and data for it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from odenets import Flow, Network
from odenets.module_wise import split_into_modules

GENERATOR = torch.Generator().manual_seed(0)
X, C = torch.rand(2, 22, 2, generator=GENERATOR, dtype=torch.float64)
Y = (X * C).sum(1, keepdim=True)


class Conditioned(nn.Module):
    """A velocity field ``v(t, x, c)``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, t, x, c):
        return torch.tanh(self.layer(torch.cat([x, c], 1)))


def network(depth=4):
    torch.manual_seed(0)
    flow = Flow(Conditioned, solver="euler", h=0.5, depth=depth)
    return Network(nn.Identity(), flow, nn.Linear(2, 1)).double()


def modules(K=2, depth=4):
    """Split where nothing conditions the fields: heads need no shapes of the blocks."""
    return split_into_modules(network(depth), K, (X[:3], C[:3]))


def pair(batch):
    """Inputs and targets of a batch of three tensors."""
    x, c, y = batch
    return (x, c), y


def loader(batch_size=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(X, C, Y), batch_size, shuffle=True, generator=generator, **options)
