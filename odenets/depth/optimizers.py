"""An optimizer whose groups and state follow the blocks of a network that is edited, so that they are trained."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["adopt_copy", "check_held", "follow_network", "warn_of_unfollowed", "warn_of_untrained"]


def adopt_copy(optimizer: Optimizer, original: nn.Module, twin: nn.Module) -> None:
    """Put the twin's parameters into the groups of their originals, with copies of the state."""
    for p, q in zip(original.parameters(), twin.parameters(), strict=True):
        if p is q:
            continue  # it is of other blocks too
        q.grad = None
        group = next((group for group in optimizer.param_groups if any(p is r for r in group["params"])), None)
        if group is None:
            continue  # frozen: the optimizer does not hold it
        group["params"].append(q)
        if p in optimizer.state:
            optimizer.state[q] = copy.deepcopy(optimizer.state[p])


def check_held(optimizer: Optimizer, network: nn.Module) -> None:
    """That an optimizer is of the ``network`` whose blocks it is to follow.

    Raises:
        ValueError: it holds none of the parameters that train.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    trained = {p for p in network.parameters() if p.requires_grad}
    if trained and trained.isdisjoint(held):
        raise ValueError(
            f"optimizer must hold parameters of the network, got one of {len(held)} others: new blocks would not train"
        )


def follow_network(optimizer: Optimizer, network: nn.Module, others: set[Any]) -> None:
    """Forget parameters that are neither the network's nor ``others``, and sort each group as the network lists them.

    In that order a saved state fits an optimizer built anew on the edited network.
    """
    position: dict[Any, int] = {p: i for i, p in enumerate(network.parameters())}
    names = {p: name for name, p in network.named_parameters()}
    for group in optimizer.param_groups:
        held = dict(zip(group["params"], group.get("param_names", ()), strict=False))  # copies come unnamed at the end
        for p in group["params"]:
            if p not in position and p not in others:
                optimizer.state.pop(p, None)
        stay = [p for p in group["params"] if p in position or p in others]
        group["params"][:] = sorted(stay, key=lambda p: position.get(p, -1))
        if "param_names" in group:
            group["param_names"] = [{**held, **names}[p] for p in group["params"]]


def warn_of_unfollowed(network: nn.Module, before: set[nn.Parameter]) -> None:
    """Warn where an optimizer holds some of the parameters that an edited network had ``before``, and not the new ones.

    Warns:
        UserWarning: it does: the new ones would not train.
    """
    new = {p for p in network.parameters() if p.requires_grad} - before
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)] if new else []
    held = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    if held & before and (missing := len(new - held)):
        warnings.warn(
            f"{missing} parameters of new blocks are in no optimizer, and would not train: give the optimizer, "
            "adapt_depth(network, inputs, rule, optimizer), or build it anew after an edit",
            stacklevel=3,
        )


def warn_of_untrained(callback: object, training: Training, epochs: Iterable[int]) -> None:
    """Warn of ``epochs`` after which a ``callback`` edits the network, and which come last or never in a ``training``.

    Warns:
        UserWarning: there are any.
    """
    if training.epochs is not None and (late := [epoch for epoch in epochs if epoch >= training.epochs]):
        warnings.warn(
            f"{type(callback).__name__} acts after epochs {late}, of {training.epochs}: what it makes of the network "
            "then is not trained, or never made; take earlier epochs, or more of them",
            stacklevel=7,  # of who calls fit,
        )
