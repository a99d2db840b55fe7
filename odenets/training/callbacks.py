"""Callbacks: what acts between the epochs of a training, stops it, or keeps its best weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, Protocol

from odenets.checkpoints import map_state, restore_structure, structure
from odenets.errors import check_count
from odenets.training.sharding import load_network, whole

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["BestWeights", "Callback", "Callbacks", "EarlyStopping"]

Row = dict[str, Any]


class Callback(Protocol):
    """Acts between the epochs of :func:`fit`: what a callback of one's own may have.

    Only the methods that are needed are to be there, and a function ``(training, row)`` is a callback too. What it
    must remember beyond a kill belongs in ``training.rows``, or in ``state_dict()``, tensors and plain values, which
    ``load_state_dict(state)`` takes up: where it has both they are kept in checkpoints. What it remembers of one
    training is forgotten in :meth:`before_training`. ``training.stop = True`` ends the training after the epoch.

    >>> class Norm(Callback):
    ...     def after_epoch(self, training, row):  # one number more in training.rows
    ...         row["norm"] = sum(p.norm().item() for p in training.network.parameters())

    Attributes:
        recovers: whether :meth:`on_divergence` may help; the loop then keeps a copy of the state at each epoch's start.
        edits: whether it changes the parameters that there are, which a sharded network does not allow.
    """

    recovers: bool = False
    edits: bool = False

    def before_training(self, training: Training) -> None:
        """Called with the ``training`` once, before the first epoch and before a checkpoint is loaded."""

    def after_validation(self, training: Training, row: Row) -> None:
        """Called with the ``training`` and the epoch's metrics, its ``row``, before a callback changes the network."""

    def after_epoch(self, training: Training, row: Row) -> None:
        """Called with the ``training`` and the epoch's ``row``, to which it may add; it may edit the network."""

    def on_divergence(self, training: Training) -> bool:
        """Called when an epoch has diverged, with the ``training`` as before it; True trains the epoch again."""
        return False

    def after_training(self, training: Training) -> None:
        """Called with the ``training`` once after the last epoch, of one that is taken up when finished too."""


HOOKS = ("before_training", "after_validation", "after_epoch", "on_divergence", "after_training")

ELSEWHERE = {
    "before_training": ("on_fit_start", "on_train_start", "on_train_begin", "setup"),
    "after_validation": ("on_validation_end", "on_validation_epoch_end", "on_evaluate", "on_test_end"),
    "after_epoch": ("on_epoch_end", "on_train_epoch_end", "on_log", "epoch_end"),
    "after_training": ("on_fit_end", "on_train_end", "on_end", "teardown"),
}
"""Hooks by the names that they have in Lightning, Keras and Hugging Face's Trainer."""


class Callbacks:
    """Callbacks, called in their order.

    Raises:
        TypeError: no sequence, or one of something else than callbacks and functions, or a callback with a method that
            nothing calls: of a :class:`Callback` with no hook of its own, or under a name close to that of a hook.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
            raise TypeError(
                f"callbacks must be a sequence, got {type(callbacks).__name__}: put it in a list, callbacks=[...]"
            )
        for callback in callbacks:
            if isinstance(callback, type):
                raise TypeError(f"callbacks must hold instances, got the class {callback.__name__}: call it")
            if not (any(hasattr(callback, hook) for hook in HOOKS) or callable(callback)):
                raise TypeError(
                    f"callbacks must hold functions (training, row) or objects with one of {', '.join(HOOKS)}, got "
                    f"{type(callback).__name__}"
                )
            _check_hooks(callback)
        self._callbacks: list[Any] = list(callbacks)

    @property
    def recover(self) -> bool:
        """Whether any may help where an epoch diverges."""
        return any(getattr(callback, "recovers", False) for callback in self._callbacks)

    @property
    def stopped(self) -> bool:
        """Whether one of them says, by an attribute ``stopped``, that the training is at its end."""
        return any(getattr(callback, "stopped", False) for callback in self._callbacks)

    @property
    def edit(self) -> list[str]:
        """The classes of those that change which parameters there are."""
        return [type(callback).__name__ for callback in self._callbacks if getattr(callback, "edits", False)]

    def before_training(self, training: Training) -> None:
        """Each ``before_training``."""
        self._call("before_training", training)

    def after_epoch(self, training: Training, row: Row) -> None:
        """All ``after_validation``, then each ``after_epoch``."""
        self._call("after_validation", training, row)
        for callback in self._callbacks:
            if hasattr(callback, "after_epoch"):
                callback.after_epoch(training, row)
            elif not any(hasattr(callback, hook) for hook in HOOKS):
                callback(training, row)

    def on_divergence(self, training: Training) -> bool:
        """Whether one has helped; none is called after it."""
        return any(one.on_divergence(training) for one in self._callbacks if hasattr(one, "on_divergence"))

    def after_training(self, training: Training) -> None:
        """Each ``after_training``."""
        self._call("after_training", training)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self._callbacks:
            if (method := getattr(callback, hook, None)) is not None:
                method(*args)

    def state_dict(self) -> list[dict[str, Any]]:
        """The states of those that have one, in their order."""
        return [{"class": type(callback).__name__, "state": callback.state_dict()} for callback in self._stateful]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ValueError: it is of other callbacks.
        """
        saved, here = ([one["class"] for one in state], [type(callback).__name__ for callback in self._stateful])
        if saved != here:
            raise ValueError(f"callbacks must be those of the checkpoint, of which {saved} have a state, got {here}")
        for callback, one in zip(self._stateful, state, strict=True):
            callback.load_state_dict(one["state"])

    @property
    def _stateful(self) -> list[Any]:
        return [c for c in self._callbacks if hasattr(c, "state_dict") and hasattr(c, "load_state_dict")]


def _check_hooks(callback: Any) -> None:
    """That what a callback defines is called.

    Raises:
        TypeError: it is not.
    """
    bases = {Callback, _Watching}.intersection(type(callback).__mro__)
    classes = [one for one in type(callback).__mro__ if not bases or bases.intersection(one.__mro__)]
    own = {
        name for one in classes if one.__module__ != __name__ for name, value in vars(one).items() if callable(value)
    }
    others = sorted(name for name in own if not name.startswith("_") and name not in HOOKS)
    for name in others:
        elsewhere = [hook for hook, names in ELSEWHERE.items() if bases and name in names]
        if meant := elsewhere or get_close_matches(name, HOOKS, 1, 0.8):
            raise TypeError(
                f"callbacks: {type(callback).__name__} has {name}, which is never called: call it {meant[0]}"
            )
    if Callback in bases and not own.intersection(HOOKS) and (others or "__call__" in own):
        raise TypeError(
            f"callbacks: {type(callback).__name__} has {', '.join(others) or '__call__'}, which is never called: the "
            f"hooks are {', '.join(HOOKS)}"
        )


class _Watching:
    """Looks at a quantity of the rows, and at whether it is better than ever."""

    def __init__(self, quantity: str, mode: Literal["min", "max"] | None, min_delta: float = 0.0) -> None:
        if mode is None:
            mode = "max" if quantity.endswith("accuracy") else "min" if quantity.endswith("loss") else None
        if mode not in ("min", "max"):
            raise ValueError(
                "mode must be 'min' or 'max', and given where quantity is neither a loss nor an accuracy, got "
                f"{mode!r} for {quantity!r}"
            )
        if not min_delta >= 0:
            raise ValueError(f"min_delta must not be negative, got {min_delta}")
        self.quantity, self.mode, self.min_delta = quantity, mode, min_delta
        self._forget()

    def _forget(self) -> None:
        self.best = math.inf if self.mode == "min" else -math.inf
        self.epoch = 0

    def before_training(self, training: Training) -> None:
        """Forget what was seen of another ``training``."""
        self._forget()

    def improves(self, training: Training, row: Row) -> bool:
        """Whether the ``row`` of the ``training`` holds the best value so far, which is then remembered.

        Raises:
            ValueError: the row has no such quantity.
        """
        if self.quantity not in row:
            numbers = [name for name, value in row.items() if isinstance(value, int | float)]
            hint = ": give validation=" if self.quantity.startswith("validation") else ""
            raise ValueError(f"quantity must be one of the row, {numbers}, got {self.quantity!r}{hint}")
        value = float(row[self.quantity])
        gain = self.best - value if self.mode == "min" else value - self.best
        if not gain > self.min_delta:
            return False
        self.best, self.epoch = value, training.epoch
        return True


class EarlyStopping(_Watching):
    """Ends a training once a quantity has not become better for some epochs; a callback of :func:`fit`.

    Args:
        quantity: a number of the epoch's row; "validation_loss" is there with ``fit(..., validation=...)``.
        patience: so many epochs running without a better value end the training.
        mode: whether smaller ("min") or larger ("max") is better; by the quantity's name for a loss and an accuracy.
        min_delta: a value is better only if by more than this.

    Attributes:
        best: the best value; infinite before the first epoch.
        epoch: the epoch that it is of, from 1 on.

    Raises:
        TypeError: a patience that is no whole number.
        ValueError: arguments out of range, or, when an epoch ends, no such quantity in its row.

    >>> EarlyStopping("validation_accuracy", patience=3).mode
    'max'
    """

    def __init__(
        self,
        quantity: str = "validation_loss",
        *,
        patience: int = 5,
        mode: Literal["min", "max"] | None = None,
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(quantity, mode, min_delta)
        check_count("patience", patience, 1)
        self.patience = patience

    def _forget(self) -> None:
        super()._forget()
        self.waited = 0

    @property
    def stopped(self) -> bool:
        """Whether it has ended the training."""
        return self.waited >= self.patience

    def after_epoch(self, training: Training, row: Row) -> None:
        """Count the epoch, or begin to count anew where its ``row`` is better; sets ``training.stop``."""
        self.waited = 0 if self.improves(training, row) else self.waited + 1
        training.stop |= self.stopped

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with."""
        return {"best": self.best, "epoch": self.epoch, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the ``state`` of :meth:`state_dict`."""
        self.best, self.epoch, self.waited = state["best"], state["epoch"], state["waited"]


class BestWeights(_Watching):
    """Keeps a copy of the weights of the best epoch, with the blocks and step sizes that the network had in it.

    Args:
        quantity, mode: as for :class:`EarlyStopping`; of what the loop itself measures.
        restore: whether the network ends with those weights; otherwise :meth:`load_into` gives them to a network.

    Attributes:
        best: the best value; infinite before the first epoch.
        epoch: the epoch that it is of, from 1 on.
        weights: the network's state of that epoch, whole and in the host's memory; None before the first.

    Raises:
        ValueError: no mode where the quantity is neither a loss nor an accuracy, or, when an epoch ends, no such
            quantity in its row.

    >>> BestWeights("validation_accuracy", restore=False).best
    -inf
    """

    def __init__(
        self, quantity: str = "validation_loss", *, mode: Literal["min", "max"] | None = None, restore: bool = True
    ) -> None:
        super().__init__(quantity, mode)
        self.restore = restore

    def _forget(self) -> None:
        super()._forget()
        self.structure: dict[str, Any] | None = None
        self.weights: dict[str, Any] | None = None

    def after_validation(self, training: Training, row: Row) -> None:
        """Copy the weights of ``training.network`` if its ``row`` is the best, before a callback edits them."""
        if self.improves(training, row):
            self.structure = structure(training.network)
            self.weights = map_state(_copied, training.network.state_dict())

    def after_training(self, training: Training) -> None:
        """Give the network of the ``training`` its best weights, if it is to end with them."""
        if self.restore and self.weights is not None:
            self.load_into(training.network)

    def load_into(self, network: Any) -> None:
        """Give a ``network`` the blocks, step sizes and weights of the best epoch.

        Raises:
            ValueError: no epoch was trained, or another network.
        """
        if self.weights is None or self.structure is None:
            raise ValueError("no epoch was trained, of which there could be best weights")
        restore_structure(network, self.structure)
        load_network(network, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on with."""
        best = {"best": self.best, "epoch": self.epoch}
        return best | {"structure": self.structure, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the ``state`` of :meth:`state_dict`."""
        self.best, self.epoch = state["best"], state["epoch"]
        self.structure, self.weights = state["structure"], state["weights"]


def _copied(place: str, value: Any) -> Any:
    return whole(value.detach()).to("cpu", copy=True) if hasattr(value, "detach") else value
