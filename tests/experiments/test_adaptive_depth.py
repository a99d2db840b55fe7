import os
import signal
import subprocess
import sys
from pathlib import Path

import adaptive_depth
import pytest
from matplotlib.figure import Figure
from safetensors.torch import load_file

from lab import plotting as lab_figures
from odenets import plotting
from odenets.training.runs import read_metrics, read_summary

TINY = {"seeds": (0, 1), "epochs": 3, "train_size": 150, "deep": 4, "workers": 1, "max_depth": 8, "check_samples": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    adaptive_depth.main(adaptive_depth.Config(**TINY, output=folder))
    return folder


def test_the_run_folder_holds_everything(folder, capsys):
    rows = read_summary(folder)["results"]["rows"]
    deep = next(row for row in rows if row["network"] == "adaptive from 4")
    for seed, depth in zip(TINY["seeds"], deep["final_depths"], strict=True):
        trained = read_summary(folder / f"adaptive-from-4-T1-seed{seed}")["results"]
        assert len(trained["h"]) == depth <= TINY["max_depth"]
        assert sum(trained["h"]) == pytest.approx(1)  # the total time, however many blocks it is cut into
    fixed = next(row for row in rows if row["network"] == "fixed 4")
    assert fixed["evaluations"] == 3 * 120 * 12  # epochs, samples, evaluations per forward pass
    euler = next(row for row in rows if row["network"].startswith("euler"))
    assert euler["evaluations_per_forward"] == 3 * max(set(deep["final_depths"]), key=deep["final_depths"].count)
    text = (folder / "table.md").read_text()
    assert all(f"| {row['network']} " in text for row in rows)
    assert len(read_metrics(folder)) >= 3 * 2 * 4
    assert {path.name for path in (folder / "figures").iterdir()} >= {"depth.png", "errors.png", "cost.png"}


def test_a_finished_run_is_read_and_not_trained_again(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/weights.safetensors")}
    with pytest.raises(FileExistsError, match="already holds a run"):
        adaptive_depth.main(adaptive_depth.Config(**TINY, output=folder))
    adaptive_depth.main(adaptive_depth.Config(**TINY, output=folder, resume=True))
    assert (folder / "table.md").read_text().strip() in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/weights.safetensors")} == before


def test_figures_show_the_run(folder, tmp_path):
    figures = lab_figures.adaptive_depth(folder)
    assert all(isinstance(figure, Figure) for figure in figures.values())
    adaptive = [path for path in sorted(folder.iterdir()) if path.name.startswith("adaptive-from-4")]
    errors = lab_figures.block_errors(adaptive)
    shown = [value for line in errors.axes[0].lines for value in line.get_ydata()]
    measured = [float(e) for path in adaptive for row in read_metrics(path) for e in row["errors"].split()]
    assert len(measured) >= 2 * 4  # two seeds of four blocks, checked at least once
    thresholds = [adaptive_depth.Config.tolerance, adaptive_depth.Config.tolerance / adaptive_depth.Config.K]
    assert sorted(shown) == sorted([*measured, *thresholds, *thresholds])  # a line is drawn between two points
    paths = plotting.save(figures, tmp_path / "figures", formats=("svg",))
    assert [path.stat().st_size > 1000 for path in paths] == [True] * 3
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        lab_figures.adaptive_depth(tmp_path)


def test_a_missing_data_folder_leaves_nothing_behind(tmp_path):
    config = adaptive_depth.Config(dataset="mnist", folder=tmp_path / "nowhere", output=tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        adaptive_depth.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_untied_networks_and_points(tmp_path):
    options = TINY | {"seeds": (0,), "long_time": 0.0, "stage_fields": "untied", "dataset": "moons"}
    adaptive_depth.main(adaptive_depth.Config(**options, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert next(row for row in rows if row["network"] == "fixed 4")["evaluations_per_forward"] == 16


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_and_resumed_it_ends_with_the_same_weights(folder, tmp_path):
    script = Path(adaptive_depth.__file__)
    flags = [f"--{name.replace('_', '-')}" for name in TINY]
    values = ["0" if name == "seeds" else str(value) for name, value in TINY.items()]
    arguments = [word for pair in zip(flags, values, strict=True) for word in pair]
    command = [script, *arguments, "--output", tmp_path / "run", "--resume"]
    killed = Path(__file__).with_name("killed.py")
    first = subprocess.run([sys.executable, killed, "adaptive-from-4", *command], capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected = {path.parent.name: load_file(path) for path in folder.glob("*/weights.safetensors")}
    found = {path.parent.name: load_file(path) for path in (tmp_path / "run").glob("*/weights.safetensors")}
    assert {"adaptive-from-1-T1-seed0", "adaptive-from-4-T1-seed0"} <= found.keys() & expected.keys()
    for name in found.keys() & expected.keys():
        assert all(weights.equal(found[name][key]) for key, weights in expected[name].items()), name
