"""Loss and metric after each module, in one pass over data that leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from odenets.modes import evaluating, keeping_state
from odenets.training.evaluation import Evaluation, Totals
from odenets.training.metrics import Metric
from odenets.training.objectives import Objective
from odenets.training.sources import Source

if TYPE_CHECKING:
    from odenets.module_wise.modules import ModuleWise

__all__ = ["evaluate_modules"]


@torch.no_grad()
def evaluate_modules(
    network: ModuleWise, source: Source, metric: Metric | None, objectives: Mapping[int, Objective]
) -> dict[int, Evaluation]:
    """Loss and metric of some modules, by their numbers from 0, in eval mode; those behind the last are not called.

    Args:
        network: whose buffers, modes and random state are left as they were.
        source: data where the network is.
        metric: of outputs and targets, or None.
        objectives: of the modules, whose ``validation_loss`` is the loss.
    """
    totals = {k: Totals(objective, metric, source.title) for k, objective in objectives.items()}
    with keeping_state(network, *objectives.values()), evaluating(network, *objectives.values()):
        for inputs, y in source.in_order():
            state, *args = network.arguments(inputs)
            for k, module in enumerate(network.modules_in_order[: max(objectives) + 1]):
                if k not in objectives:
                    state = module.part(state, *args)
                    continue
                batch = ((state, *args) if args else state, y)
                output, state, records = module.forward_with_records(state, objectives[k].task.measures, tuple(args))
                totals[k].add(module, batch, output, records)
    values = {k: of_one.means() for k, of_one in totals.items()}
    return {
        k: Evaluation(loss, value if metric else None, metric.name if metric else "")
        for k, (loss, value) in values.items()
    }
