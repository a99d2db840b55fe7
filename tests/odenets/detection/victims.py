"""A network on digits that is trained in a second, once per process, and a detector of attacks on it."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.ensemble import RandomForestClassifier
from torch.nn import functional as F

from odenets import Network, models
from odenets.detection.attacks.generation import attack, preset
from odenets.detection.features.trajectory import Trajectory, in_batches
from odenets.training import data, datasets
from odenets.training.data import TensorData


@cache
def digits() -> tuple[TensorData, TensorData]:
    return datasets.load("digits")


def fresh(depth: int = 2) -> Network:
    """An untrained one."""
    train, _ = digits()
    normalize = models.Normalize(list(train.mean), list(train.std))
    network = models.small_network(features=8, normalize=normalize, solver="euler", h=1.0, depth=depth)
    network(train.x[:2])
    return network


@cache
def victim() -> Network:
    """A trained one; tests leave it as it is."""
    train, _ = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = fresh()
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
    found = attack(victim(), preset("FGM", eps=0.15), train.x[:400], train.y[:400])
    parts = [features_of(train.x[:400]), features_of(found.images[found.success])]
    labels = torch.cat([torch.full((len(part),), float(i)) for i, part in enumerate(parts)])
    return RandomForestClassifier(30, max_depth=6, class_weight="balanced", random_state=0).fit(
        torch.cat(parts).numpy(), labels.numpy()
    )


def features_of(x: torch.Tensor) -> torch.Tensor:
    return in_batches(lambda part: Trajectory()(victim(), part), victim(), x)
