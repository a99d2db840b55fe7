"""Networks with batch norm: new, and trained with forward passes only."""

import torch
from torch import nn

from odenets import ConvField, Flow, Network

X = torch.rand(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def network(solver="bs23", **flow):
    torch.manual_seed(0)
    field = lambda: ConvField(3, norm="batch")  # noqa: E731
    head = nn.Sequential(nn.Flatten(), nn.Linear(75, 2))
    return Network(nn.Identity(), Flow(field, solver=solver, depth=2, **flow), head)


def trained(solver="bs23", **flow):
    """Its statistics are those that forward passes of a training set."""
    net = network(solver, **flow).train()
    for _ in range(3):
        net(X)
    return net.eval()
