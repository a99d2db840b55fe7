"""Steps of a loop of one's own."""

from functools import partial

import torch

from odenets import Flow, MLPField

X, Y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def flow(**options):
    torch.manual_seed(0)
    return Flow(partial(MLPField, 3, 4), depth=2, solver="euler", h=1.0, **options)


def sgd(network, lr=0.05):
    return torch.optim.SGD(network.parameters(), lr)


def take_steps(network, objective, optimizer, n=1, x=X, y=Y):
    for _ in range(n):
        optimizer.zero_grad()
        objective(network, x, y).backward()
        optimizer.step()


def counted(objective):
    """The steps that were counted, with the one that no loss has noticed yet."""
    return objective.state_dict()["_extra_state"].item()
