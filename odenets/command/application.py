"""The subcommands and their options; what they do loads when one of them runs, so that help is there at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from odenets.command.mistakes import told

__all__ = ["app"]

app = typer.Typer(
    name="odenets",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,  # no boxes in a file
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps; auto: a CUDA device if there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        import odenets

        typer.echo(f"odenets {odenets.__version__}")
        raise typer.Exit


@app.callback()
def odenets_(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Residual networks as explicit Runge-Kutta integrators."""


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, devices and kernels, for a bug report.

    Which libraries are missing, with the lines that install them; which kernels a step uses, and why.
    """
    from odenets.command import information

    with told():
        information.show(as_json)


@app.command()
def record(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A classifier of torchvision (resnet18) or timm (convnext_atto, resnet50.a1_in1k), a network of "
            "odenets.models (small_network), or package.module:function that returns a network.",
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES", help="Image files; folders, with all in them that is not hidden. Each image counts once."
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DEFAULT|none|FILE",
            help="DEFAULT: those that torchvision or timm offer, downloaded once; one of their names; none: random "
            "ones; or a file of safetensors or a state dict of torch.save. DEFAULT, or none where nobody offers any.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="An argument of the model: num_classes=10."),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Its blocks, in place of those that odenets.adapt finds: layer1.0,layer1.1"),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            "-m",
            metavar="NAME",
            help="action, residue, cosine, error, displacement, square_norm, or module:function; "
            "once for each. The first three, and error where the method has one, if none is named.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="PIXELS", help="Of the images for the network: 224, or 224x320.")
    ] = None,
    gray: Annotated[bool, typer.Option("--gray", help="One channel.")] = False,
    transform: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION", help="module:function from a PIL image to a tensor (C, H, W), in place of all that."
        ),
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="File of a row for each image and block.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of a figure of blocks by images: .png, .pdf, .svg.")
    ] = None,
    by_folder: Annotated[bool, typer.Option("--by-folder", help="Group the figure's images by their folder.")] = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and say how many.")
    ] = False,
) -> None:
    """The path of images through a network.

    What each of its blocks does to them, as a table, a file of rows and a figure.
    """
    from odenets.command.pathway import Request, show

    with told():
        show(
            Request(
                model=model, images=images, weights=weights, options=option or [], blocks=blocks,
                measures=measure or [], size=size, gray=gray, transform=transform, device=device,
                batch_size=batch_size, seed=seed, csv=csv, figure=figure, by_folder=by_folder,
                skip_unreadable=skip_unreadable,
            )
        )  # fmt: skip


@app.command()
def detect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A classifier of torchvision or timm, a network of odenets.models, or package.module:function, as "
            "for record.",
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGES", help="Image files; folders, with all in them that is not hidden. Each image counts once."
        ),
    ],
    clean: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Clean images, new to the network, to which the monitor is fitted: a few hundred. Once for each "
            "folder or file.",
        ),
    ] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A monitor that --save wrote, in place of --clean.")
    ] = None,
    false_positive_rate: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="The share of clean images that may be flagged; 0.05, or that of --load."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DEFAULT|none|FILE",
            help="As for record: DEFAULT, none, or a file. DEFAULT, or none where nobody offers any.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="An argument of the model: num_classes=10."),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Its blocks, in place of those that odenets.adapt finds: layer1.0,layer1.1"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="PIXELS", help="Of the images for the network: 224, or 224x320.")
    ] = None,
    gray: Annotated[bool, typer.Option("--gray", help="One channel.")] = False,
    transform: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION", help="module:function from a PIL image to a tensor (C, H, W), in place of all that."
        ),
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of random weights, and of which clean images calibrate.")] = 0,
    window: Annotated[int, typer.Option(min=2, help="Images in a test of drift, in the order of their names.")] = 200,
    surest: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="File of a row for each image.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of a page with figures, report.html.")
    ] = None,
    foreign: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Images known to be foreign, for the report's detection rates."),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="File of the monitor, for --load.")] = None,
    as_json: AsJson = False,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be read, and say how many.")
    ] = False,
) -> None:
    """Images that are foreign to a network, told by clean ones.

    A monitor of the path that images take is fitted to clean ones; each image gets a p-value, and is flagged where that
    is at most the false-positive rate.
    """
    from odenets.command.detecting import Request, show

    with told():
        show(
            Request(
                model=model, images=images, clean=clean or [], load=load, foreign=foreign or [],
                false_positive_rate=false_positive_rate, weights=weights, options=option or [], blocks=blocks,
                size=size, gray=gray, transform=transform, device=device, batch_size=batch_size, seed=seed,
                window=window, surest=surest, csv=csv, report=report, save=save, as_json=as_json,
                skip_unreadable=skip_unreadable,
            )
        )  # fmt: skip


@app.command()
def bench(
    seconds: Annotated[
        float | None, typer.Option(min=0, help="About how long; 120, or 15 with --quick, if not given.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest field and three methods alone.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of torch on the CPU.")] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward, not forward alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """The speed of solvers on this machine.

    Their time over that of their field calls alone, as a table in Markdown; torchdiffeq and torchode beside, where
    they are installed.
    """
    from odenets.command import speeds

    with told():
        speeds.show(seconds, quick=quick, device=device, threads=threads, backward=backward, as_json=as_json)
