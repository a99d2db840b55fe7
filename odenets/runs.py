"""A folder per run: configuration, metrics, summary, checkpoints; started again, it goes on where it stood."""

from __future__ import annotations

import csv
import dataclasses
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

import numpy as np
import torch

__all__ = ["Run", "environment", "finished_trainings", "read_config", "read_metrics", "read_summary"]


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
    for package in ("odenets", "torch", "numpy", "torchvision", "scikit-learn", "lightning-fabric", "torchdiffeq"):
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
        config = json.loads(_json(dict(config)))
        # looked at first: where another process of a group begins the same run now, its config.json is there afterwards
        filled = self.folder.exists() and any(path.suffix != ".partial" for path in self.folder.iterdir())
        if (self.folder / "config.json").exists():
            if not resume:
                raise FileExistsError(
                    f"run folder {str(self.folder)!r} already holds a run: resume it (--resume) or choose another"
                )
            before = read_config(self.folder)
            if before != config:
                changed = sorted(key for key in {*before, *config} if before.get(key) != config.get(key))
                raise ValueError(
                    f"run folder {str(self.folder)!r} was made with another configuration: {changed} differ"
                )
        elif filled:
            raise FileExistsError(f"folder {str(self.folder)!r} is not empty and holds no run: choose another")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("config.json", _json(config))

    @property
    def finished(self) -> bool:
        """Whether the summary has been written."""
        return (self.folder / "summary.json").exists()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows logged so far, replacing the file atomically, so that it never disagrees with a checkpoint."""
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)]
        lines += [",".join(_cell(row.get(key)) for key in columns) for row in rows]
        self._write("metrics.csv", ("\n".join(lines) + "\n").encode())

    def save_state(self, state: dict[str, Any], name: str = "resume.pt") -> None:
        """Write a resume state atomically: a kill leaves either the old one or the new one.

        NumPy's scalars, which a schedule may leave in it and which :meth:`load_state` does not trust, become Python's.
        """
        temporary = self.folder / (name + ".partial")
        torch.save(_without_numpy(state), temporary)
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
        self._write("summary.json", _json(summary))

    def conclude(
        self,
        trainings: list[dict[str, Any]],
        keys: tuple[str, ...],
        rows: list[dict[str, Any]],
        table: str,
        verdict: list[str],
        *,
        started: float | None = None,
    ) -> str:
        """Close a run that is made of trainings in folders of their own; a second call changes no summary.

        Args:
            trainings: the results of each, its folder as ``name`` and its ``seed`` among them.
            keys: which of these tell its rows apart in the common ``metrics.csv``.
            rows, verdict: what was found, for the summary.
            table: the rows as text, for ``table.md`` with the verdict below.
            started: when the run began, in seconds since the epoch.

        Returns:
            Table, verdict and folder, to be shown.
        """
        text = table + "\n\n" + "\n".join(verdict) + "\n"
        self._write("table.md", text.encode())
        self.log([{k: r[k] for k in keys} | row for r in trainings for row in read_metrics(self.folder / r["name"])])
        if not self.finished:
            seeds = sorted({r["seed"] for r in trainings})
            self.finish({"rows": rows, "verdict": verdict}, seeds=seeds, started=started)
        return f"{text}\nrun folder: {self.folder}"

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / f"{name}.{os.getpid()}.partial"  # processes of a group may write the same file
        temporary.write_bytes(data)
        os.replace(temporary, self.folder / name)


def finished_trainings(folder: str | Path) -> list[Path]:
    """The folders of a run's finished trainings.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(path.parent for path in Path(folder).glob("*/summary.json"))
    if not found:
        raise FileNotFoundError(f"folder {str(folder)!r} holds no finished training")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """A run's ``config.json``.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"folder {str(folder)!r} holds no run: config.json is missing")
    return json.loads(path.read_text())


def read_metrics(folder: str | Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``; none if there is no such file."""
    path = Path(folder) / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_summary(folder: str | Path) -> dict[str, Any]:
    """A finished run's ``summary.json``.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"folder {str(folder)!r} holds no finished run: summary.json is missing")
    return json.loads(path.read_text())


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=_plain).encode()


def _without_numpy(value: Any) -> Any:
    """A state whose NumPy scalars are Python's."""
    if isinstance(value, dict):
        return {_without_numpy(key): _without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _cell(value: Any) -> str:
    text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text
