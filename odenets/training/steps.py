"""One step of the optimizer: a process' share of a batch, in parts, through the network as Fabric calls it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odenets.modes import total_dtype
from odenets.recording import Recording, Records
from odenets.training.objectives import after_step, check_loss, logits_and_labels, right_answers
from odenets.training.state import Training

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Stepper"]


class Stepper:
    """Takes steps of a training's optimizer, with the parameters that the network has when this is made.

    Options are those of :func:`odenets.training.fit`; ``validated`` says that the output must be logits.
    """

    def __init__(
        self,
        training: Training,
        fabric: Fabric,
        *,
        clip_norm: float | None,
        accumulate: int,
        compile: bool,
        validated: bool,
    ) -> None:
        self.network, self.objective, self.fabric = training.network, training.objective, fabric
        self.clip_norm, self.accumulate, self.validated = clip_norm, accumulate, validated
        recording = Recording(training.network, training.objective.measures, compile)
        self.module, self.optimizer = fabric.setup(recording, training.optimizer)
        # or Fabric would round outputs to the default dtype
        self._context = fabric.init_tensor if fabric.strategy.precision.precision == "64-true" else nullcontext

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step with this process' share of a batch: its summed loss, and how many are right."""
        whole, shares, fabric = len(x), self.fabric.world_size, self.fabric
        x, y = x[fabric.global_rank :: shares], y[fabric.global_rank :: shares]
        totals = torch.zeros(2, dtype=total_dtype(x.device), device=x.device)
        self.optimizer.zero_grad()
        size = -(-len(x) // self.accumulate)
        parts = list(zip(x.split(size), y.split(size), strict=True))
        for i, part in enumerate(parts, 1):
            with fabric.no_backward_sync(self.module, enabled=i < len(parts)):
                with self._context():
                    output, records, layout = self.module(part[0])
                if self.validated:
                    logits_and_labels(output, part[1])
                loss = self.objective.loss(self.network, part, output, Records(records, *layout))
                check_loss(loss, self.objective)
                fabric.backward(loss * (len(part[0]) * shares / whole))
            with torch.no_grad():
                totals += torch.stack([loss.detach().to(totals.dtype) * len(part[0]), right_answers(output, part[1])])
        if self.clip_norm is not None:
            fabric.clip_gradients(self.module, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        with fabric.autocast():
            after_step(self.objective, self.network, parts[-1])
        return totals
