"""The picture of the architecture: ``python docs/contributing/architecture.py``, drawn from the import contract.

Boxes are opaque and what is beside them is gray, so that one picture is read on light paper and on dark.
"""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "figures" / "architecture.png"
BESIDE = "#808080"
BLUE, RUST, GREEN = "#cfe2f7", "#f8dccb", "#d3ecda"
ROOMS = {  # of the import contract: its title, its color, and what some of its floors are for
    "networks": (
        "odenets: networks made of steps, and methods on their steps", RUST, {
            "plotting": "figures", "module_wise": "methods: each measures steps", "training": "the loop, objectives",
            "network": "flows in a row, encoder, head", "flow": "blocks with weights of their own; one field",
            "schemes": "steps that are no Runge-Kutta steps",
            "normalization": "what offers its steps: Recorder", "measures": "a step to a number for each sample",
        },
    ),
    "solves": (
        "solvers: numerics on tensors", BLUE, {
            "torchdiffeq": "a shell in its names", "integrate": "the one front door", "gradients": "with little memory",
            "batch_loop": "one step size, or one each", "step": "a step and its stages",
            "reductions": "numbers of a step", "methods": "tables by name",
        },
    ),
}  # fmt: skip


def floors(contract: str) -> list[list[str]]:
    """The layers of a contract, the upper ones import the lower ones."""
    parser = ConfigParser()
    parser.read(ROOT / ".importlinter")
    rows = parser[f"importlinter:contract:{contract}"]["layers"].split("\n")
    return [re.split(r"\s*[|:]\s*", row) for row in rows if row.strip() and "__" not in row]


def draw_box(axis: Axes, left: float, bottom: float, width: float, text: str, color: str) -> None:
    box = FancyBboxPatch(
        (left, bottom), width, 0.72, boxstyle="round,pad=0,rounding_size=0.12", facecolor=color, edgecolor="none"
    )
    axis.add_patch(box)
    axis.text(left + width / 2, bottom + 0.34, text, ha="center", va="center", color="#1c1c1c", fontsize=8.8)


def draw_room(axis: Axes, contract: str, left: float, width: float, top: float) -> None:
    """A column of floors, the highest first, and beside it what they are for."""
    title, color, notes = ROOMS[contract]
    axis.text(left, top + 0.25, title, color=BESIDE, fontsize=10.5, weight="bold", va="bottom")
    for i, names in enumerate(floors(contract)):
        bottom, share = top - 0.85 * (i + 1), width / len(names)
        for k, name in enumerate(names):
            draw_box(axis, left + k * share, bottom, share - 0.08, name, color)
        note = next((text for name, text in notes.items() if name in names), "")
        axis.text(left + width + 0.12, bottom + 0.34, note, color=BESIDE, fontsize=8.5, va="center")


def architecture() -> Figure:
    """The rooms, and what imports what."""
    height = 0.85 * max(len(floors(contract)) for contract in ROOMS)
    figure = Figure(figsize=(12, 0.42 * (height + 2.2)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(0, 23.4), ylim=(-height - 0.3, 2.2))
    draw_box(axis, 0.2, 1.3, 23, "experiments: one script each, on the harness in experiments/lab", GREEN)
    draw_room(axis, "networks", 0.2, 7.9, 0.1)
    draw_room(axis, "solves", 14.0, 5.9, 0.1)
    axis.annotate(
        "", (13.8, -height / 2), (12.7, -height / 2), arrowprops={"arrowstyle": "-|>", "color": BESIDE, "linewidth": 2}
    )
    axis.text(13.2, -height / 2 + 0.3, "imports", color=BESIDE, fontsize=9, ha="center")
    return figure


def contents() -> str:
    """The rooms in the picture, which its file names beside it."""
    return repr({contract: floors(contract) for contract in ROOMS})


if __name__ == "__main__":
    architecture().savefig(PICTURE, dpi=100, transparent=True, metadata={"Description": contents()})
