"""What pages quote: rows and sentences of committed results, how they were run, tables of benchmarks."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lab.results import Outcome, read_outcome
from lab.statistics import Interval, paired
from odenets.training.runs import read_config, read_summary

__all__ = [
    "ROOT", "Sentence", "benchmark", "command", "config", "detail", "difference", "elsewhere", "environment",
    "machine", "minutes", "row", "rows", "sentence", "share",
]  # fmt: skip

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results"
PAIR = re.compile(r"(-?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")
P_VALUE = re.compile(r"p = ([\d.]+(?:e-?\d+)?)")


@dataclass(frozen=True)
class Sentence:
    """A sentence of a verdict, which holds what the rows of an older summary do not.

    Attributes:
        text: of it.
        interval: the first in it.
        p: the p-value in it, or None.
    """

    text: str
    interval: Interval
    p: float | None


@cache
def outcome(result: str) -> tuple[Outcome, list[str]]:
    """A committed result and its verdict."""
    return read_outcome(RESULTS / result)


def config(result: str) -> dict[str, Any]:
    """The configuration of a result."""
    return read_config(RESULTS / result)


def environment(result: str) -> dict[str, Any]:
    """Commit, device, versions and seeds of a result."""
    summary = read_summary(RESULTS / result)
    return summary["environment"] | {"seeds": summary["seeds"], "seconds": summary["seconds"]}


def rows(result: str, **where: Any) -> list[dict[str, Any]]:
    """The rows of a result that hold these values, or one of them where a list is asked for.

    Raises:
        ValueError: no row does.
    """
    wanted = {name: value if isinstance(value, list | tuple) else [value] for name, value in where.items()}
    chosen = [r for r in outcome(result)[0].rows if all(r.get(name) in values for name, values in wanted.items())]
    if not chosen:
        raise ValueError(f"result {result!r} must have a row with {where}, it has none")
    return chosen


def row(result: str, **where: Any) -> dict[str, Any]:
    """The one row of a result that holds these values.

    Raises:
        ValueError: none does, or several.

    >>> f"{row('circles', table='19', method='lap', norm=False)['maximum']:.1f}"
    '82.0 ± 2.7'
    """
    chosen = rows(result, **where)
    if len(chosen) != 1:
        raise ValueError(f"where must name one row of result {result!r}, got {where}, which {len(chosen)} hold")
    return chosen[0]


def detail(result: str, name: str) -> Any:
    """What a result holds beside its rows, by name.

    >>> [attack["set"] for attack in detail("detection_pretrained_resnet56", "attacks")][:2]
    ['FGM 0.03', 'FGM 0.01']
    """
    return outcome(result)[0].detail(name)


def difference(one: dict[str, Any], other: dict[str, Any]) -> Interval:
    """The paired difference of the areas under the curve of two rows of as many splits.

    >>> near = {score: row("ood_resnet56", images="near", score=score) for score in ("MSP", "KNN")}
    >>> f"{difference(near['KNN'], near['MSP']):.1f}"
    '1.4 ± 0.2'
    """
    return paired(one["auroc"].values, other["auroc"].values)


def sentence(result: str, start: str) -> Sentence:
    """The one sentence of a verdict that begins so.

    Raises:
        ValueError: none does, or several.

    >>> sentence("detection_seen", "vanilla: trajectory and stages").p
    0.0026
    """
    texts = [text for text in outcome(result)[1] if text.startswith(start)]
    if len(texts) != 1:
        raise ValueError(f"start must begin one sentence of result {result!r}, got {start!r}, with {len(texts)}")
    (mean, half_width), *_ = PAIR.findall(texts[0]) or [("nan", "nan")]
    p = P_VALUE.search(texts[0])
    n = len(environment(result)["seeds"])
    return Sentence(texts[0], Interval(float(mean), float(half_width), n), float(p[1]) if p else None)


def command(result: str) -> str:
    """The command of a result, without its folders.

    >>> command("module_wise_mnist")
    'python experiments/module_wise.py --setting mnist-20-1 --folder DIR --sizes 150 --epochs 30'
    """
    words = " ".join(("python", environment(result)["command"]))
    words = re.sub(r" --(output|workers) \S+| --resume", "", words)
    words = re.sub(r"--folder \S+", "--folder DIR", words).replace(" data/", " DIR/")
    for value in config(result).values():
        for name in value if isinstance(value, list) else ():
            if " " in str(name):
                words = words.replace(f" {name}", f' "{name}"')
    return words


def minutes(result: str) -> str:
    """How long a result took on its machine; of a run that was resumed, what its summary or an older one tells.

    >>> minutes("circles"), minutes("detection_adaptive"), minutes("neural_ode")
    ('16', 'at least 19', '2')
    """
    run, older = environment(result), _elsewhere()["seconds"].get(result)
    seconds = older["value"] if older else run["seconds"]
    resumed = older["resumed"] if older else "--resume" in run["command"]
    text = f"{max(seconds / 60, 1):.0f}"
    return f"at least {text}" if resumed else text


def machine(result: str) -> str:
    """What a result was computed on, a processor with its threads.

    >>> machine("circles"), machine("small_data_mnist_protocol_400_500")
    ('AMD EPYC, 2 threads, torch 2.14.1', 'NVIDIA H200, torch 2.11.0')
    """
    run = environment(result)
    count = run["threads"]
    threads = "" if run["device"].startswith("NVIDIA") else f", {count} thread{'s' * (count > 1)}"
    return f"{run['device']}{threads}, torch {run['versions']['torch']}"


def elsewhere(group: str, name: str) -> Any:
    """A value that no committed result holds; its origin stands beside it in ``experiments/pages/elsewhere.toml``."""
    return _elsewhere()[group][name]["value"]


@cache
def _elsewhere() -> dict[str, Any]:
    return tomllib.loads((ROOT / "experiments/pages/elsewhere.toml").read_text())


def benchmark(name: str, number: int = 0) -> list[dict[str, str]]:
    """A table of ``benchmarks/results``, its rows by heading.

    >>> benchmark("module_wise")[-1]["K = 4"]
    '1.431'
    """
    text = (ROOT / f"benchmarks/results/{name}.md").read_text()
    tables = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    heading, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines())
    return [dict(zip(heading, line, strict=True)) for line in lines]


def share(part: float, whole: float) -> str:
    """A part of a whole in percent.

    >>> share(1, 3)
    '33 %'
    """
    return f"{100 * part / whole:.0f} %"
