"""What each module minimizes: its loss and the action of its blocks, a proximal step in Wasserstein space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

from odenets.least_action import ActionPenalty, Cost, LeastAction
from odenets.training.objectives import CrossEntropy, Objective

__all__ = ["ModuleObjective", "greedy", "objectives_of", "trgl", "trgl_multipliers"]

ModuleObjective = Callable[[int, int], Objective]
"""Makes the objective of a module from its number, from 0, and how many there are."""


def greedy(task: Callable[[], Objective] = CrossEntropy) -> ModuleObjective:
    """The task alone: vanilla greedy learning (VanGL, [K24, section 4]); ``task`` makes the loss of each module.

    >>> greedy()(0, 4)  # the objective of the first of four modules
    CrossEntropy()
    """
    return lambda k, K: task()


def trgl(
    tau: float, task: Callable[[], Objective] = CrossEntropy, *, doubled: bool = True, cost: str = "action"
) -> ModuleObjective:
    """``L + C / (2 tau_k)``, the proximal step of module k [K24, equation 31].

    C is a mean over the D features of a state where [K24] has the squared norm, a sum: in its terms the step has size
    ``tau D``, so that one tau means steps of several sizes where the modules' states differ in dimension.

    Args:
        tau: of the first modules, positive; the smaller, the shorter the step.
        task: makes the loss L; cross-entropy if not given, ``partial(CrossEntropy, 0.1)`` as in [K24] on larger
            images.
        doubled: whether the modules of the second half have 2 tau; all have the same tau otherwise.
        cost: "action", "residue" or "norm", see :class:`~odenets.least_action.Cost`.

    Returns:
        What makes the objective of a module, from its number, from 0, and how many there are.

    Raises:
        ValueError: tau is not positive and finite, or an unknown cost.

    >>> make = trgl(tau=5.0)
    >>> make(0, 4).weight, make(3, 4).weight  # 1 / (2 tau), and half of it
    (0.1, 0.05)
    """
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    Cost(cost)  # type: ignore[arg-type]  # raises here what it would raise later

    def make(k: int, K: int) -> Objective:
        return ActionPenalty(1 / (2 * tau * (1 + (doubled and 2 * k >= K))), task(), cost=cost)

    return make


def trgl_multipliers(
    lambda0: float = 1.0,
    h: float = 1.0,
    every: int = 50,
    task: Callable[[], Objective] = CrossEntropy,
    *,
    growth: float = 0.0,
    weigh: Literal["divide", "multiply"] = "divide",
    cost: str = "action",
    update: Literal["before", "next", "after"] = "next",
) -> ModuleObjective:
    """Weights that grow with the loss that is left, lambda = 2 tau: ``lambda_k += h L`` every s steps.

    That is [K24, eq. 33].

    With label smoothing L never reaches 0, and lambda grows without bound. The cost is a mean over D features, see
    :func:`trgl`: lambda is that of [K24] divided by D.

    Args:
        lambda0: first lambda of the first module, positive.
        h: how fast lambda grows, positive.
        every: s, steps between two changes.
        task: makes the loss L.
        growth: module k, from 1, begins with ``lambda0 k^growth``.
        weigh: "divide" the cost, or "multiply" the loss, and with it the step, as [K24, eq. 33] is written.
        cost: "action", "residue" or "norm".
        update: "next", as [K24, eq. 33], ``lambda_{i+1} = lambda_i + h L(theta_{i+1}, x_{i+1})`` after every s-th
            step i: the step that follows begins with the change. "before", one step earlier, as the published code has
            it; or "after", see :class:`~odenets.least_action.LeastAction`.

    Returns:
        What makes the objective of a module, from its number, from 0, and how many there are.

    Raises:
        ValueError: arguments out of range.

    >>> make = trgl_multipliers(lambda0=2.0, growth=1.0)
    >>> make(0, 4).multiplier.item(), make(3, 4).multiplier.item()
    (2.0, 8.0)
    """
    options: dict[str, Any] = {"tau": h, "every": every, "cost": cost, "weigh": weigh, "update": update}
    LeastAction(lambda0=lambda0, **options)  # raises here what it would raise later

    def make(k: int, K: int) -> Objective:
        first = lambda0 * (k + 1) ** growth
        return LeastAction(task(), lambda0=first, **options)

    return make


def objectives_of(make: ModuleObjective, numbers: Iterable[int], K: int) -> list[Objective]:
    """The objectives of some of K modules.

    Raises:
        TypeError: it makes another thing.
        ValueError: modules share one that remembers something, a multiplier, which would be changed by each.
    """
    if isinstance(make, nn.Module | type) or not callable(make):
        got = make.__name__ if isinstance(make, type) else type(make).__name__
        of_one = f"{got}(...)" if not isinstance(make, nn.Module) or isinstance(make, Objective) else f"Task({got}())"
        raise TypeError(
            f"objective must be a function that makes one for each module, such as lambda k, K: {of_one}, got "
            f"{'the class' if isinstance(make, type) else 'a'} {got}"
        )
    if make in (greedy, trgl, trgl_multipliers):
        call = "trgl(tau=1.0)" if make is trgl else f"{make.__name__}()"
        raise TypeError(
            f"objective must be what makes one for each module, got {make.__name__} itself: call it, {call}"
        )
    objectives = [make(k, K) for k in numbers]
    for k, objective in enumerate(objectives):
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must make an odenets Objective of each module, got {objective!r}")
        if any(objective is other for other in objectives[:k]) and objective.state_dict():
            raise ValueError(
                f"objective must make a new {type(objective).__name__} for each module, got one for several: it "
                "remembers what is a module's own"
            )
    return objectives
