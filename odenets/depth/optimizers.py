"""An optimizer whose groups and state follow the blocks of a network that is edited."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["adopt_copy", "follow_network", "warn_of_unfollowed"]


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
