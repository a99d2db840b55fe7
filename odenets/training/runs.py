"""A folder per run: configuration, metrics, summary, checkpoints; started again, it goes on where it stood."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import pickle
import platform
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from odenets.checkpoints import map_state
from odenets.files import write_atomically

STATE = "resume.pt"
"""The name of the resume state of a run."""

__all__ = ["STATE", "Run", "check_run", "environment", "processor", "read_config", "read_metrics", "read_summary"]


def environment() -> dict[str, Any]:
    """What computes: command, versions, device and threads."""
    versions = {}
    for name in ("odenets", "torch", "numpy", "torchvision", "scikit-learn", "lightning-fabric", "torchdiffeq"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the processor, or its kind where the system tells no name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Run:
    """A run folder with ``config.json``, ``metrics.csv``, ``summary.json`` and checkpoints.

    ``fit(..., run=Run(folder, config, resume=True))`` goes on where it stood after it was killed. NaN and infinity are
    written as Python's json reads them.

    Args:
        folder: where; made anew, or taken up with ``resume``.
        config: what the run is, plain values that JSON can hold; a resumed run must be given the same.
        resume: go on with what is there; start if there is nothing.

    Raises:
        TypeError: a configuration that is no mapping of plain values.
        FileExistsError: the folder holds a run and ``resume`` is false. Nothing in it is touched.
        ValueError: the run in the folder was made with another configuration.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     run = Run(Path(folder) / "first", {"seed": 0, "lr": 0.1})
    ...     run.log([{"epoch": 1, "train_loss": 0.5}])
    ...     run.finish({"accuracy": 0.9}, seeds=[0])
    ...     sorted(path.name for path in run.folder.iterdir())
    ['config.json', 'metrics.csv', 'summary.json']
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = Path(folder)
        if not isinstance(config, Mapping):
            raise TypeError(
                f'config must be a mapping, {{"seed": 0}} or {{}}, got {type(config).__name__}: '
                "dataclasses.asdict(config) makes one of a dataclass"
            )
        config = json.loads(_json(dict(config), _setting))
        # looked at first: where another process of a group begins the same run now, its config.json is there afterwards
        filled = self.folder.exists() and any(path.suffix != ".partial" for path in self.folder.iterdir())
        if (self.folder / "config.json").exists():
            if not resume:
                raise FileExistsError(
                    f"run folder {str(self.folder)!r} already holds a run: pass resume=True or choose another"
                )
            before = read_config(self.folder)
            changed = sorted(key for key in {*before, *config} if not _same(before, config, key))
            if changed:
                raise ValueError(
                    f"run folder {str(self.folder)!r} was made with another configuration: {changed} differ"
                )
        elif filled:
            raise FileExistsError(f"folder {str(self.folder)!r} is not empty and holds no run: choose another")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write("config.json", _json(config))

    @property
    def finished(self) -> bool:
        """Whether the summary has been written."""
        return (self.folder / "summary.json").exists()

    def environment(self) -> dict[str, Any]:
        """What the summary says about who computed it: command, versions, device, threads; a subclass may add to it."""
        return environment()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Write ``metrics.csv`` from all ``rows`` so far, atomically, so that it never disagrees with a checkpoint."""
        if not rows:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(map(_cell, columns))]
        lines += [",".join(_cell(row.get(key)) for key in columns) for row in rows]
        self.write("metrics.csv", ("\n".join(lines) + "\n").encode())

    def save_state(self, state: dict[str, Any], name: str = STATE) -> None:
        """Write a resume ``state`` under a ``name``, atomically: a kill leaves either the old one or the new one.

        NumPy's scalars, which a schedule may leave in it and which :meth:`load_state` does not trust, become Python's.

        Raises:
            TypeError: something else in it could not be loaded again.
        """
        loadable = map_state(_loadable, state)
        with _checksums():
            write_atomically(self.folder / name, lambda path: torch.save(loadable, path))

    def load_state(self, name: str = STATE) -> dict[str, Any] | None:
        """The last resume state of this ``name``, on the CPU, or None; only tensors and plain values are unpickled.

        Raises:
            ValueError: the file is damaged: it is empty, cut, or its checksums are others.
        """
        path = self.folder / name
        if not path.exists():
            return None
        with _undamaged(path):
            return torch.load(path, map_location="cpu", weights_only=True)

    def finish(self, results: Mapping[str, Any], *, seeds: list[int], started: float | None = None) -> None:
        """Write ``summary.json``: ``results``, ``seeds``, :meth:`environment`, seconds since ``started`` (a time)."""
        summary = {"results": dict(results), "seeds": seeds, "environment": self.environment()}
        if started is not None:
            summary["seconds"] = time.time() - started
        self.write("summary.json", _json(summary))

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder, of this ``name`` with the bytes ``data``, atomically."""
        write_atomically(self.folder / name, data)


def check_run(run: object, checkpoint: str = STATE) -> None:
    """That a run is one, and that there is one where its checkpoint has a name of its own.

    Raises:
        TypeError: it is none.
        ValueError: there is none, and a checkpoint in it.
    """
    if run is None and checkpoint != STATE:
        raise ValueError(
            f"checkpoint is the name of a file in the folder of run, got checkpoint={checkpoint!r} without run: "
            'run=Run("runs/first", config, resume=True) writes it'
        )
    if run is not None and (isinstance(run, type) or not callable(getattr(run, "load_state", None))):
        folder = str(run) if isinstance(run, str | Path) else "runs/first"
        raise TypeError(
            f'run must be an odenets.training.Run, got {run!r}: Run("{folder}", config, resume=True) begins or '
            "takes up one"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """A run's ``config.json``.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is empty or broken.
    """
    return _read(folder, "config.json", "run")


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
        ValueError: the file is empty or broken.
    """
    return _read(folder, "summary.json", "finished run", "; delete it and resume the run")


def _read(folder: str | Path, name: str, what: str, remedy: str = "") -> dict[str, Any]:
    path = Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"folder {str(folder)!r} holds no {what}: {name} is missing")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is empty or broken ({error}){remedy}") from error


def _json(value: Any, plain: Callable[[Any], Any] | None = None) -> bytes:
    """Indented, but a list of numbers on one line; strings hold no line breaks as JSON."""
    text = json.dumps(value, indent=1, default=plain or _plain)
    return re.sub(r"\[\n([^][{}\"]*?)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", text).encode()


@contextmanager
def _checksums() -> Iterator[None]:
    """``torch.save`` writes the CRC-32 of each part, as it does unless it is told not to."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Around the loading of what ``torch.save`` wrote: an archive, whose checksums loading ignores.

    Raises:
        ValueError: it is empty, cut, or other than it was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip() or next((i.filename for i in archive.infolist() if i.external_attr), None):
                raise zipfile.BadZipFile(f"its part {part} is not what was written")
        yield
    except (pickle.UnpicklingError, PermissionError, MemoryError):  # no plain values, or no damage
        raise
    except Exception as error:  # whatever broken headers make a reader raise
        what = (
            "it is empty"
            if not path.stat().st_size
            else next(iter(str(error).splitlines()), "") or type(error).__name__
        )
        raise ValueError(
            f"checkpoint {path} is damaged ({what}): put back a copy of it, or delete it to begin anew"
        ) from error


def _same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    """Whether two configurations agree in a value, also where it is NaN."""
    if key not in one or key not in other:
        return False
    return json.dumps(one[key], sort_keys=True) == json.dumps(other[key], sort_keys=True)


def _loadable(place: str, value: Any) -> Any:
    """A value of a state as it can be loaded without trust."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str, torch.Tensor, torch.nn.Parameter):
        return value
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            f"{place} must be a tensor or plain value to be saved and loaded again, got {type(value).__name__}"
        ) from error
    return value


def _setting(value: Any) -> Any:
    if isinstance(value, np.ndarray | torch.Tensor):
        raise TypeError(f"config must hold plain values, got {type(value).__name__} {tuple(value.shape)}: .tolist()")
    return _plain(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _cell(value: Any) -> str:
    if isinstance(value, np.generic | torch.Tensor):
        value = value.tolist()
    text = "" if value is None else float.__repr__(value) if isinstance(value, float) else str(value)
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n\r') else text
