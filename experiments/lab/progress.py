"""A training under the progress bar of all."""

from __future__ import annotations

from typing import Any

from lab.workers import Report
from odenets.training.loop import Callback
from odenets.training.runs import Run
from odenets.training.state import Training

__all__ = ["Progress"]


class Progress(Callback):
    """Moves the bar on after each epoch, and at once past those that a checkpoint holds."""

    def __init__(self, report: Report, run: Run) -> None:
        self.report = report
        state = run.load_state()
        report(state["epoch"] if state else 0)

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """One epoch more."""
        self.report(1)
