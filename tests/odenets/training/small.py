"""Small trainings that the tests share."""

from dataclasses import replace
from functools import partial

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from odenets import models
from odenets.training import data
from odenets.training.loop import fit
from tests.odenets.networks import Calling, Unit


def network(parts, depth=1, **options):
    torch.manual_seed(0)
    normalize = models.Normalize(list(parts.train.mean), list(parts.train.std))
    return models.small_network(features=8, depth=depth, normalize=normalize, **options)


def settings(parts, **changes):
    return {
        "batches": data.Batches(parts.train, 64, seed=0),
        "epochs": 4,
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "lr_scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4),
        "validation": data.Batches(parts.validation, 500),
    } | changes


def trained(parts, epochs=2, **changes):
    net = network(parts, depth=2, solver="euler", h=1.0).to(parts.train.x.dtype)
    plain = {"optimizer": partial(torch.optim.SGD, lr=0.02), "lr_scheduler": None}
    return fit(net, **settings(parts, epochs=epochs, **plain | changes))


def in_double(parts):
    """What two ways of one training make of these is the same, whatever order sums are taken in."""
    return replace(parts, **{name: replace(part, x=part.x.double()) for name, part in vars(parts).items()})


IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TWENTY = data.TensorData(IMAGES, torch.arange(20) % 10)
TENS = data.Batches(TWENTY, 10, seed=0)


def tiny(dtype=torch.float32, **options):
    torch.manual_seed(1)
    options = {"features": 4, "solver": "euler", "h": 1.0, "depth": 2} | options
    return models.small_network(**options).to(dtype)


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def on_cpu(precision):
    return Fabric(accelerator="cpu", devices=1, precision=precision)


class Restless(nn.Module):
    """Draws and counts in whatever mode, and fails where it is told to."""

    def __init__(self, fails=False):
        super().__init__()
        self.fails = fails
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls + 1
        if self.fails:
            raise KeyError("failed")
        return F.dropout(x, 0.5)


def answering(how):
    """A residual network whose output is a function of the logits."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Unit(4, 4), nn.Flatten(), nn.Linear(144, 10))
    return Calling(lambda m, x: how(m.model(x)), model=model)


class Migrating(nn.Linear):
    """Version 2 of a layer, whose weights were half as large before."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = 2 * state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
