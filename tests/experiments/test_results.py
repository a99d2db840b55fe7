"""Committed results: what is said of them can be computed again from the values of their seeds."""

import importlib
import json
import re
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from lab.experiment import draw
from odenets.training.runs import read_summary

ROOT = Path(__file__).parents[2]
RESULTS = {path.parent.name: path.parent for path in sorted((ROOT / "experiments/results").glob("*/summary.json"))}
WITHOUT_VALUES = {  # made before summaries held the values of the seeds
    "circles", "circles_20", "detection_adaptive",
    "detection_cifar10_ood", "detection_cifar10_unseen", "detection_mnist_bs23_seen", "detection_mnist_bs23_unseen",
    "detection_mnist_ood", "detection_mnist_seen", "detection_mnist_unseen", "detection_modes", "detection_ood",
    "detection_seen", "detection_unseen", "module_depth", "module_depth_20", "module_wise_cifar10",
    "module_wise_mnist", "small_data", "small_data_cifar10", "small_data_conditions",
    "small_data_mnist", "small_data_mnist_200", "small_data_mnist_300",
}  # fmt: skip
SCRIPTS = sorted((path.stem for path in ROOT.glob("experiments/*.py")), key=len, reverse=True)
UNDRAWN = (  # lack weights, images, or what summaries hold since
    "action_histogram", "circles", "decode", *(name for name in WITHOUT_VALUES if name.startswith("detection_")),
    "detection_timing",
)  # fmt: skip
LACKING = {"action_and_accuracy": {"fig_6"}, "module_depth": {"fig_43"}, "module_depth_20": {"fig_43"}}  # as well
GONE = {"circles_20": {"epochs"}}  # columns of an older table: its mean was over all instances, also those with faults
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


@cache
def quantile(freedom):
    """The two-sided 95 % one of Student's t."""
    return stats.t.ppf(0.975, freedom)


@pytest.mark.parametrize("name", RESULTS)
def test_intervals_are_those_of_the_values_of_their_seeds(name):
    for row in rows_of(read_summary(RESULTS[name])["results"]):
        for key, interval in row.items():
            if not is_interval(interval) or key == "thesis":
                continue
            if name in WITHOUT_VALUES:
                assert "values" not in interval
                continue
            values = interval["values"]
            assert len(values) == interval["n"], key
            assert interval["mean"] == pytest.approx(sum(values) / len(values), abs=1e-9), key
            if len(values) > 1:
                expected = quantile(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
                assert interval["half_width"] == pytest.approx(expected, rel=1e-12, abs=1e-9), key


@pytest.mark.parametrize("name", sorted(RESULTS.keys() - WITHOUT_VALUES))
def test_p_values_are_those_of_the_paired_differences(name):
    for row in rows_of(read_summary(RESULTS[name])["results"]):
        for key in [key for key in row if key == "p" or str(key).endswith("_p")]:
            stem = key[:-1].removesuffix("_").removesuffix("difference").removesuffix("_")
            values = row[f"{stem}_difference".removeprefix("_")]["values"]
            expected = stats.ttest_1samp(values, 0).pvalue if any(values) else 1.0
            assert row[key] == pytest.approx(expected, rel=1e-6), key
        if "correlation" in row:
            found = stats.pearsonr(row["log10_action"]["values"], row["accuracy"]["values"])
            assert row["correlation"] == pytest.approx([found.statistic, found.pvalue], rel=1e-6)


def written(mean, half_width):
    """An interval as text, in all the ways in which a page may write it."""
    for factor in (1, 100):
        for digits in (0, 1, 2):
            yield f"{abs(factor * mean):.{digits}f} ± {factor * half_width:.{digits}f}"


PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs/experiments").glob("*.md"))


@pytest.fixture(scope="module")
def known():
    """Intervals of all committed results, of our cells and of the thesis', in all the ways of writing them."""
    texts = set()
    for folder in RESULTS.values():
        results = read_summary(folder)["results"]
        for row in rows_of(results):
            for interval in filter(is_interval, row.values()):
                texts.update(written(interval["mean"], interval["half_width"]))
        for line in results.get("verdict", ()):
            for mean, half_width in PAIR.findall(line):
                texts.update(written(float(mean), float(half_width)))
    for table in json.loads((ROOT / "experiments/lab/thesis.json").read_text()).values():
        for cell in (cell for _, *cells in table["rows"] for cell in cells if isinstance(cell, list)):
            texts.update(written(*cell))
    return texts


@pytest.mark.parametrize("page", [*PAGES, "experiments/README.md"])
def test_every_interval_on_a_page_is_in_a_committed_result(page, known):
    text = " ".join((ROOT / page).read_text().split())
    shown = [f"{mean.removeprefix('-')} ± {half_width}" for mean, half_width in PAIR.findall(text)]
    assert [pair for pair in shown if pair not in known] == []


def columns_of(folder):
    """The cells of a table by heading, and what is said below it."""
    rows, _, words = (folder / "table.md").read_text().partition("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    return {heading: cells for heading, _, *cells in zip(*lines, strict=True)} | {"verdict": words}


@pytest.mark.parametrize("name", RESULTS)
def test_table_and_figures_are_made_again(name, tmp_path, monkeypatch):
    """The figures up to their pixels."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    check_drawn_again(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_figures_are_drawn_again(name, tmp_path):
    check_drawn_again(name, tmp_path)


def check_drawn_again(name, tmp_path):
    module = importlib.import_module(next(script for script in SCRIPTS if name.startswith(script)))
    folder = tmp_path / name
    shutil.copytree(RESULTS[name], folder, ignore=shutil.ignore_patterns("figures", "table.md"))
    shown = draw(module.EXPERIMENT, folder)
    columns, before = columns_of(folder), columns_of(RESULTS[name])
    assert before.keys() - columns.keys() == GONE.get(name, set())
    assert columns == {heading: before[heading] for heading in columns}
    drawn = {path.stem for path in folder.glob("figures/*")}
    committed = {path.stem for path in RESULTS[name].glob("figures/*")}
    lacking = set(re.findall(r"^(\S+) is not drawn: ", shown, re.MULTILINE))
    assert lacking == (committed if name.startswith(UNDRAWN) else LACKING.get(name, set()))
    assert drawn == committed - lacking
