"""A hundred networks on circles trained together, beside one of them alone: what a loop over them would take.

pytest benchmarks/bench_instances.py --benchmark-only
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, Network
from odenets.least_action import LeastAction
from odenets.training import data, datasets
from odenets.training.instances import fit_instances
from odenets.training.loop import fit

INSTANCES = 100


def network(seed: int, depth: int) -> Network:
    """A residual network of points with two hidden units per block."""
    torch.manual_seed(seed)
    field = partial(MLPField, 2, 2, activation="relu")
    return Network(nn.Identity(), Flow(field, solver="euler", h=1.0, depth=depth), nn.Linear(2, 2))


def objective() -> LeastAction:
    """That of the circles experiment."""
    return LeastAction(lambda0=0.1, tau=0.1, every=5, cost="norm", update="after", weigh="multiply")


@pytest.mark.parametrize("depth", [1, 9])
@pytest.mark.parametrize("who", ["one alone", f"{INSTANCES} together"])
def bench_instances(benchmark: Any, machine: dict[str, Any], who: str, depth: int) -> None:
    """One epoch of 20 steps of ten points; together is to be compared with ``INSTANCES`` times alone."""
    benchmark.group = f"circles, {depth} blocks, an epoch of 20 steps"
    benchmark.extra_info.update(who=who, depth=depth, machine=machine)
    batches = [data.Batches(datasets.points("circles", 200, seed), 10) for seed in range(INSTANCES)]
    adam = partial(torch.optim.Adam, lr=0.01)
    run: Callable[[], object]
    if who == "one alone":
        one = network(0, depth)
        run = partial(fit, one, batches[0], epochs=1, optimizer=adam, objective=objective())
    else:
        networks = [network(seed, depth) for seed in range(INSTANCES)]
        run = partial(fit_instances, networks, batches, epochs=1, optimizer=adam, objective=objective)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
