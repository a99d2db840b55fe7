"""Results of trainings: in groups, the settings that serve a group best, and what a finished run leaves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.statistics import Interval
from odenets.training.runs import read_metrics, read_summary

__all__ = ["Outcome", "best_settings", "groups", "read_outcome"]

Result = Mapping[str, Any]


def groups(results: Iterable[Result], *names: str) -> dict[tuple[Any, ...], list[Any]]:
    """Results by their values of some fields, in order of appearance.

    >>> groups([{"n": 1, "seed": 0}, {"n": 2, "seed": 0}, {"n": 1, "seed": 1}], "n")[1,]
    [{'n': 1, 'seed': 0}, {'n': 1, 'seed': 1}]
    """
    by_values: dict[tuple[Any, ...], list[Any]] = {}
    for result in results:
        by_values.setdefault(tuple(result[name] for name in names), []).append(result)
    return by_values


def best_settings(
    tuned: Iterable[Result],
    names: tuple[str, ...],
    *,
    within: tuple[str, ...],
    score: Callable[[Any], Iterable[float]],
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Per group the settings whose mean score is highest, the first of equals: the choice on validation data.

    Args:
        tuned: results of the trainings to choose from.
        names: fields that are chosen.
        within: fields that make the groups.
        score: values of a result on validation data, one or more, of which the mean over all seeds counts.

    Returns:
        By the values of ``within``, in order of appearance, those of ``names``.

    >>> tuned = [{"depth": 9, "rate": r, "right": [r]} for r in (0.1, 0.3, 0.2)]
    >>> best_settings(tuned, ("rate",), within=("depth",), score=lambda r: r["right"])
    {(9,): {'rate': 0.3}}
    """
    chosen = {}
    for group, results in groups(tuned, *within).items():
        scores = {
            settings: statistics.fmean([value for r in of for value in score(r)])
            for settings, of in groups(results, *names).items()
        }
        chosen[group] = dict(zip(names, max(scores, key=scores.__getitem__), strict=True))
    return chosen


@dataclass(frozen=True)
class Outcome:
    """A run as figures and verdict see it.

    Attributes:
        rows: of the table.
        folder: of the run.
        details: what figures need beside the rows.
    """

    rows: list[dict[str, Any]]
    folder: Path = Path()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the trainings that are reported, by folder; FileNotFoundError where there are none."""
        summaries = sorted(set(self.folder.rglob("summary.json")) - {self.folder / "summary.json"})
        if not summaries:
            raise FileNotFoundError(f"folder {str(self.folder)!r} holds no trainings (NAME/summary.json)")
        results = [read_summary(path.parent)["results"] for path in summaries]
        return [result for result in results if not result.get("tuning")]

    @property
    def metrics(self) -> list[dict[str, str]]:
        """Of the epochs of all trainings; FileNotFoundError where there are none."""
        self.file("metrics.csv")
        return read_metrics(self.folder)

    def file(self, name: str) -> Path:
        """A file of the run; FileNotFoundError where it is not there."""
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(f"folder {str(self.folder)!r} holds no {name}")
        return path

    def detail(self, name: str) -> Any:
        """What the summary holds beside the rows; FileNotFoundError where the run is older than that."""
        if name not in self.details:
            raise FileNotFoundError(f"summary.json in folder {str(self.folder)!r} holds no {name!r} beside its rows")
        return self.details[name]


def read_outcome(folder: Path) -> tuple[Outcome, list[str]]:
    """A finished run and its verdict.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    results = _with_intervals(read_summary(folder)["results"])
    rows, verdict = results.pop("rows"), results.pop("verdict", [])
    return Outcome(rows, folder, results), verdict


def _with_intervals(value: Any) -> Any:
    """JSON with its intervals as :class:`Interval`."""
    if isinstance(value, list):
        return [_with_intervals(each) for each in value]
    if not isinstance(value, dict):
        return value
    if {"mean", "half_width", "n"} <= value.keys() <= {"mean", "half_width", "n", "values"}:
        return Interval(value["mean"], value["half_width"], value["n"], tuple(value.get("values", ())))
    return {name: _with_intervals(each) for name, each in value.items()}
