"""A folder per run: configuration, metrics, summary, checkpoints; started again, it goes on where it stood."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Run", "environment"]


def environment() -> dict[str, Any]:
    """What made a figure: command, commit, versions, device."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", here, "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {}
    for package in ("odenets", "torch", "numpy", "torchvision", "scikit-learn", "lightning"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.argv),
        "commit": git.stdout.strip() or None,
        "modified": bool(dirty.stdout.strip()),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or "CPU"),
        "threads": torch.get_num_threads(),
    }


class Run:
    """A run folder with ``config.json``, ``metrics.csv``, ``summary.json`` and checkpoints.

    Args:
        folder: where; made anew, or taken up with ``resume``.
        config: what the run is, JSON-serialisable; a resumed run must be given the same.
        resume: go on with what is there; start if there is nothing.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is false. Nothing in it is touched.
        ValueError: the run in the folder was made with another configuration.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = Path(folder)
        config = json.loads(json.dumps(dict(config)))
        existing = self.folder / "config.json"
        if existing.exists():
            if not resume:
                raise FileExistsError(
                    f"run folder {str(self.folder)!r} already holds a run: resume it (--resume) or choose another"
                )
            before = json.loads(existing.read_text())
            if before != config:
                changed = sorted(key for key in {*before, *config} if before.get(key) != config.get(key))
                raise ValueError(
                    f"run folder {str(self.folder)!r} was made with another configuration: {changed} differ"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"folder {str(self.folder)!r} is not empty and holds no run: choose another")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("config.json", json.dumps(config, indent=1).encode())

    @property
    def finished(self) -> bool:
        """Whether the summary has been written."""
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What :meth:`finish` wrote."""
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows logged so far, replacing the file atomically, so that it never disagrees with a checkpoint."""
        if not rows:
            return
        lines = [",".join(rows[0])]
        lines += [",".join(_cell(row.get(key)) for key in rows[0]) for row in rows]
        self._write("metrics.csv", ("\n".join(lines) + "\n").encode())

    def save_state(self, state: dict[str, Any], name: str = "resume.pt") -> None:
        """Write a resume state atomically: a kill leaves either the old one or the new one."""
        temporary = self.folder / (name + ".partial")
        torch.save(state, temporary)
        os.replace(temporary, self.folder / name)

    def load_state(self, name: str = "resume.pt") -> dict[str, Any] | None:
        """The last resume state, or None; nothing but tensors and plain values is unpickled."""
        path = self.folder / name
        if not path.exists():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    def finish(self, results: Mapping[str, Any], *, seeds: list[int], started: float | None = None) -> None:
        """Write ``summary.json``: results, seeds and what made them."""
        summary = {"results": dict(results), "seeds": seeds, "environment": environment()}
        if started is not None:
            summary["seconds"] = time.time() - started
        self._write("summary.json", json.dumps(summary, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / (name + ".partial")
        temporary.write_bytes(data)
        os.replace(temporary, self.folder / name)


def _cell(value: Any) -> str:
    text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text
