"""``odenets record``: the path of images through a network, as a table, a file of rows and a figure."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from odenets import measures, plotting
from odenets.adapting import AdaptedModel
from odenets.command.devices import chosen, name_of
from odenets.command.images import Unreadable, batches, files_of
from odenets.command.mistakes import FAILED, Mistake, near, require
from odenets.command.networks import build, function_of, recorder
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
from odenets.modes import device_of, evaluating
from odenets.records import Records
from solvers import Step

__all__ = ["Request", "h", "record_images", "show"]

USUAL = ("action", "residue", "cosine")
NAMED = (*USUAL, "error", "displacement", "square_norm")
FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Request:
    """The arguments of ``odenets record``, whose help says what they are."""

    model: str
    images: Sequence[Path]
    weights: str | None = None
    options: Sequence[str] = ()
    blocks: str | None = None
    measures: Sequence[str] = ()
    size: str | None = None
    gray: bool = False
    transform: str | None = None
    device: str = "auto"
    batch_size: int = 32
    seed: int = 0
    csv: Path | None = None
    figure: Path | None = None
    by_folder: bool = False
    skip_unreadable: bool = False


def show(request: Request) -> None:
    """Record, print the table, and write the files.

    Raises:
        Mistake: what the user can mend.
    """
    files, device, measured = once(files_of(request.images)), chosen(request.device), _measures(request.measures)
    _check_outputs(request)
    seed_weights(request.seed)
    model = build(request.model, request.weights, request.options)
    model.network.to(device)
    transform, prepared, mode = transform_of(model, request.size, request.gray, request.transform)
    count = min(request.batch_size, len(files))
    left_out: list[Unreadable] | None = [] if request.skip_unreadable else None
    loaded = with_progress(batches(files, transform, count, mode, left_out), len(files), count)
    first = next(loaded)
    with recording(model.name, first[1]):
        network = recorder(model, request.blocks, first[1][:2].to(device))
    with evaluating(network), torch.no_grad():
        records, shape = record_images(network, chain([first], loaded), measured, model.name)
    if left_out:
        files = without(files, left_out)
    size = " x ".join(map(str, shape))
    kind = type(network.model if isinstance(network, AdaptedModel) else network).__name__
    typer.echo(f"{model.name} ({kind}), {model.weights}, on {device} ({name_of(device)})")
    typer.echo(f"{len(files)} image{'s' * (len(files) > 1)} of {size}, {prepared}")
    by_layers = isinstance(network, AdaptedModel) and network.blocks[0].kind == "layer"
    rows = "layers that keep the shape, for nothing is added" if by_layers else "blocks"
    typer.echo(f"means over the images, a row for each of {len(records.blocks)} {rows}")
    typer.echo()
    _print(records)
    if request.csv is not None:
        typer.echo(f"\n{_write_rows(request.csv, files, records)}: a row for each image and block")
    if request.figure is not None:
        typer.echo(f"\n{_draw(request.figure, files, records, request.by_folder)}: blocks by images")


@measures.measure(closing=False)
def h(step: Step) -> Tensor:
    """The step size, for each sample."""
    return torch.as_tensor(step.h, device=step.x0.device).reshape(-1).expand(len(step.x0)).float()


def record_images(
    network: Any, loaded: Iterable[Batch], measured: Mapping[str, Any], name: str
) -> tuple[Records, tuple[int, ...]]:
    """The records of all images, of each block its step size h besides; and the shape of an image.

    Args:
        network: records its steps.
        loaded: batches of files and images.
        measured: measures by name; the usual ones if there are none: action, residue, cosine, and error where the
            method has one.
        name: of the network.

    Raises:
        Mistake: it cannot be recorded on such images, or takes other steps on each batch.
    """
    parts: list[Records] = []
    shape: tuple[int, ...] = ()
    for files, images in loaded:
        x = images.to(device_of(network))
        with recording(name, x):
            measured = measured or _usual(network, x)
            records = network.record(x, h=h, **measured)[1].map(Tensor.cpu)
        if parts and records.blocks != parts[0].blocks:
            raise Mistake(
                f"{name} takes {len(parts[0].blocks)} steps on the first images and {len(records.blocks)} on those "
                f"from {files[0]}: steps under error control differ by batch; --batch-size takes all at once",
                FAILED,
            )
        parts.append(records)
        shape = tuple(images.shape[1:])
    return Records({key: torch.cat([one[key] for one in parts], 1) for key in parts[0]}, *parts[0].layout), shape


def _usual(network: Any, x: Tensor) -> dict[str, Any]:
    """The measures that are not named: the error too, where all steps have one."""
    names = USUAL
    if not isinstance(network, AdaptedModel):  # whose steps are Euler's
        try:
            for step in network.steps(x[:1]):
                measures.error(step)
            names = *USUAL, "error"
        except ValueError:
            pass
    return {name: getattr(measures, name) for name in names}


def _measures(names: Sequence[str]) -> dict[str, Any]:
    """Measures by name, in order.

    Raises:
        Mistake: none has this name, or two have one.
    """
    by_name: dict[str, Any] = {}
    for name in names:
        short = name.rpartition(":")[2]
        if short in by_name:
            both = " and ".join(each for each in names if each.rpartition(":")[2] == short)
            raise Mistake(
                f"--measure: {both} are both called {short} and need names of their own: leave one out, or give the "
                "function another name"
            )
        if ":" in name:
            by_name[short] = function_of(name, "--measure")
        elif name in NAMED:
            by_name[name] = getattr(measures, name)
        else:
            raise Mistake(f"--measure must be {', '.join(NAMED)} or module:function, got {name}{near(name, NAMED)}")
    if "h" in by_name:
        raise Mistake("--measure: a function must not be named h, which is the step size")
    return by_name


def _check_outputs(request: Request) -> None:
    if request.figure is not None:
        if request.figure.suffix.lower() not in FIGURES:
            raise Mistake(f"--figure must end in {', '.join(FIGURES)}, got {request.figure}")
        require("matplotlib", "pip install 'odenets[plot]'", "--figure")
    elif request.by_folder:
        raise Mistake("--by-folder groups the images of a figure: --figure FILE.png")
    check_writable({"--csv": request.csv, "--figure": request.figure})


def _print(records: Records) -> None:
    """A row for each block; a line between flows."""
    means = {name: value.double().mean(1).tolist() for name, value in records.items()}
    rows = [[str(m), block, *(f"{means[name][m]:.4g}" for name in means)] for m, block in enumerate(records.blocks)]
    print_table(["", "block", *means], rows, sections=records.starts[1:])


def _write_rows(file: Path, files: Sequence[Path], records: Records) -> Path:
    values = {name: value.double().tolist() for name, value in records.items()}

    def write(path: Path) -> None:
        with path.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(["image", "block", "name", *values])
            for i, image in enumerate(files):
                for m, block in enumerate(records.blocks):
                    writer.writerow([image, m, block, *(value[m][i] for value in values.values())])

    return written(file, write)


def _draw(file: Path, files: Sequence[Path], records: Records, by_folder: bool) -> Path:
    labels = [image.parent.name for image in files] if by_folder else None
    figure = plotting.blocks_by_samples(records, [name for name in records if name != "h"], labels=labels)
    return written(file, lambda path: figure.savefig(path, format=file.suffix[1:].lower(), dpi=100))
