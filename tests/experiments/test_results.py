"""Committed results: what is said of them can be computed again from the values of their seeds."""

import math
import re
from pathlib import Path

import pytest
from scipy import stats

from odenets.runs import read_summary

ROOT = Path(__file__).parents[2]
RESULTS = {path.parent.name: path.parent for path in sorted((ROOT / "experiments/results").glob("*/summary.json"))}
WITHOUT_VALUES = {  # trained before summaries held the values of the seeds
    *(),
}
PAIR = re.compile(r"(-?\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")


def rows_of(value):
    """All dictionaries in a summary that hold intervals."""
    if isinstance(value, dict):
        if any(is_interval(v) for v in value.values()):
            yield value
        for each in value.values():
            yield from rows_of(each)
    elif isinstance(value, list):
        if any(is_interval(v) for v in value):
            yield dict(enumerate(value))
        for each in value:
            yield from rows_of(each)


def is_interval(value):
    return isinstance(value, dict) and {"mean", "half_width", "n"} <= value.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_intervals_are_those_of_the_values_of_their_seeds(name):
    for row in rows_of(read_summary(RESULTS[name])["results"]):
        for key, interval in row.items():
            if not is_interval(interval) or key == "thesis":
                continue
            values = interval.get("values", [])
            if name in WITHOUT_VALUES and not values:
                continue
            assert len(values) == interval["n"], key
            assert interval["mean"] == pytest.approx(sum(values) / len(values), abs=1e-9), key
            if len(values) > 1:
                low, high = stats.t.interval(0.95, len(values) - 1, interval["mean"], stats.sem(values))
                expected = 0.0 if math.isnan(low) else (high - low) / 2  # no scatter, no interval
                assert interval["half_width"] == pytest.approx(expected, abs=1e-9), key


@pytest.mark.parametrize("name", RESULTS)
def test_p_values_are_those_of_the_paired_differences(name):
    for row in rows_of(read_summary(RESULTS[name])["results"]):
        for key in [key for key in row if isinstance(key, str) and (key == "p" or key.endswith("_p"))]:
            stem = key[:-1].removesuffix("_").removesuffix("difference")
            values = row[f"{stem}_difference".replace("__", "_").lstrip("_")].get("values", [])
            if name in WITHOUT_VALUES and not values:
                continue
            expected = stats.ttest_1samp(values, 0).pvalue if any(values) else 1.0
            assert row[key] == pytest.approx(expected, rel=1e-6), key
        if "correlation" in row and not (name in WITHOUT_VALUES and "values" not in row["accuracy"]):
            found = stats.pearsonr(row["log10_action"]["values"], row["accuracy"]["values"])
            assert row["correlation"] == pytest.approx([found.statistic, found.pvalue], rel=1e-6)


def written(mean, half_width):
    """An interval as text, in all the ways in which the READMEs may write it."""
    for factor in (1, 100):
        for digits in (0, 1, 2):
            yield f"{abs(factor * mean):.{digits}f} ± {factor * half_width:.{digits}f}"


@pytest.mark.parametrize("readme", ["README.md", "experiments/README.md"])
def test_every_interval_in_the_readmes_is_in_a_committed_result(readme):
    known = set()
    for folder in RESULTS.values():
        results = read_summary(folder)["results"]
        for row in rows_of(results):
            for interval in filter(is_interval, row.values()):
                known.update(written(interval["mean"], interval["half_width"]))
        for line in results.get("verdict", ()):
            for mean, half_width in PAIR.findall(line):
                known.update(written(float(mean), float(half_width)))
    text = " ".join((ROOT / readme).read_text().split())
    shown = [f"{mean.removeprefix('-')} ± {half_width}" for mean, half_width in PAIR.findall(text)]
    assert shown
    assert [pair for pair in shown if pair not in known] == []
