"""Results of trainings: in groups, and the settings that serve a group best."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["best_settings", "groups"]

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
