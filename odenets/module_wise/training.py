"""The state of a training of modules, and what a checkpoint of it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from odenets.checkpoints import check_methods, structure
from odenets.modes import random_state, set_random_state
from odenets.module_wise.modules import ModuleWise
from odenets.training.optimization import (
    check_scheduler,
    load_optimizer,
    load_scheduler,
    optimizer_state,
    scheduler_state,
)
from odenets.training.state import check_precision

__all__ = ["ModuleTraining"]


@dataclass
class ModuleTraining:
    """A training of modules: what :func:`fit_modules` returns.

    >>> from functools import partial
    >>> import torch
    >>> from odenets.models import points_network
    >>> from odenets.module_wise import fit_modules, split_into_modules
    >>> x, y = torch.rand(8, 2), torch.arange(8) % 2
    >>> network = split_into_modules(points_network(depth=4), 2, x)
    >>> sgd = partial(torch.optim.SGD, lr=0.1)
    >>> training = fit_modules(network, [(x, y)], epochs=3, optimizer=sgd)
    >>> training.done, [(row["epoch"], row["module"]) for row in training.rows[-2:]]
    (3, [(3, 1), (3, 2)])

    Attributes:
        network: being trained.
        objectives: of the modules; one, of the whole, where it is trained end to end.
        optimizers: of the same.
        lr_schedulers: of these, none if there are none.
        done: epochs completed, those of every module counted where they are trained one after another.
        rows: metrics, a dictionary per epoch and module.
    """

    network: ModuleWise
    objectives: nn.ModuleList
    optimizers: list[Optimizer]
    lr_schedulers: list[LRScheduler] = field(default_factory=list)
    done: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and plain values."""
        return {
            "structure": structure(self.network),
            "network": self.network.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizers": [optimizer_state(optimizer, self.network) for optimizer in self.optimizers],
            "lr_schedulers": [scheduler_state(scheduler) for scheduler in self.lr_schedulers],
            "done": self.done,
            "rows": json.dumps(self.rows),
        } | random_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the ``state`` of :meth:`state_dict`.

        Raises:
            ValueError: weights of another solver or precision, another optimizer, other learning-rate schedulers,
                or some on one side only.
        """
        if len(self.lr_schedulers) != len(state["lr_schedulers"]):
            raise ValueError(
                f"lr_scheduler must be that of the checkpoint, which has {len(state['lr_schedulers'])} learning-rate "
                f"schedulers, got {len(self.lr_schedulers)}"
            )
        for scheduler, saved in zip(self.lr_schedulers, state["lr_schedulers"], strict=True):
            check_scheduler(scheduler, saved)
        check_methods(self.network, state.get("structure", {}))
        check_precision(self.network, state["network"])
        self.network.load_state_dict(state["network"])
        self.objectives.load_state_dict(state["objectives"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, self.network, saved)
        for scheduler, saved in zip(self.lr_schedulers, state["lr_schedulers"], strict=True):
            load_scheduler(scheduler, saved)
        self.done, self.rows = state["done"], json.loads(state["rows"])
        set_random_state(state)
