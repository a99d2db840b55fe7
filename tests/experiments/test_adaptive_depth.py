from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from adaptive_depth import EXPERIMENT, Config, figures
from adaptive_depth_setup import build
from adaptive_depth_tables import summarize, verdict

from lab.experiment import Outcome, run
from lab.plotting import block_errors, epochs_of
from lab.results import read_outcome
from odenets import plotting
from odenets.training import datasets
from odenets.training.runs import read_metrics, read_summary

TINY: dict[str, Any] = {
    "seeds": (0, 1),
    "epochs": 2,
    "train_size": 50,
    "test_size": 50,
    "deep": 4,
    "workers": 1,
    "max_depth": 8,
    "check_samples": 20,
}
TINY |= {"parts": ("depth", "long"), "rates": (0.02,), "weights": (1.0,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(EXPERIMENT, Config(**TINY, output=folder))
    return folder


def test_the_run_folder_holds_everything(folder):
    rows = {(row["part"], row["network"]): row for row in read_summary(folder)["results"]["rows"]}
    deep = rows["depth", "adaptive from 4"]
    for seed, depth in zip(TINY["seeds"], deep["final_depths"], strict=True):
        trained = read_summary(folder / f"depth-adaptive-from-4-T1-seed{seed}")["results"]
        assert len(trained["h"]) == len(trained["errors"]) == depth <= TINY["max_depth"]
        assert sum(trained["h"]) == pytest.approx(1)  # the total time, however many blocks it is cut into
    assert rows["depth", "fixed 4"]["evaluations"] == 2 * 40 * 12  # epochs, samples, evaluations per forward pass
    euler = next(row for (_, network), row in rows.items() if network.startswith("euler"))
    assert euler["evaluations_per_forward"] == 3 * max(set(deep["final_depths"]), key=deep["final_depths"].count)
    text = (folder / "table.md").read_text()
    assert all(f"| {row['network']} " in text for row in rows.values())
    assert len(read_metrics(folder)) >= 2 * 2 * 4
    assert {path.name for path in (folder / "figures").iterdir()} >= {"depth.png", "errors.png", "cost.png"}


def test_growing_networks_end_as_the_deepest_and_take_less(folder):
    rows = {row["network"]: row for row in read_summary(folder)["results"]["rows"] if row["part"] == "depth"}
    fixed = rows["fixed 4"]
    for way in ("doubling", "stacking"):
        grown = rows[f"{way} to 4"]
        assert (
            grown["evaluations"] == 2 * 40 * 3 * (1 + 2) / 2
        )  # an epoch of each level; two epochs end before four blocks
        assert grown["evaluations"] < fixed["evaluations"]
        results = read_summary(folder / f"depth-{way}-to-4-T1-seed0")["results"]
        assert results["h"] == ([0.5] * 2 if way == "doubling" else [0.25] * 2)


def test_figures_show_the_run(folder, tmp_path):
    rows = [row for row in read_metrics(folder) if row["part"] == "depth"]
    errors = block_errors(epochs_of(rows, "adaptive from 4"), Config.tolerance, Config.K)
    shown = [value for line in errors.axes[0].lines for value in line.get_ydata()]
    adaptive = [path for path in folder.iterdir() if path.name.startswith("depth-adaptive-from-4")]
    measured = [float(e) for path in adaptive for row in read_metrics(path) for e in row["errors"].split()]
    assert len(measured) >= 2 * 4  # two seeds of four blocks, checked at least once
    thresholds = [Config.tolerance, Config.tolerance / Config.K]
    assert sorted(shown) == sorted([*measured, *thresholds, *thresholds])  # a line is drawn between two points
    made = {name: make() for name, make in figures(Config(**TINY), read_outcome(folder)[0]).items()}
    paths = plotting.save(made, tmp_path, formats=("svg",))
    assert [path.stat().st_size > 1000 for path in paths] == [True] * 3


def test_a_missing_data_folder_leaves_nothing_behind(tmp_path):
    config = Config(dataset="mnist", folder=tmp_path / "nowhere", output=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        run(EXPERIMENT, config)
    assert not (tmp_path / "run").exists()


def built(part, **options):
    parts = datasets.split(*datasets.load("digits"), size=100)
    config = Config(**TINY | {"parts": (part,)} | options)
    return config, parts


def test_networks_of_every_order_take_as_many_evaluations_and_waste_none():
    config, parts = built("orders")
    networks = {job.network: build(config, parts.train, job) for job in next(EXPERIMENT.jobs(config)) if job.seed == 0}
    assert len(networks) == 8
    shared = networks["euler, 12 blocks, fields for three"].flows[0]
    assert len({block.fields[0] for block in shared.blocks}) == 4
    for name, network in networks.items():
        calls = Counter()
        for field in {field for block in network.flows[0].blocks for field in block.fields}:
            field.register_forward_hook(lambda *_, calls=calls: calls.update(["field"]))
        network(parts.train.x[:2])
        assert calls["field"] == network.evaluations == 12, name
    with_errors = {n: network.flows[0].evaluations_per_pass(closing=True) for n, network in networks.items()}
    assert with_errors["order 3 tied, 4 blocks"] == 16
    assert with_errors["order 3 chained, 4 blocks"] == 13  # a closing stage is the first one of the next block
    assert with_errors["eq. 43, 3 blocks"] == 12


def test_the_action_is_compared_with_the_same_network_without_it():
    def result(network, weight, seed, solution, error, way="adaptive"):
        row = {"part": "action", "network": network, "total_time": 1.0, "seed": seed, "weight": weight, "way": way}
        row |= {"tuning": False, "diverged": False, "multipliers": False, "solver": "bs23", "depth": 8, "together": 1}
        row |= {
            "rate": 0.1,
            "tolerance": 0.01,
            "final_depth": 2,
            "parameters": 9,
            "seconds": 1.0,
            "evaluations_per_forward": 6,
        }
        row |= {"evaluations_with_error": 8, "training_evaluations": 60, "check_evaluations": 4, "forward": ""}
        row |= {"validation": solution, "solution": solution, "without_flow": 0.5, "errors": [error] * 2}
        return row | {"relative_error": error}

    results = [result("plain", 0.0, seed, 0.9, 0.02) for seed in (0, 1)]
    results += [result("weighed", 1.0, seed, 0.91 + 0.01 * seed, 0.01) for seed in (0, 1)]
    results += [result("fixed", 0.0, 0, 0.5, 0.02, way="fixed")]
    results += [result("fixed, weighed", 1.0, 0, 0.5, 0.01, way="fixed")]
    results += [result("looser", 0.0, seed, 0.9, 0.1) | {"tolerance": 0.1, "check_evaluations": 36} for seed in (0, 1)]
    plain, weighed, fixed, fixed_weighed, looser = rows = summarize(Config(), results)
    assert weighed["difference"].values == pytest.approx((1, 2))
    assert weighed["share"].values == (1, 1)
    assert "error_ratio" not in weighed  # of other blocks than the plain one's
    assert fixed_weighed["error_ratio"].values == (0.5,)
    assert not {"difference", "share"} & (plain.keys() | fixed.keys())
    assert looser["share"].values == (1.5, 1.5)
    lines = verdict(replace(Config(), parts=("action",)), Outcome(rows))
    assert lines[-1] == "chosen on validation, as the largest that loses at most 0.5 points there: weighed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision loss")  # of two seeds whose differences are alike
def test_all_parts_run(tmp_path):
    run(EXPERIMENT, Config(quick=True, workers=1, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert {row["part"] for row in rows} == {"depth", "long", "orders", "action"}


@pytest.mark.slow
def test_untied_networks_and_points(tmp_path):
    options = TINY | {"seeds": (0,), "parts": ("depth",), "stage_fields": "untied", "dataset": "moons"}
    run(EXPERIMENT, Config(**options, output=tmp_path / "run"))
    fixed = next(r for r in read_summary(tmp_path / "run")["results"]["rows"] if r["network"] == "fixed 4")
    assert fixed["evaluations_per_forward"] == 16
    assert fixed["full_passes"].keys() == {"euler", "midpoint", "order2", "order3", "ensemble"}
