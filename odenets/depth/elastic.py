"""Elastic depth: the loss at random coarsenings of a network, so that fewer blocks do its work too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets.errors import check_count, check_number
from odenets.groups import Group, place_of
from odenets.recording import Records, record, unwrapped
from odenets.regrouping import coarsened, flows_of
from odenets.training.checks import check_task
from odenets.training.objectives import Batch, CrossEntropy, Objective

__all__ = ["ElasticDepth", "random_groups"]


class ElasticDepth(Objective):
    """``whole * L + coarse * mean L_k``: the loss of a task at the full depth, and at random coarsenings beside it.

    A coarsening halves the depth of every flow one time or several, by as many halvings for all: neighboring blocks
    become one step of their summed h, :func:`~odenets.depth.coarsened`. It takes a pass of its own, of the share of the
    cost that its depth has; batch norms take its batch's statistics and keep their running ones, which are those of the
    full depth.

    Args:
        task: what is to be solved, L, with or without the action; cross-entropy if not given.
        whole: weight of the loss at full depth. At 0 a loop of one's own takes no pass there; ``fit`` does in any case.
        coarse: weight of the mean loss at the coarsenings.
        passes: coarsenings drawn for a batch.
        stays: which block of a group stays, "first", "middle", "last", or one drawn at "random".

    Coarsenings are drawn by torch's generator of the CPU: a seed repeats them, and ``fit`` resumes them. ``fit`` counts
    the evaluations at full depth alone, and takes coarsenings in the precision of the weights.

    Raises:
        TypeError: a task that is no objective, or weights that are no numbers.
        ValueError: weights that are negative, not finite or both 0, or no pass.

    >>> import odenets
    >>> network, objective = odenets.models.small_network(depth=4), ElasticDepth()
    >>> loss = objective(network, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    >>> loss.backward(), network.depth
    (None, 4)
    """

    def __init__(
        self,
        task: Objective | None = None,
        *,
        whole: float = 1.0,
        coarse: float = 1.0,
        passes: int = 1,
        stays: Literal["first", "middle", "last", "random"] = "first",
    ) -> None:
        task = CrossEntropy() if task is None else task
        check_task(task)
        super().__init__(task.measures)
        self.task = task
        self.whole, self.coarse = check_number("whole", whole), check_number("coarse", coarse)
        weights = self.whole, self.coarse
        if not (all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)):
            raise ValueError(f"whole and coarse must be finite, not negative and not both 0, got {whole} and {coarse}")
        check_count("passes", passes, 1)
        if stays not in (known := ("first", "middle", "last", "random")):
            raise ValueError(f"stays must be one of {', '.join(map(repr, known))}, got {stays!r}")
        self.passes, self.stays = passes, stays

    @property
    def needs_second_forward(self) -> bool:
        """Whether the task does."""
        return self.task.needs_second_forward

    @property
    def counts_steps(self) -> bool:
        """Whether the task does."""
        return self.task.counts_steps

    @property
    def keeps_batch(self) -> bool:
        """Whether the task does."""
        return self.task.keeps_batch

    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """That of the task, with the ``network`` and the ``batch``."""
        self.task.after_step(network, batch)

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The task's loss of ``network``, ``batch``, ``output`` and ``records``, and that at coarsenings, a scalar.

        Raises:
            TypeError, ValueError: a network whose blocks cannot be merged, as :func:`~odenets.depth.at_depth` says it,
                or of one block a flow, where there is nothing to halve.
        """
        losses = [self.whole * self.task.loss(network, batch, output, records)] if self.whole else []
        inner = unwrapped(network)
        for _ in range(self.passes if self.coarse else 0):
            with coarsened(inner, random_groups(inner, self.stays)), _keeping_buffers(inner):
                output, records = record(inner, batch[0], self.measures)
            losses.append(self.coarse / self.passes * self.task.loss(network, batch, output, records))
        return torch.stack(losses).sum()

    def extra_repr(self) -> str:
        """Weights, passes and the block that stays."""
        return f"whole={self.whole:g}, coarse={self.coarse:g}, passes={self.passes}, stays={self.stays!r}"


def random_groups(network: nn.Module, stays: str = "first") -> list[list[Group]]:
    """A coarsening drawn by torch's generator: every flow is halved as many times, from once to down to one block.

    Args:
        network: whose blocks are merged.
        stays: as in :class:`ElasticDepth`.

    Returns:
        For each flow its groups.

    Raises:
        TypeError, ValueError: as :func:`~odenets.depth.at_depth`, or flows of one block alone.

    >>> import odenets
    >>> _ = torch.manual_seed(0)
    >>> random_groups(odenets.Flow(odenets.MLPField(2), depth=2))
    [[Group(first=0, last=2, stays=0, pieces=1)]]
    """
    depths = [flow.depth for flow in flows_of(network)]
    if max(depths) < 2:
        raise ValueError("network must have a flow of two blocks or more, whose depth can be halved, got depth 1 alone")
    most = math.ceil(math.log2(max(depths)))
    size = 2 ** (1 + int(torch.randint(most, ())))
    return [[_group(a, min(a + size, depth), stays) for a in range(0, depth, size)] for depth in depths]


def _group(first: int, last: int, stays: str) -> Group:
    if stays == "random":
        return Group(first, last, first + int(torch.randint(last - first, ())))
    return Group(first, last, place_of(stays, first, last))


@contextmanager
def _keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Meanwhile each buffer, such as a running statistic, is a copy of itself."""
    slots = [(m, name, b) for m in network.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for module, name, buffer in slots:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in slots:
            module._buffers[name] = buffer
