import pytest
from adaptive_depth import EXPERIMENT, Config, figures

from lab.experiment import run
from lab.plotting import block_errors, epochs_of
from lab.results import read_outcome
from odenets import plotting
from odenets.training.runs import read_metrics, read_summary

TINY = {"seeds": (0, 1), "epochs": 2, "train_size": 100, "deep": 4, "workers": 1, "max_depth": 8, "check_samples": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(EXPERIMENT, Config(**TINY, output=folder))
    return folder


def test_the_run_folder_holds_everything(folder):
    rows = read_summary(folder)["results"]["rows"]
    deep = next(row for row in rows if row["network"] == "adaptive from 4")
    for seed, depth in zip(TINY["seeds"], deep["final_depths"], strict=True):
        trained = read_summary(folder / f"adaptive-from-4-T1-seed{seed}")["results"]
        assert len(trained["h"]) == depth <= TINY["max_depth"]
        assert sum(trained["h"]) == pytest.approx(1)  # the total time, however many blocks it is cut into
    fixed = next(row for row in rows if row["network"] == "fixed 4")
    assert fixed["evaluations"] == 2 * 80 * 12  # epochs, samples, evaluations per forward pass
    euler = next(row for row in rows if row["network"].startswith("euler"))
    assert euler["evaluations_per_forward"] == 3 * max(set(deep["final_depths"]), key=deep["final_depths"].count)
    text = (folder / "table.md").read_text()
    assert all(f"| {row['network']} " in text for row in rows)
    assert len(read_metrics(folder)) >= 2 * 2 * 4
    assert {path.name for path in (folder / "figures").iterdir()} >= {"depth.png", "errors.png", "cost.png"}


def test_figures_show_the_run(folder, tmp_path):
    errors = block_errors(epochs_of(read_metrics(folder), "adaptive from 4"), Config.tolerance, Config.K)
    shown = [value for line in errors.axes[0].lines for value in line.get_ydata()]
    adaptive = [path for path in folder.iterdir() if path.name.startswith("adaptive-from-4")]
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


@pytest.mark.slow
def test_untied_networks_and_points(tmp_path):
    options = TINY | {"seeds": (0,), "long_time": 0.0, "stage_fields": "untied", "dataset": "moons"}
    run(EXPERIMENT, Config(**options, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert next(row for row in rows if row["network"] == "fixed 4")["evaluations_per_forward"] == 16
