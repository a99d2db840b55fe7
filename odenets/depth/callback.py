"""AdaptiveDepth: the depth changes between the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from odenets.depth.edits import adapt_depth, not_finite_weights, refine
from odenets.depth.rule import DepthRule, flow_network

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["AdaptiveDepth"]


class AdaptiveDepth:
    """A training callback: apply a :class:`DepthRule` between epochs; every edit is written into the epoch's row.

    Where an epoch diverges, every block counts as too large: each is duplicated, and the epoch is trained again.

    Args:
        rule: the rule.
        inputs: makes the validation inputs anew at each call.
        every: epochs between two checks.
        until: no check after this epoch, so that the last edits are trained; None checks to the end.
        recalibration: makes inputs for batch norms, see :func:`adapt_depth`.
    """

    recovers = True
    edits = True

    def __init__(
        self,
        rule: DepthRule,
        inputs: Callable[[], Iterable[Tensor]],
        *,
        every: int = 1,
        until: int | None = None,
        recalibration: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.rule, self.inputs, self.every, self.until = rule, inputs, every, until
        self.recalibration = recalibration
        self._notes: list[str] = []

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Check, edit, and note errors and edits in the row."""
        network = flow_network(training.network)
        notes, self._notes = self._notes, []
        if training.epoch % self.every == 0 and (self.until is None or training.epoch <= self.until):
            report = adapt_depth(network, self.inputs, self.rule, training.optimizer, recalibration=self.recalibration)
            row["errors"] = " ".join(f"{e:.4g}" for flow in report.errors for e in flow)
            notes += [str(edit) for edit in report.edits]
            training.check_evaluations += report.evaluations
        row["edits"] = "; ".join(notes)

    def on_divergence(self, training: Training) -> bool:
        """Duplicate every block that the caps allow; nothing where weights are not finite, which it would not mend."""
        network = flow_network(training.network)
        if not_finite_weights(network):
            return False
        edits = refine(network, self.rule, training.optimizer)
        self._notes += [f"epoch {training.epoch + 1} diverged, {edit}" for edit in edits]
        return bool(edits)
