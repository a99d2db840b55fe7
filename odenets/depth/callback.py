"""AdaptiveDepth: the depth changes between the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from odenets.depth.edits import adapt_depth, check_makers, not_finite_weights, refine
from odenets.depth.optimizers import warn_of_untrained
from odenets.depth.rule import DepthRule, check_rule, flow_network
from odenets.errors import check_count

if TYPE_CHECKING:
    from odenets.training.state import Training

__all__ = ["AdaptiveDepth"]


class AdaptiveDepth:
    """A callback of :func:`odenets.training.fit`: apply a :class:`DepthRule` between epochs.

    Where an epoch diverges, every block counts as too large: each is duplicated, and the epoch is trained again.

    The epoch's row, in ``training.rows`` and ``metrics.csv`` alike, holds text of a fixed form:

    - ``row["errors"]``: the error of each block before the edits, in the order of depth, numbers with a space between;
      only of epochs that were checked.
    - ``row["edits"]``: the edits after the epoch, with ``"; "`` between, as they print themselves; ``""`` for none. One
      of an epoch that is trained again begins with ``"epoch n diverged, "``.
    - ``row["h"]``, which every training has: the step size of each block during the epoch, numbers with a space
      between.

    >>> import torch
    >>> from odenets.models import points_network
    >>> from odenets.training import Batches, fit, points
    >>> data, sgd = points("moons", 40, seed=0), lambda parameters: torch.optim.SGD(parameters, lr=0.01)
    >>> callback = AdaptiveDepth(DepthRule(1e-9, max_depth=4), Batches(data, 40).inputs)
    >>> network = points_network(solver="bs23", total_time=1.0, depth=2)
    >>> row, last = fit(network, Batches(data, 20), epochs=2, optimizer=sgd, callbacks=[callback]).rows
    >>> row["h"], last["h"], len([float(error) for error in row["errors"].split()])
    ('0.5 0.5', '0.25 0.25 0.25 0.25', 2)
    >>> [edit.partition(",")[0] for edit in row["edits"].split("; ")], last["edits"]
    (['flow 0 block 0: duplicated', 'flow 0 block 1: duplicated'], '')

    Args:
        rule: when to add and remove blocks.
        inputs: a function that makes the validation inputs anew at each call, as :func:`adapt_depth` takes it.
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
        inputs: Callable[[], Iterable[Any]],
        *,
        every: int = 1,
        until: int | None = None,
        recalibration: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        check_rule(rule)
        check_makers(inputs=inputs, recalibration=recalibration or inputs)
        check_count("every", every, 1)
        if until is not None:
            check_count("until", until, every)  # or there is no check
        self.rule, self.inputs, self.every, self.until = rule, inputs, every, until
        self.recalibration = recalibration
        self._notes: list[str] = []

    def before_training(self, training: Training) -> None:
        """Warn of a ``training`` without a check.

        Warns:
            UserWarning: it ends before the first.
        """
        if training.epochs is not None and training.epochs < self.every:
            warn_of_untrained(self, training, [self.every])

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """Check and edit the network of the ``training``, and note errors and edits in the ``row``."""
        network = flow_network(training.network)
        notes, self._notes = self._notes, []
        if training.epoch % self.every == 0 and (self.until is None or training.epoch <= self.until):
            report = adapt_depth(network, self.inputs, self.rule, training.optimizer, recalibration=self.recalibration)
            row["errors"] = " ".join(f"{e:.4g}" for flow in report.errors for e in flow)
            notes += [str(edit) for edit in report.edits]
            training.check_evaluations += report.evaluations
        row["edits"] = "; ".join(filter(None, [row.get("edits", ""), *notes]))

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
