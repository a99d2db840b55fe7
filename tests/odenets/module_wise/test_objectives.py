"""Modules are proximal steps: a toy with a known minimizer, the circles, and weights that grow with the loss."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField, measures, models
from odenets.module_wise import fit_modules, split_into_modules, trgl, trgl_multipliers
from odenets.training import data, datasets
from odenets.training.objectives import Objective, Task
from odenets.transport import wasserstein
from tests.odenets.networks import Velocity


class Quadratic(Objective):
    """Half the mean square distance to a point."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def loss(self, network, batch, output, records):
        return (output - self.target).square().mean() / 2


def test_a_module_reaches_the_proximal_point_and_losses_fall_by_the_known_factor():
    # min over T of <(Tx - a)^2>/2 + <(Tx - x)^2>/(2 tau) is Tx = (tau a + x)/(1 + tau), an affine residue
    tau, target, K = 0.5, torch.tensor([3.0, -1.0]), 3
    torch.manual_seed(0)
    points = data.TensorData(torch.randn(64, 2), torch.zeros(64, dtype=torch.long))
    affine = partial(Velocity, lambda m, t, x: m.linear(x))
    flow = Flow(lambda: affine(linear=nn.Linear(2, 2)), solver="euler", h=1.0, depth=K)
    modules = split_into_modules(flow, K, points.x, outputs=2, head=nn.Identity())
    sgd = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
    objective = trgl(tau, partial(Quadratic, target), doubled=False)
    batches = data.Batches(points, 64)
    fit_modules(modules, batches, epochs=200, optimizer=sgd, objective=objective, order="sequential")
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
    modules = split_into_modules(flow, 3, train.x[:4], outputs=2)
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "order": "sequential", "cache": "memory"}
    training = fit_modules(modules, data.Batches(train, 50, seed=0), epochs=12, objective=trgl(1.0), **options)
    losses = [[row["train_loss"] for row in training.rows if row["module"] == k + 1][-1] for k in range(3)]
    assert losses == sorted(losses, reverse=True)
    x = train.x
    with torch.no_grad():
        for module in modules.modules_in_order:
            after = module.part(x)
            displacement = (after - x).square().sum(1).mean().sqrt().item()
            assert displacement >= wasserstein(x, after) - 1e-6
            x = after


def test_modules_look_again_without_a_trace(parts):
    counts = {}
    for update in ("before", "after"):
        net = models.resnet9(1, 10, features=4, size=8, depth=2)
        modules = split_into_modules(net, 2, parts.train.x[:4])
        fit_modules(modules, data.Batches(parts.train.subset(torch.arange(60)), 20), epochs=2,
                    optimizer=partial(torch.optim.SGD, lr=0.01),
                    objective=trgl_multipliers(every=1, update=update))  # fmt: skip
        counts[update] = {name: value for name, value in modules.state_dict().items() if "batches" in name}
    assert counts["before"] == counts["after"]
    assert counts["after"]


def test_growing_weights_of_modules_are_those_of_equation_33(parts):
    """lambda_{i+1} = lambda_i + h L(theta_{i+1}, x_{i+1}) after every s-th step i, lambda_i weighing the loss."""
    torch.manual_seed(0)
    x, y, s, h = parts.train.x.double(), parts.train.y, 3, 0.2
    net = models.resnet9(1, 10, features=4, size=8, depth=1, norm=None).double()
    modules = split_into_modules(net, 1, x[:4])
    twin = copy.deepcopy(modules).train()
    training = fit_modules(modules, data.Batches(replace(parts.train, x=x), 20), epochs=1,
                           optimizer=partial(torch.optim.SGD, lr=0.01),
                           objective=trgl_multipliers(0.5, h, s, weigh="multiply", cost="residue"))  # fmt: skip
    optimizer, batches = torch.optim.SGD(twin.parameters(), lr=0.01), list(zip(x.split(20), y.split(20), strict=True))
    multiplier = 0.5
    for i, (one, label) in enumerate(batches, 1):
        output, records = twin.record(one, residue=measures.residue)
        optimizer.zero_grad()
        (multiplier * F.cross_entropy(output, label) + records["residue"].sum(0).mean()).backward()
        optimizer.step()
        if i % s == 0 and i < len(batches):
            with torch.no_grad():
                multiplier += h * F.cross_entropy(twin(batches[i][0]), batches[i][1]).item()
    assert training.objectives[0].multiplier.item() == pytest.approx(multiplier, rel=1e-9)
    torch.testing.assert_close([*modules.parameters()], [*twin.parameters()], rtol=0, atol=1e-10)


def test_modules_solve_a_regression():
    """Each head estimates the targets; its loss falls, and the cost is the module's own."""
    torch.manual_seed(0)
    flow = Flow(partial(MLPField, 2, 8), solver="euler", h=1.0, depth=2)
    x = torch.randn(32, 2)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
    modules = split_into_modules(flow, 2, x[:4], outputs=2)
    for k, module in enumerate(modules.modules_in_order):
        objective = trgl(1.0, task=lambda: Task(F.mse_loss))(k, 2)
        optimizer, losses = torch.optim.Adam(module.parameters(), 0.02), []
        for _ in range(50):
            optimizer.zero_grad()
            loss = objective(module, x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        output, records = module.record(x, **objective.measures)
        cost = records["action"].sum(0).mean()
        torch.testing.assert_close(objective(module, x, y), F.mse_loss(output, y) + cost / (2 * (1 + (k == 1))))
        x = module.part(x).detach()
