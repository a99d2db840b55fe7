"""Modules whose velocity fields are conditioned: v(t, x, *args)."""

import pytest
import torch
from torch.nn import functional as F

from odenets import Flow, MLPField, measures
from odenets.module_wise import fit_modules, split_into_modules
from odenets.training import Task, fit
from tests.odenets.checks import assert_same
from tests.odenets.module_wise.conditioned import C, X, Y, modules, network, pair

BATCHES = [(X[i : i + 8], C[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]
SGD = {"epochs": 2, "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1), "collate": pair}


def test_every_module_is_conditioned():
    whole, split = network(), modules()
    output, records = whole.record(X, C, action=measures.action)
    mine, of_modules = split.record(X, C, action=measures.action)
    assert torch.equal(split(X, C), output)
    assert torch.equal(mine, output)
    assert torch.equal(of_modules["action"], records["action"])
    for one, other in zip(split.steps(X, C), whole.steps(X, C), strict=True):
        assert torch.equal(one.x1, other.x1)
    assert torch.equal(split.modules_in_order[0].record(X, C)[0], split(X, C, module=1))
    assert next(split.outputs(X, C)).equal(split(X, C, module=1))


@pytest.mark.parametrize("order", ["parallel", "sequential", "end-to-end", "checkpointed"])
def test_one_module_trains_as_its_network(order):
    whole, split = network(), modules(K=1)
    fit(whole, BATCHES, objective=Task(F.mse_loss), **SGD)
    fit_modules(split, BATCHES, objective=lambda k, K: Task(F.mse_loss), order=order, **SGD)
    assert_same(whole.head, split.modules_in_order[0].head, atol=1e-12)
    assert_same(whole.flows[0].blocks, split.flows[0].blocks, atol=1e-12)


def test_modules_in_sequence_see_states_of_conditioned_modules():
    """As each alone on the states that those before it leave behind."""
    split, alone = modules(), modules()
    fit_modules(split, BATCHES, objective=lambda k, K: Task(F.mse_loss), order="sequential", **SGD)
    states = X
    for k, module in enumerate(alone.modules_in_order):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(2):
            for rows in (slice(0, 8), slice(8, 16), slice(16, 22)):
                optimizer.zero_grad()
                F.mse_loss(module(states[rows], C[rows])[0], Y[rows]).backward()
                optimizer.step()
        states = module(states, C)[1].detach()
        assert_same(split.parts[k], module, atol=1e-12)


def test_memory_of_conditioned_blocks_balances_them():
    split = split_into_modules(network(), 2, (X[:3], C[:3]), balance="memory")
    assert split.ends == (2, 4)


def test_fields_that_take_nothing_besides_say_so():
    flow = Flow(lambda: MLPField(2), depth=2)
    plain = split_into_modules(flow, 2, torch.rand(3, 2), outputs=1)
    with pytest.raises(TypeError, match=r"takes? .*argument"):
        plain(torch.rand(3, 2), torch.rand(3, 2))
