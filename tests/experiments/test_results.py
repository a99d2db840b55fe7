"""Committed results: what is said of them can be computed again from the values of their seeds."""

import importlib
import math
import re
import shutil
from pathlib import Path

import pytest
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
UNDRAWN = ("action_histogram", "circles", "decode", "detection_")  # lack weights, images, or what summaries hold since
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
                low, high = stats.t.interval(0.95, len(values) - 1, interval["mean"], stats.sem(values))
                expected = 0.0 if math.isnan(low) else (high - low) / 2  # no scatter, no interval
                assert interval["half_width"] == pytest.approx(expected, abs=1e-9), key


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
    text = re.sub("<!-- results: begin -->.*<!-- results: end -->", "", (ROOT / readme).read_text(), flags=re.DOTALL)
    text = " ".join(text.split())  # but the table that lab.pages makes, with figures of the thesis
    shown = [f"{mean.removeprefix('-')} ± {half_width}" for mean, half_width in PAIR.findall(text)]
    assert shown
    assert [pair for pair in shown if pair not in known] == []


def select(name, **where):
    """The rows of a result that hold these values."""
    rows = read_summary(RESULTS[name])["results"]["rows"]
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def spread(name, key="auroc", **where):
    """The least and the largest mean of some rows, as the README writes them."""
    means = [row[key]["mean"] for row in select(name, **where)]
    return f"{min(means):.0f} to {max(means):.0f} %"


def saved(method):
    """Shares of memory saved on ResNet-110 with 4, 8 and 16 modules."""
    shares = [row["saved"] for row in select("module_memory", network="resnet110", method=method) if row["K"] > 2]
    return "{:.0f}, {:.0f} and {:.0f}".format(*shares)


def evaluations(network):
    (row,) = select("adaptive_depth", network=network, total_time=1.0)
    return row["evaluations"]


def times(*, action):
    """The least and the largest share of torchdiffeq's time that a flow takes, by the same method."""
    seconds = {row["way"]: row["epoch_seconds"] for row in select("neural_ode", action=action)}
    pairs = (("flow bs23", "odeint bosh3"), ("flow dopri5", "odeint dopri5"))
    shares = sorted(100 * seconds[ours] / seconds[theirs] for ours, theirs in pairs)
    return f"{shares[0]:.0f} to {shares[1]:.0f} %"


def test_the_readme_says_what_the_results_hold():
    vgg = {row["method"]: row for row in select("module_memory", network="vgg19")}
    attempts = select("detection_adaptive")
    cells = [row["meets"] for row in select("circles") if "meets" in row]
    plain = {"method": "vanilla", "kind": "trajectory"}
    merged, eight, one = (evaluations(network) for network in ("adaptive from 8", "fixed 8", "fixed 1"))
    expected = [
        f"save {saved('TRGL')} % of the memory",
        f"{saved('TRGL*')} % if balanced",
        f"computing every module twice saves {saved('checkpointed')} %",
        f"{vgg['TRGL']['saved']:.0f} % with 4 modules ({vgg['TRGL']['thesis']:.0f})",
        f"{100 * merged / eight:.0f} % of the evaluations of eight fixed blocks",
        f"{merged / one:.1f} times those of the best fixed network",
        f"{sum(cells)} of {len(cells)} cells",
        f"{times(action=False)} of `odeint`'s time",
        f"{times(action=True)} with the kinetic action",
        f"{spread('detection_mnist_seen', **plain)} on MNIST for plain residual networks",
        f"{spread('detection_mnist_bs23_seen', **plain)} for four Bogacki-Shampine blocks",
        f"{spread('detection_seen', **plain)} on digits, and {spread('detection_modes', **plain)} with",
        f"near chance, {spread('detection_cifar10_unseen', kind='trajectory')}",
        f"of {sum(row['starts'] for row in attempts)} attempts on {sum(row['starts'] for row in attempts) // 3} images",
        f"{sum(row['evading'] for row in attempts)} get past it",
    ]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert [words for words in expected if words not in text] == []


def columns_of(folder):
    """The cells of a table by heading, and what is said below it."""
    rows, _, words = (folder / "table.md").read_text().partition("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.splitlines()]
    return {heading: cells for heading, _, *cells in zip(*lines, strict=True)} | {"verdict": words}


@pytest.mark.parametrize("name", RESULTS)
def test_table_and_figures_are_drawn_again(name, tmp_path):
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
