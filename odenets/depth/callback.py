"""AdaptiveDepth: the depth changes between the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from odenets.depth.edits import adapt_depth, check_makers, not_finite_weights, refine
from odenets.depth.rule import DepthRule, check_rule, flow_network
from odenets.errors import check_count

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["AdaptiveDepth"]


class AdaptiveDepth:
    """A callback of :func:`odenets.training.fit`: apply a :class:`DepthRule` between epochs.

    Errors and edits are written into the epoch's row, ``row["errors"]`` and ``row["edits"]``, as text. Where an epoch
    diverges, every block counts as too large: each is duplicated, and the epoch is trained again.

    Args:
        rule: when to add and remove blocks.
        inputs: a function that makes the validation inputs anew at each call, an iterable of tensors ``(B, ...)``, such
            as ``Batches(data, 100).inputs``.
        every: epochs between two checks.
        until: no check after this epoch, so that the last edits are trained; None checks to the end.
        recalibration: a function that makes inputs for batch norms, see :func:`adapt_depth`.

    Raises:
        TypeError: no :class:`DepthRule`, no functions, or ``every`` or ``until`` that is no whole number.
        ValueError: ``every`` below 1, or ``until`` below ``every``, so that there would be no check.
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
        check_rule(rule)
        check_makers(inputs=inputs, recalibration=recalibration or inputs)
        check_count("every", every, 1)
        if until is not None:
            check_count("until", until, every)  # or there is no check
        self.rule, self.inputs, self.every, self.until = rule, inputs, every, until
        self.recalibration = recalibration
        self._notes: list[str] = []

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Check and edit the network of the ``training``, and note errors and edits in the ``row``."""
        network = flow_network(training.network)
        notes, self._notes = self._notes, []
        if training.epoch % self.every == 0 and (self.until is None or training.epoch <= self.until):
            report = adapt_depth(network, self.inputs, self.rule, training.optimizer, recalibration=self.recalibration)
            row["errors"] = " ".join(f"{e:.4g}" for flow in report.errors for e in flow)
            notes += [str(edit) for edit in report.edits]
            training.check_evaluations += report.evaluations
        row["edits"] = "; ".join(notes)

    def on_divergence(self, training: Training) -> bool:
        """Duplicate every block that the caps allow, and say of the ``training`` whether that may help.

        Nothing where weights are not finite, which it would not mend.
        """
        network = flow_network(training.network)
        if not_finite_weights(network):
            return False
        edits = refine(network, self.rule, training.optimizer)
        self._notes += [f"epoch {training.epoch + 1} diverged, {edit}" for edit in edits]
        return bool(edits)
