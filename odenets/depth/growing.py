"""Growing at given epochs: the blocks doubled at half the step, or the stack of blocks copied on top.

No error decides: these are the rivals of :class:`~odenets.depth.AdaptiveDepth`, and share its contract. Copies take
the weights and the optimizer's state of their originals, and batch norms are recalibrated where inputs are given.

- Doubling (Chang et al. 2018, "Multi-level residual networks from dynamical systems view"): ``(theta_m, h_m)`` becomes
  two blocks ``(theta_m, h_m / 2)``. The total time stays, and the network computes nearly what it did.
- Stacking (Gong et al. 2019, "Efficient training of BERT by progressively stacking"): a copy of all blocks comes on top
  of them, each with the h of its original. The total time doubles, unless ``rescale`` halves every h.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast

from torch.optim import Optimizer

from odenets.blocks import Block
from odenets.depth.edits import Edit, check_makers, copied, editable, editing
from odenets.depth.optimizers import warn_of_unfollowed, warn_of_untrained
from odenets.depth.rule import flow_network
from odenets.errors import check_count, refuse
from odenets.inputs import inputs_of, samples_in
from odenets.network import Network
from odenets.normalization import recalibrate

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["Doubling", "Stacking", "double", "stack"]


def double(network: Network, optimizer: Optimizer | None = None) -> list[Edit]:
    """Make two blocks of every block, each with half of its step size; the total time stays.

    Args:
        network: changed in place: twice as many blocks.
        optimizer: its state follows the blocks, as for :func:`adapt_depth`.

    Returns:
        The edits, whose error is NaN, since none decides. Batch norms keep the statistics of their originals: see
        :func:`odenets.recalibrate`.

    Raises:
        TypeError: a network without flows.
        ValueError: a flow is a neural ODE, shared, used twice, or has no field yet; weights are not finite; or the
            optimizer is of another network, or keeps state that is not of one parameter (LBFGS).

    Warns:
        UserWarning: an optimizer that is not given holds parameters of the network, and not all of them any more.

    >>> from odenets.models import points_network
    >>> network = points_network(solver="euler", depth=2, total_time=1.0)
    >>> print(*double(network), network.h, sep=", ")
    flow 0 block 0: duplicated, h 0.5 -> 0.25, flow 0 block 1: duplicated, h 0.5 -> 0.25, (0.25, 0.25, 0.25, 0.25)
    """
    return _grow(network, optimizer, "duplicate", 0.5)


def stack(network: Network, optimizer: Optimizer | None = None, *, rescale: bool = False) -> list[Edit]:
    """Put a copy of all blocks of a flow on top of them.

    Args:
        network: changed in place: twice as many blocks.
        optimizer: its state follows the blocks, as for :func:`adapt_depth`.
        rescale: whether every step size is halved, so that the total time stays; otherwise it doubles.

    Returns:
        The edits. Batch norms keep the statistics of their originals: see :func:`odenets.recalibrate`.

    Raises:
        TypeError, ValueError: as :func:`double`.

    Warns:
        UserWarning: as :func:`double`.

    >>> from odenets.models import points_network
    >>> network = points_network(solver="euler", depth=1, total_time=1.0)
    >>> print(*stack(network), network.h, sep=", ")
    flow 0 block 0: copied on top, h 1 -> 1, (1.0, 1.0)
    """
    return _grow(network, optimizer, "stack", 0.5 if rescale else 1.0)


class _Growing:
    """Grows a network after some epochs, as a subclass says."""

    edits = True

    def __init__(
        self,
        epochs: Collection[int],
        *,
        restart: bool = False,
        recalibration: Callable[[], Iterable[Any]] | None = None,
        **unknown: Any,
    ) -> None:
        refuse(type(self).__name__, unknown, {"rescale": "of Stacking: Doubling halves every step as it is"})
        if isinstance(epochs, str) or not isinstance(epochs, Collection):
            raise TypeError(
                f"epochs must hold the epochs after which the network grows, got {epochs!r}: put it in a list"
            )
        for epoch in epochs:
            check_count("epochs", epoch, 1)
        if not epochs:
            raise ValueError("epochs must hold at least one, after which the network grows")
        if recalibration is not None:
            check_makers(recalibration=recalibration)
        self.epochs, self.restart, self.recalibration = frozenset(epochs), restart, recalibration
        self._begin: tuple[dict[str, Any], list[Any]] | None = None

    def before_training(self, training: Training) -> None:
        """Remember where the learning rates of the ``training`` begin, if they are to begin anew.

        Raises:
            ValueError: they are, and there is no scheduler.

        Warns:
            UserWarning: epochs in which the network is not trained after it has grown, or never grows.
        """
        warn_of_untrained(self, training, sorted(self.epochs))
        if not self.restart:
            return
        if training.lr_scheduler is None:
            raise ValueError("restart is of a scheduler, got restart=True without lr_scheduler")
        rates = [group["lr"] for group in training.optimizer.param_groups]
        self._begin = copy.deepcopy((training.lr_scheduler.state_dict(), rates))

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Grow the network of the ``training`` after the given epochs, and note the edits in the ``row``."""
        if training.epoch not in self.epochs:
            row.setdefault("edits", "")
            return
        network = flow_network(training.network)
        edits = self.grow(network, training.optimizer)
        row["edits"] = "; ".join(filter(None, [row.get("edits", ""), *map(str, edits)]))
        if self.recalibration is not None:
            training.check_evaluations += _recalibrate(network, self.recalibration)
        if self._begin is not None and training.lr_scheduler is not None:
            state, rates = copy.deepcopy(self._begin)
            training.lr_scheduler.load_state_dict(state)
            for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def grow(self, network: Network, optimizer: Optimizer) -> list[Edit]:
        """Grow once."""
        raise NotImplementedError


class Doubling(_Growing):
    """A callback of :func:`odenets.training.fit`: :func:`double` the blocks after some epochs.

    Of multi-level training: shallow first, and twice as deep at each level, over the same total time. The epoch's row
    holds ``row["edits"]`` as for :class:`~odenets.depth.AdaptiveDepth`.

    >>> from functools import partial
    >>> import torch
    >>> from odenets.models import points_network
    >>> from odenets.training import Batches, fit, points
    >>> sgd, cosine = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2)
    >>> training = fit(
    ...     points_network(solver="euler", total_time=1.0, depth=2),
    ...     Batches(points("moons", 40, seed=0), 20),
    ...     epochs=6,
    ...     optimizer=sgd,
    ...     lr_scheduler=cosine,
    ...     callbacks=[Doubling([2, 4], restart=True)],
    ... )
    >>> [(row["depth"], round(row["learning_rate"], 3)) for row in training.rows]
    [(2, 0.1), (2, 0.05), (4, 0.1), (4, 0.05), (8, 0.1), (8, 0.05)]

    Args:
        epochs: after each of which the network grows.
        restart: whether the scheduler of learning rates begins anew each time, at the rates of the first epoch.
        recalibration: a function that makes inputs anew at each call, as for :func:`adapt_depth`, on which batch norms
            are recalibrated; without it copies keep the statistics of their originals.

    Raises:
        TypeError: epochs that are no whole numbers, or no function.
        ValueError: no epoch, or one below 1.

    Warns:
        UserWarning: at the start of a training that ends before an epoch, or with it: what grows then is not trained.
    """

    def grow(self, network: Network, optimizer: Optimizer) -> list[Edit]:
        """Two blocks of every block of the ``network``, which the ``optimizer`` follows."""
        return double(network, optimizer)


class Stacking(_Growing):
    """A callback of :func:`odenets.training.fit`: :func:`stack` the blocks after some epochs.

    The epoch's row holds ``row["edits"]`` as for :class:`~odenets.depth.AdaptiveDepth`.

    >>> callback = Stacking([3, 6], rescale=True)
    >>> sorted(callback.epochs), callback.rescale
    ([3, 6], True)

    Args:
        epochs, restart, recalibration: as for :class:`Doubling`.
        rescale: as for :func:`stack`.

    Raises:
        TypeError, ValueError: as for :class:`Doubling`.

    Warns:
        UserWarning: as :class:`Doubling`.
    """

    def __init__(
        self,
        epochs: Collection[int],
        *,
        rescale: bool = False,
        restart: bool = False,
        recalibration: Callable[[], Iterable[Any]] | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(epochs, restart=restart, recalibration=recalibration, **unknown)
        self.rescale = rescale

    def grow(self, network: Network, optimizer: Optimizer) -> list[Edit]:
        """A copy of all blocks of the ``network`` on top of them, which the ``optimizer`` follows."""
        return stack(network, optimizer, rescale=self.rescale)


def _grow(
    network: Network, optimizer: Optimizer | None, kind: Literal["duplicate", "stack"], factor: float
) -> list[Edit]:
    """Twice as many blocks in every flow: copies behind their originals, or behind all; steps scaled by a factor."""
    network = editable(network, optimizer)
    for i, flow in enumerate(network.flows):
        if not len(flow.blocks):
            raise ValueError(f"flow {i} has no field yet: call the network once before it grows")
    before, edits = set(network.parameters()), list[Edit]()
    with editing(network, optimizer):
        for i, flow in enumerate(network.flows):
            blocks, twins = [cast(Block, block) for block in flow.blocks], list[Block]()
            for m, block in enumerate(blocks):
                edits.append(Edit(kind, i, m, math.nan, (block.h, block.h * factor)))
                block.h *= factor
                twins.append(copied(block, network, optimizer))
            pairs = zip(blocks, twins, strict=True)
            flow.replace_blocks([*chain(*pairs)] if kind == "duplicate" else [*blocks, *twins])
    if optimizer is None:
        warn_of_unfollowed(network, before)
    return edits


def _recalibrate(network: Network, make: Callable[[], Iterable[Any]]) -> int:
    """Recalibrate batch norms, if there are any, and tell what that costs: field evaluations, summed over samples."""
    samples = 0

    def counted() -> Iterable[Any]:
        nonlocal samples
        for x in inputs_of(make(), "recalibration"):
            samples += samples_in(x)
            yield x

    recalibrate(network, counted())
    return samples * sum(flow.evaluations_per_pass(closing=True) for flow in network.flows)
