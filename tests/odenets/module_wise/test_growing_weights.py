import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from odenets import measures, models
from odenets.module_wise import fit_modules, split_into_modules, trgl_multipliers
from odenets.training import data


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
    for p, q in zip(modules.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
