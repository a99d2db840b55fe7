"""A folder per training or experiment: a run of the library that records commits and what it was made in."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import odenets
from odenets.training import runs

__all__ = ["Run", "environment"]


class Run(runs.Run):
    """A run folder of :class:`odenets.training.Run` whose summary states the commits of the code.

    Attributes:
        parts: commit and seconds of every part of the run, one unless it was interrupted; for the summary.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        try:
            super().__init__(folder, config, resume=resume)
        except FileExistsError as error:
            error.add_note("on the command line: --resume, or another --output")
            raise
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


def environment(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """:func:`odenets.training.runs.environment` and commits, None outside of repositories.

    ``commit`` is that of a folder's repository, here that of the experiments; ``modified`` tells whether tracked files
    differ from it, or Python files are not in it. Where the package odenets lies in a repository, ``package_commit`` is
    that one's, with "-dirty" where files differ.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    modified = None
    if commit is not None:
        files = _git(folder, "status", "--porcelain", "--untracked-files=all")
        modified = files is None or any(line[:2] != "??" or line.endswith(".py") for line in files.splitlines())
    here = Path(odenets.__file__).resolve()
    package = None
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        package = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return runs.environment() | {"commit": commit, "modified": modified, "package_commit": package}


def _git(folder: Path, *command: str) -> str | None:
    """What git answers for a folder; None where it fails or is not there."""
    names = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}  # which a hook sets, of another repository
    variables = {name: value for name, value in os.environ.items() if name not in names}
    try:
        done = subprocess.run(
            ["git", "-C", folder, *command], env=variables, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
