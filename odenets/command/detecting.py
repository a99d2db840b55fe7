"""``odenets detect``: which images are foreign to a network, told by clean ones, as a table, files and a page."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from odenets.adapting import AdaptedModel
from odenets.command.devices import chosen, name_of
from odenets.command.images import Unreadable, batches, files_of
from odenets.command.mistakes import FAILED, Mistake, one_line, require
from odenets.command.networks import Model, build, recorder
from odenets.command.preparation import (
    Batch,
    check_writable,
    once,
    recording,
    seed_weights,
    transform_of,
    with_progress,
    without,
    written,
)
from odenets.command.tables import print_table
from odenets.detection import Assessment, Drift, Monitor

__all__ = ["Request", "show"]


@dataclass(frozen=True)
class Request:
    """The arguments of ``odenets detect``, whose help says what they are."""

    model: str
    images: Sequence[Path]
    clean: Sequence[Path] = ()
    load: Path | None = None
    foreign: Sequence[Path] = ()
    false_positive_rate: float | None = None
    weights: str | None = None
    options: Sequence[str] = ()
    blocks: str | None = None
    size: str | None = None
    gray: bool = False
    transform: str | None = None
    device: str = "auto"
    batch_size: int = 32
    seed: int = 0
    window: int = 200
    surest: int = 10
    csv: Path | None = None
    report: Path | None = None
    save: Path | None = None
    as_json: bool = False
    skip_unreadable: bool = False


class _Loader:
    """Images of files, as they are prepared for the model, and the files of those that could be read.

    Args:
        request: says how.
        model: which may know how.
    """

    def __init__(self, request: Request, model: Model) -> None:
        self.request = request
        self.transform, self.prepared, self.mode = transform_of(model, request.size, request.gray, request.transform)
        self.normalized = request.transform is not None or (model.prepare is not None and not request.gray)

    def load(self, files: Sequence[Path], read: list[Path]) -> Iterator[Tensor]:
        """The images of ``files``, a batch at a time; those that were ``read`` are added to the list."""
        left_out: list[Unreadable] | None = [] if self.request.skip_unreadable else None
        count = min(self.request.batch_size, len(files))
        loaded: Iterable[Batch] = batches(files, self.transform, count, self.mode, left_out)
        for some, x in with_progress(loaded, len(files), count):
            read += some
            yield x
        if left_out:
            without(files, left_out)


def show(request: Request) -> None:
    """Fit a monitor or load one, print what it says of the images, and write the files.

    Raises:
        Mistake: what the user can mend.
    """
    images, clean, foreign = (once(files_of(each)) for each in (request.images, request.clean, request.foreign))
    _check(request, {"IMAGES": images, "--foreign": foreign}, clean)
    device = chosen(request.device)
    seed_weights(request.seed)
    model = build(request.model, request.weights, request.options)
    model.network.to(device)
    loader, read = _Loader(request, model), []
    with _telling(model.name):
        monitor, origin, loaded = _monitor(request, model, loader, clean, loader.load(images, read), device)
        if request.report is None:
            assessment = monitor.check(loaded)
        else:
            assessment = _report(request, monitor, model, loaded, loader.load(foreign, []) if foreign else None, read)
        drift = monitor.drift(assessment.p_values, window=request.window)
        if request.save is not None:
            written(request.save, monitor.save)
    network = monitor.network.model if isinstance(monitor.network, AdaptedModel) else monitor.network
    where = f"{model.name} ({type(network).__name__}), {model.weights}, on {device} ({name_of(device)})"
    if request.as_json:
        typer.echo(json.dumps(_as_json(monitor, assessment, drift, read, where, origin), indent=2))
    else:
        typer.echo(f"{where}\n{origin}; {loader.prepared}")
        _print(request, monitor, assessment, drift, read)
    if request.csv is not None:
        written(request.csv, lambda path: _write_rows(path, assessment, read))
    if not request.as_json:
        _name_files(request)


def _check(request: Request, checked: Mapping[str, Sequence[Path]], clean: Sequence[Path]) -> None:
    """That the arguments go together, before anything is computed."""
    if (request.load is None) == (not clean):
        raise Mistake("either --clean names images that fit a monitor, or --load the file of one: give one of them")
    if request.load is not None and not request.load.is_file():
        raise Mistake(f"--load: no file {request.load}")
    if request.false_positive_rate is not None and not 0 < request.false_positive_rate < 1:
        raise Mistake(f"--false-positive-rate must lie in (0, 1), got {request.false_positive_rate}")
    if request.foreign and request.report is None:
        raise Mistake("--foreign is for the report: --report FOLDER")
    known = {os.path.realpath(file) for file in clean}
    for name, files in checked.items():
        if both := [file for file in files if os.path.realpath(file) in known]:
            raise Mistake(
                f"{len(both)} of {len(files)} {name} are among those of --clean ({both[0]}): what a monitor was fitted "
                "on says nothing of its false alarms"
            )
    check_writable({"--csv": request.csv, "--save": request.save})
    if request.report is not None:
        require("matplotlib", "pip install 'odenets[plot]'", "--report")
        if request.report.exists() and not request.report.is_dir():
            raise Mistake(f"--report must be a folder, got the file {request.report}")
        check_writable({"--report": request.report / "report.html"})


def _monitor(
    request: Request, model: Model, loader: _Loader, clean: Sequence[Path], images: Iterator[Tensor],
    device: torch.device,
) -> tuple[Monitor, str, Iterator[Tensor]]:  # fmt: skip
    """The monitor, fitted or loaded, where it is from, in words, and the images that it is to check."""

    def recording_network(first: Tensor) -> Any:
        with recording(model.name, first):
            return recorder(model, request.blocks, first[:2].to(device))

    if request.load is not None:
        first = next(images)
        monitor = Monitor.load(request.load, recording_network(first))
        if monitor.preparation not in ("", loader.prepared):
            differ = f"the monitor of {request.load} knows images {monitor.preparation}, these are {loader.prepared}"
            if monitor.preparation.startswith(("pixels in [0, 1]", "prepared ")):  # words of this command
                raise Mistake(f"--load: {differ}: give --size, --gray and --transform as where it was saved")
            typer.echo(differ, err=True)
        monitor.false_positive_rate = request.false_positive_rate or monitor.false_positive_rate
        origin = f"monitor of {request.load} with {len(monitor.calibration_scores)} calibration images"
        return monitor, origin, chain([first], images)
    read: list[Path] = []
    loaded = loader.load(clean, read)
    first = next(loaded)
    monitor = Monitor(
        recording_network(first),
        false_positive_rate=request.false_positive_rate or 0.05,
        normalized=loader.normalized,
        seed=abs(request.seed),
        preparation=loader.prepared,
    )
    monitor.fit(chain([first], loaded))
    n = len(monitor.calibration_scores)
    size = " x ".join(map(str, first.shape[1:]))
    return monitor, f"{len(read)} clean images of {size}, of which {n} calibrate a monitor", images


def _report(
    request: Request, monitor: Monitor, model: Model, loaded: Iterable[Tensor], foreign: Any, names: Sequence[Path]
) -> Assessment:
    from odenets.plotting import monitor_report

    assert request.report is not None
    try:
        return monitor_report(
            monitor, loaded, request.report, foreign=foreign, names=names,  # type: ignore[arg-type]  # as they print
            window=request.window, title=f"Images foreign to {model.name}",
        )  # fmt: skip
    except OSError as error:
        raise Mistake(f"{request.report} cannot be written: {one_line(error)}", FAILED) from error


@contextmanager
def _telling(name: str) -> Iterator[None]:
    """What a monitor refuses is a mistake, and so is what the network raises."""
    try:
        yield
    except Mistake:
        raise
    except (ValueError, TypeError) as error:
        raise Mistake(f"{name}: {one_line(error)}", FAILED) from error
    except Exception as error:
        less = " (--batch-size takes fewer at a time)" if isinstance(error, torch.OutOfMemoryError) else ""
        what = f"{type(error).__name__}: {one_line(error)}{less}"
        raise Mistake(f"{name} cannot be recorded on these images: {what}", FAILED) from error


def _print(request: Request, monitor: Monitor, assessment: Assessment, drift: Drift, files: Sequence[Path]) -> None:
    rate, flagged = 100 * monitor.false_positive_rate, int(assessment.flags.sum())
    low, high = (100 * end for end in monitor.interval())
    typer.echo(
        f"{flagged} of {len(files)} images flagged ({100 * assessment.flagged:.1f} %); of clean ones {rate:g} % are in "
        f"the mean, {low:.1f} to {high:.1f} % by this monitor (90 %)"
    )
    typer.echo(f"{drift}\n")
    rows = [
        [str(rank), str(files[i]), str(assessment.predicted[i]), f"{assessment.scores[i]:.4g}",
         f"{assessment.p_values[i]:.3g}", "flagged" if assessment.flags[i] else ""]
        for rank, i in enumerate(assessment.surest[: request.surest], 1)
    ]  # fmt: skip
    print_table(["", "image", "predicted", "score", "p-value", ""], rows)


def _rows(assessment: Assessment, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for i, file in enumerate(files):
        yield {
            "image": str(file),
            "predicted": int(assessment.predicted[i]),
            "score": float(assessment.scores[i]),
            "p_value": float(assessment.p_values[i]),
            "flagged": bool(assessment.flags[i]),
        }


def _as_json(
    monitor: Monitor, assessment: Assessment, drift: Drift, files: Sequence[Path], where: str,
    origin: str,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": where,
        "monitor": origin,
        "false_positive_rate": monitor.false_positive_rate,
        "interval": [*monitor.interval()],
        "threshold": monitor.threshold(),
        "flagged": int(assessment.flags.sum()),
        "drift": {
            "window": drift.window,
            "level": drift.level,
            "first": drift.first,
            "corrected_p_values": drift.corrected.tolist(),
        },
        "images": [*_rows(assessment, files)],
    }


def _write_rows(path: Path, assessment: Assessment, files: Sequence[Path]) -> None:
    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["image", "predicted", "score", "p_value", "flagged"])
        writer.writeheader()
        writer.writerows(_rows(assessment, files))


def _name_files(request: Request) -> None:
    """The files that were written, with what is in them."""
    files = {
        request.csv: "a row for each image",
        None if request.report is None else request.report / "report.html": "the report",
        request.save: "the monitor, for --load",
    }
    lines = [f"{file}: {what}" for file, what in files.items() if file is not None]
    if lines:
        typer.echo("\n" + "\n".join(lines))
