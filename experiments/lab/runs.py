"""A folder per training or experiment: a run of the library that records commits, and what it was made in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.environment import environment
from odenets.training import runs

__all__ = ["Run"]


class Run(runs.Run):
    """A run folder of :class:`odenets.training.Run` whose summary states the commits of the code.

    Attributes:
        parts: commit and seconds of every part of the run, one unless it was interrupted; for the summary.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        super().__init__(folder, config, resume=resume)
        self.parts: list[dict[str, Any]] = []
        self._environment = environment()

    def begin(self) -> None:
        """Begin a part: of what was interrupted before, only what stands in its last checkpoint counts."""
        file, state = self.folder / "parts.json", self.folder / "resume.pt"
        self.parts = json.loads(file.read_text()) if file.exists() else []
        if self.parts:
            last = self.parts.pop()
            if state.exists() and (seconds := state.stat().st_mtime - last.pop("started")) > 0:
                self.parts.append(last | {"seconds": seconds})
        part = {"commit": self._environment["commit"], "modified": self._environment["modified"]}
        self.parts.append(part | {"started": time.time()})
        self.write(file.name, json.dumps(self.parts).encode())

    def environment(self) -> dict[str, Any]:
        """Commits, versions and device, and the parts."""
        parts = [dict(part) for part in self.parts]
        if parts and "started" in parts[-1]:
            parts[-1]["seconds"] = time.time() - parts[-1].pop("started")
        return self._environment | {"parts": parts}

    def finish(self, results: Mapping[str, Any], *, seeds: list[int], started: float | None = None) -> None:
        super().finish(results, seeds=seeds, started=started)
        (self.folder / "parts.json").unlink(missing_ok=True)
