"""Checkpoints of modules that train in different processes: a file for each module and epoch, in one folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odenets.training.runs import Run

__all__ = ["ModuleCheckpoints"]


@dataclass(frozen=True)
class ModuleCheckpoints:
    """The checkpoints of K modules, numbered from 0, in the folder of a run."""

    run: Run
    K: int

    def save(self, k: int, state: dict[str, Any]) -> None:
        """Write the state of a module after its ``state["epoch"]``."""
        self.run.save_state(state, f"module{k + 1}-epoch{state['epoch']}.pt")

    def load(self, k: int, epoch: int) -> dict[str, Any]:
        """The state of a module after an epoch."""
        state = self.run.load_state(f"module{k + 1}-epoch{epoch}.pt")
        assert state is not None
        return state

    def newest(self) -> int:
        """The newest epoch that all modules have completed, 0 if some have no checkpoint.

        Raises:
            ValueError: all have checkpoints, of no common epoch.
        """
        epochs = [set(self._epochs(k)) for k in range(self.K)]
        common = set.intersection(*epochs)
        if all(epochs) and not common:
            raise ValueError(f"the modules' checkpoints in {str(self.run.folder)!r} have no epoch in common")
        return max(common, default=0)

    def prune(self, own: Iterable[int]) -> None:
        """Delete those of some modules from before the newest epoch that all have completed, however far apart."""
        common = min(max(self._epochs(k), default=0) for k in range(self.K))
        for k in own:
            for epoch, path in self._epochs(k).items():
                if epoch < common:
                    path.unlink(missing_ok=True)

    def _epochs(self, k: int) -> dict[int, Path]:
        """The checkpoints of a module by epoch."""
        pattern = re.compile(rf"module{k + 1}-epoch(\d+)\.pt")
        matches = ((pattern.fullmatch(path.name), path) for path in self.run.folder.iterdir())
        return {int(match[1]): path for match, path in matches if match}
