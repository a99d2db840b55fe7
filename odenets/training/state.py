"""The state of a training: what callbacks see of it, and what a checkpoint holds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from odenets.checkpoints import map_state, restore_structure, structure
from odenets.modes import random_state, set_random_state
from odenets.training.callbacks import Callbacks
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.optimization import (
    MakeOptimizer,
    check_scheduler,
    load_optimizer,
    load_scheduler,
    make_optimizer,
    optimizer_state,
    scheduler_state,
)
from odenets.training.sharding import is_sharded, load_network, whole
from odenets.training.sources import Source

if TYPE_CHECKING:
    from lightning_fabric.plugins import Precision

__all__ = ["Training", "check_precision"]

NO_SETTINGS = ("params", "param_names", "initial_lr", "base_lrs", "foreach", "fused", "capturable", "differentiable")
"""What groups and schedulers hold besides: parameters, what follows from ``lr``, and ways to compute the same."""


@dataclass
class Training:
    """A training: what :func:`fit` returns, and what callbacks see of it; fit makes it.

    ``odenets.plotting`` draws its ``rows``.

    >>> from functools import partial
    >>> import torch
    >>> from odenets.models import points_network
    >>> from odenets.training import fit
    >>> network, sgd = points_network(depth=2), partial(torch.optim.SGD, lr=0.1)
    >>> training = fit(network, [(torch.rand(8, 2), torch.arange(8) % 2)], epochs=2, optimizer=sgd)
    >>> training.epoch, training.rows[-1]["learning_rate"]
    (2, 0.1)

    Attributes:
        network: being trained, a module and a :class:`~odenets.Recorder`.
        optimizer: of its parameters.
        lr_scheduler: of the optimizer; None without one.
        objective: what is minimized.
        epoch: epochs completed.
        epochs: how many there are to be, those before a resume too; None where nobody has said.
        rows: one dictionary of metrics per completed epoch.
        evaluations: field evaluations per sample, summed over all samples of all training steps so far.
        check_evaluations: the same for what callbacks measured besides.
        stop: a callback sets it to end the training after the epoch; a resumed training is then at its end too, unless
            EarlyStopping has more patience now.
        precision: Fabric's, which may scale losses by a factor that follows from earlier steps.
        source: the data, whose seeded samplers have a state.
        callbacks: that are kept in checkpoints.
    """

    network: Any
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    objective: Objective = field(default_factory=CrossEntropy)
    epoch: int = 0
    epochs: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    check_evaluations: int = 0
    stop: bool = False
    precision: Precision | None = None
    source: Source | None = None
    callbacks: Callbacks = field(default_factory=lambda: Callbacks(()))

    def __post_init__(self) -> None:
        self._made = _settings(self.optimizer, self.lr_scheduler)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the parameters, of which there are then always the same."""
        return is_sharded(self.network)

    def process_state(self) -> dict[str, Any]:
        """What is each process' own: random state, and that of its loader's samplers."""
        return random_state() | {"source": self.source.state_dict() if self.source else {}}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as whole tensors and plain values.

        Of a sharded network it is made by all processes together.
        """
        state = {
            "structure": structure(self.network),
            "network": self.network.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.network),
            "settings": self._made,
            "lr_scheduler": scheduler_state(self.lr_scheduler),
            "objective": self.objective.state_dict(),
            "precision": self.precision.state_dict() if self.precision else {},
            "callbacks": self.callbacks.state_dict(),
            "epoch": self.epoch,
            "rows": json.dumps(self.rows),
            "evaluations": self.evaluations,
            "check_evaluations": self.check_evaluations,
            "stop": self.stop and not self.callbacks.stopped,  # what these say follows from their own states
        } | self.process_state()
        return map_state(_whole, state) if self.sharded else state

    def snapshot(self) -> dict[str, Any]:
        """:meth:`state_dict` in tensors of its own, in the host's memory: training on does not change it."""
        return map_state(_copied, self.state_dict())

    def load_state_dict(self, state: dict[str, Any], optimizer: MakeOptimizer, place: str = "") -> None:
        """Take up :meth:`state_dict`: blocks first, then the optimizer on their parameters.

        Args:
            state: that of this process.
            optimizer: makes the optimizer anew where there are other parameters now.
            place: of the checkpoint, for the warning.

        Raises:
            ValueError: weights of another network or precision, another objective or optimizer, other callbacks or
                generators, another scheduler, or one on one side only.

        Warns:
            UserWarning: optimizer or scheduler were made with other numbers, which do not hold.
        """
        check_scheduler(self.lr_scheduler, state["lr_scheduler"])
        restore_structure(self.network, state["structure"])
        check_precision(self.network, state["network"])
        with _of_checkpoint("network", self.network, state["network"]):
            load_network(self.network, state["network"])
        held = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        fresh = make_optimizer(optimizer, self.network.parameters())
        if held != [[id(p) for p in group["params"]] for group in fresh.param_groups]:
            self.optimizer.param_groups[:] = fresh.param_groups
            self.optimizer.state.clear()
        load_optimizer(self.optimizer, self.network, state["optimizer"])
        load_scheduler(self.lr_scheduler, state["lr_scheduler"])
        with _of_checkpoint("objective", self.objective, state["objective"]):
            self.objective.load_state_dict(state["objective"])
        if self.precision and state.get("precision"):
            self.precision.load_state_dict(state["precision"])
        self.callbacks.load_state_dict(state["callbacks"])
        self.epoch, self.stop = state["epoch"], state["stop"] or self.callbacks.stopped
        self.rows = json.loads(state["rows"])
        self.evaluations, self.check_evaluations = state["evaluations"], state["check_evaluations"]
        if self.source is not None:
            self.source.load_state_dict(state["source"])
        set_random_state(state)
        self._warn_of_settings(state.get("settings", {}), place)

    def _warn_of_settings(self, begun: Mapping[str, Any], place: str) -> None:
        made = self._made
        changed = [key for key in made if key in begun and json.dumps(made[key]) != json.dumps(begun[key])]
        if changed:
            which = ", ".join(f"{key}={made[key]} where it has {begun[key]}" for key in changed)
            warnings.warn(
                f"{place}optimizer and lr_scheduler go on with what they began with, got {which}: begin anew in "
                "another folder, or let a callback change training.optimizer.param_groups",
                stacklevel=6,
            )
        self._made = {**made, **begun}  # which hold


def _settings(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """The numbers that an optimizer and its scheduler are made with."""
    made: dict[str, Any] = {}
    groups = optimizer.param_groups
    for i, group in enumerate(groups):
        where = f" of group {i}" if len(groups) > 1 else ""
        made |= {f"{key}{where}": value for key, value in group.items() if key not in NO_SETTINGS}
    of_scheduler = {} if scheduler is None else scheduler.state_dict()
    made |= {key: value for key, value in of_scheduler.items() if not (key in NO_SETTINGS or key.startswith("_"))}
    made = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in made.items()}
    return {key: [*value] if isinstance(value, tuple) else value for key, value in made.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


@contextmanager
def _of_checkpoint(what: str, module: nn.Module, saved: Mapping[str, Any]) -> Iterator[None]:
    """Say what differs where a module does not take a state."""
    try:
        yield
    except RuntimeError as error:
        here = module.state_dict()
        shapes = [
            f"{name} is {tuple(saved[name].shape)} there and {tuple(value.shape)} here"
            for name, value in here.items()
            if isinstance(value, Tensor) and isinstance(saved.get(name), Tensor) and saved[name].shape != value.shape
        ]
        only = [("only it has", saved.keys() - here.keys()), ("it lacks", here.keys() - saved.keys())]
        found = [f"{how} {', '.join(sorted(names)[:3])}" for how, names in only if names] + shapes[:3]
        kind = type(module).__name__
        raise ValueError(f"{what} must be that of the checkpoint, got a {kind}: {'; '.join(found) or error}") from error


def _copied(place: str, value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _whole(place: str, value: Any) -> Any:
    return whole(value.detach()) if isinstance(value, Tensor) else value


def check_precision(network: nn.Module, state: Mapping[str, Any]) -> None:
    """That saved weights have the network's dtypes: loading them would round, or feign a precision they have not.

    Raises:
        ValueError: they have not.
    """
    for name, value in network.state_dict().items():
        saved = state.get(name)
        if isinstance(value, Tensor) and isinstance(saved, Tensor) and saved.dtype != value.dtype:
            raise ValueError(
                f"the network must have the precision of the checkpoint, in which {name} is {saved.dtype}, got "
                f"{value.dtype}: train on with the precision that it was begun with"
            )
