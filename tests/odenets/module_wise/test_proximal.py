"""Modules are proximal steps: a toy with a known minimizer, and the circles."""

from functools import partial

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField
from odenets.module_wise import fit_modules, split_into_modules, trgl
from odenets.training import data, datasets
from odenets.training.objectives import Objective
from odenets.transport import wasserstein


class Affine(nn.Module):
    """v = A x + b."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, t, x):
        return self.linear(x)


class Quadratic(Objective):
    """Half the mean square distance to a point."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, network, batch, output, records):
        return (output - self.target).square().mean() / 2


def test_a_module_reaches_the_proximal_point_and_losses_fall_by_the_known_factor():
    # min over T of <(Tx - a)^2>/2 + <(Tx - x)^2>/(2 tau) is Tx = (tau a + x)/(1 + tau), an affine residue
    tau, target, K = 0.5, torch.tensor([3.0, -1.0]), 3
    torch.manual_seed(0)
    points = data.TensorData("points", torch.randn(64, 2), torch.zeros(64, dtype=torch.long), 2, (0.0,), (1.0,))
    flow = Flow(Affine, solver="euler", h=1.0, depth=K)
    modules = split_into_modules(flow, K, points.x, classes=2, head=nn.Identity())
    sgd, objective = (
        partial(torch.optim.SGD, lr=0.3, momentum=0.9),
        trgl(tau, partial(Quadratic, target), doubled=False),
    )
    batches = data.Batches(points, 64)
    fit_modules(modules, batches, epochs=500, optimizer=sgd, objective=objective, schedule="sequential")
    x = points.x
    first = (x - target).square().mean().item() / 2
    for k, module in enumerate(modules.modules_in_order, 1):
        after = module.part(x)
        torch.testing.assert_close(after, (tau * target + x) / (1 + tau), rtol=1e-4, atol=1e-4)
        loss = (after - target).square().mean().item() / 2
        assert loss == pytest.approx(first / (1 + tau) ** (2 * k), rel=1e-3)
        x = after.detach()


def test_on_circles_the_loss_falls_from_module_to_module_and_displacement_is_at_least_w2():
    torch.manual_seed(0)
    train, _ = datasets.load("circles")
    flow = Flow(partial(MLPField, 2, 16), solver="euler", h=1.0, depth=3)
    modules = split_into_modules(flow, 3, train.x[:4], classes=2)
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "schedule": "sequential", "cache": "memory"}
    training = fit_modules(modules, data.Batches(train, 50, seed=0), epochs=30, objective=trgl(1.0), **options)
    losses = [[row["train_loss"] for row in training.rows if row["module"] == k + 1][-1] for k in range(3)]
    assert losses == sorted(losses, reverse=True)
    x = train.x
    with torch.no_grad():
        for module in modules.modules_in_order:
            after = module.part(x)
            displacement = (after - x).square().sum(1).mean().sqrt().item()
            assert displacement >= wasserstein(x, after) - 1e-6
            x = after
