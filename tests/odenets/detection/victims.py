"""A network on digits that is trained in a second, once per process, and a detector of attacks on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.nn import functional as F

from odenets import Network, models
from odenets.detection import Attacked, Trajectory, in_batches, preset, run_attack
from odenets.training import data, datasets
from odenets.training.data import TensorData

SHORT = {
    "FGM": {},
    "BIM": {"max_iter": 5},
    "APGD": {"max_iter": 5, "nb_random_init": 1},
    "AA": {"apgd_iter": 5, "apgd_restarts": 1, "deepfool_iter": 5, "square_iter": 5, "square_restarts": 1},
    "DF": {"max_iter": 30},
    "CW": {"learning_rate": 0.1, "initial_const": 10.0, "binary_search_steps": 2},
    "HSJ": {"max_iter": 2, "max_eval": 50, "init_eval": 10},
    "BA": {"max_iter": 5},
}
"""Settings with which an attack takes no time."""


class Affine(nn.Module):
    """v = a x + b; or an encoder."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.a * inputs[-1] + self.b


@cache
def digits() -> tuple[TensorData, TensorData]:
    return datasets.load("digits")


@cache
def victim() -> Network:
    """A trained one; tests leave it as it is."""
    train, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        normalize = models.Normalize(list(train.mean), list(train.std))
        network = models.small_network(features=8, normalize=normalize, solver="euler", h=1.0, depth=2)
        network(train.x[:2])
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for epoch in range(6):
            for x, y in data.Batches(train, 64, seed=0).epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
        optimizer.zero_grad()
    return network


@cache
def detection():
    """A forest that detects the fast gradient method, by the trajectory's features."""
    train, _ = digits()
    attacked = run_attack(victim(), preset("FGM", eps=0.15), train.x[:400], train.y[:400])
    parts = [features_of(train.x[:400]), features_of(attacked.images[attacked.success])]
    labels = torch.cat([torch.full((len(part),), float(i)) for i, part in enumerate(parts)])
    return RandomForestClassifier(30, max_depth=6, class_weight="balanced", random_state=0).fit(
        torch.cat(parts).numpy(), labels.numpy()
    )


def features_of(x: torch.Tensor) -> torch.Tensor:
    return in_batches(lambda part: Trajectory()(victim(), part), victim(), x)


def same(a: Attacked, b: Attacked) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in Attacked.__slots__)


FOREST = RandomForestClassifier(20, random_state=0)
GENERATOR = torch.Generator().manual_seed(0)
CLEAN, NEW = digits()[0].x[:160].split(80)
ODD, NEW_ODD = (torch.rand(80, 1, 8, 8, generator=GENERATOR) for _ in range(2))  # noise, far from digits


def network() -> Network:
    """An untrained one, the same at every call."""
    torch.manual_seed(0)
    return models.small_network(solver="bs23", depth=2, normalize=models.Normalize([0.3], [0.4]))


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Modes and gradients of a network, and all random states, are afterwards what they were."""

    def state() -> list[Any]:
        modes = [module.training for module in network.modules()]
        gradients = [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in network.parameters()]
        numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the state that ART draws from
        return [modes, gradients, torch.get_rng_state().tolist(), numpy_state, random.getstate()]

    before = state()
    try:
        yield
    finally:
        assert state() == before


def refused(match: str, call: Any, *args: Any, error: type[Exception] = ValueError, **options: Any) -> None:
    """The call raises such an error."""
    with pytest.raises(error, match=match):
        call(*args, **options)
