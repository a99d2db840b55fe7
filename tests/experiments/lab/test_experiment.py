"""The harness on an experiment that draws a number per seed."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from lab import runs
from lab.config import Config as CommonConfig
from lab.experiment import Experiment, command, draw, run
from lab.results import best_settings, groups
from lab.statistics import mean_interval, paired, percent
from odenets.training.runs import read_config, read_metrics, read_summary


@dataclass(frozen=True)
class Config(CommonConfig):
    """What is drawn."""

    seeds: tuple[int, ...] = (0, 1)
    factor: float = 1.0
    fail: bool = False


@dataclass(frozen=True)
class Job:
    scale: float
    seed: int
    tuning: bool

    @property
    def name(self):
        return f"{self.scale:g}/{self.seed}"


def jobs(config):
    tuned = yield [Job(scale, 100, True) for scale in (1.0, 3.0, 2.0)]
    best = best_settings(tuned, ("scale",), within=(), score=lambda r: [r["value"]])
    return (yield [Job(**best[()], seed=seed, tuning=False) for seed in config.seeds])


def train(config, job, run, report):
    state = run.load_state() or {"value": float(torch.rand((), generator=torch.Generator().manual_seed(job.seed)))}
    run.save_state(state)
    if STOP.pop(job.seed, False):
        raise KeyboardInterrupt
    run.log([{"epoch": 1, "value": state["value"]}])
    report(1)
    return {"value": config.factor * job.scale * state["value"]}


STOP = {}
EXPERIMENT = Experiment(
    config=Config,
    jobs=jobs,
    train=train,
    summarize=lambda config, results: [
        {"scale": scale, "value": mean_interval([r["value"] for r in group])}
        for (scale,), group in groups(results, "scale").items()
    ],
    columns={"scale": "{scale:g}", "value": "{value:.3f}"},
    verdict=lambda config, outcome: [f"factor {config.factor:g}: {outcome.rows[0]['value']:.2f}"],
    figures=lambda config, outcome: {
        "epochs": lambda: Figure() if outcome.metrics else None,
        "best": lambda: Figure() if outcome.detail("largest") else None,
        "trainings": lambda: Figure() if outcome.results else None,
    },
    details=lambda config, results: {"largest": max(r["value"] for r in results)},
    quick=lambda config: replace(config, seeds=(0,)),
    selects=("seeds",),
    keys=("scale", "seed"),
)


@pytest.fixture
def config(tmp_path):
    STOP.clear()
    return Config(output=tmp_path / "run", workers=1)


def test_a_run_leaves_everything_and_is_not_made_again(config, capsys):
    run(EXPERIMENT, config)
    summary = read_summary(config.output)
    assert (summary["seeds"], summary["results"]["rows"][0]["scale"]) == ([0, 1], 3.0)
    assert summary["results"]["largest"] in summary["results"]["rows"][0]["value"]["values"]
    assert [part["name"] for part in summary["environment"]["parts"]] == ["1/100", "3/100", "2/100", "3/0", "3/1"]
    assert [(row["scale"], row["seed"]) for row in read_metrics(config.output)] == [("3.0", "0"), ("3.0", "1")]
    assert {path.stem for path in (config.output / "figures").iterdir()} == {"epochs", "best", "trainings"}
    settings = read_config(config.output / "3/0")
    assert settings == {"scale": 3.0, "seed": 0, "tuning": False, "factor": 1.0, "fail": False, "quick": False}
    with pytest.raises(FileExistsError, match="--resume"):
        run(EXPERIMENT, config)
    with pytest.raises(ValueError, match=r"another configuration: \['factor'\] differ"):
        run(EXPERIMENT, replace(config, factor=2.0, resume=True))
    capsys.readouterr()
    run(EXPERIMENT, replace(config, resume=True))
    assert (config.output / "table.md").read_text() in capsys.readouterr().out
    assert read_summary(config.output) == summary
    (config.output / "summary.json").write_text("")
    with pytest.raises(ValueError, match="is empty or broken"):
        run(EXPERIMENT, replace(config, resume=True))


def test_what_cannot_begin_is_said_in_a_line(config, monkeypatch, capsys):
    (config.output / "1").mkdir(parents=True)
    for arguments, message in (
        (["--draw", str(config.output)], "holds no run: config.json is missing"),
        (["--output", str(config.output)], "is not empty and holds no run"),
    ):
        monkeypatch.setattr("sys.argv", ["here/script.py", *arguments])
        with pytest.raises(SystemExit) as end:
            command(EXPERIMENT, None)
        shown = capsys.readouterr().err
        assert (end.value.code, shown.count("\n"), message in shown) == (2, 1, True)
        assert shown.startswith("script.py: folder")


def test_after_a_resume_the_summary_states_commit_and_seconds_of_every_part(config, monkeypatch):
    STOP[1] = True
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "first", "modified": False})
    with pytest.raises(KeyboardInterrupt):
        run(EXPERIMENT, config)
    assert not (config.output / "summary.json").exists()
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "second", "modified": True})
    run(EXPERIMENT, replace(config, resume=True))
    parts = read_summary(config.output)["environment"]["parts"]
    by_name = {name: [(p["commit"], p["modified"]) for p in of] for (name,), of in groups(parts, "name").items()}
    assert by_name["3/0"] == [("first", False)]
    assert by_name["3/1"] == [("first", False), ("second", True)]
    assert all(part["seconds"] >= 0 and part.keys() == {"name", "commit", "modified", "seconds"} for part in parts)
    assert not list(config.output.rglob("parts.json"))


def test_a_finished_run_is_drawn_again_and_says_what_it_lacks(config):
    run(EXPERIMENT, config)
    text = (config.output / "table.md").read_text()
    alone = config.output.with_name("alone")
    (alone / "3/0").mkdir(parents=True)
    for name in ("summary.json", "config.json"):
        (alone / name).write_bytes((config.output / name).read_bytes())
    shown = draw(EXPERIMENT, alone)
    assert (alone / "table.md").read_text() == text
    assert [path.stem for path in (alone / "figures").iterdir()] == ["best"]
    assert "epochs is not drawn: folder" in shown
    assert "holds no trainings (NAME/summary.json)" in shown
    assert "not drawn" not in draw(EXPERIMENT, config.output)
    summary = json.loads((alone / "summary.json").read_text())
    del summary["results"]["largest"]
    (alone / "summary.json").write_text(json.dumps(summary))
    assert "holds no 'largest' beside its rows" in draw(EXPERIMENT, alone)


@pytest.mark.parametrize(("seeds", "quick"), [((0, 1), [0]), ((4, 5), [4, 5])])
def test_the_quick_run_is_recorded_as_such_and_keeps_what_is_given(config, seeds, quick):
    run(EXPERIMENT, replace(config, quick=True, seeds=seeds))
    assert read_summary(config.output)["seeds"] == quick
    assert read_config(config.output)["quick"] is True


def test_verdict_and_quick_may_be_left_out_and_columns_are_checked_before_a_training(config):
    plain = {f.name: getattr(EXPERIMENT, f.name) for f in fields(EXPERIMENT) if f.name not in ("verdict", "quick")}
    with pytest.raises(ValueError, match="--quick needs an experiment with a quick configuration"):
        run(Experiment(**plain), replace(config, quick=True))
    with pytest.raises(ValueError, match="column 'scale' must be a format that names a value"):
        run(Experiment(**plain | {"columns": {"scale": "scale"}}), config)
    assert not config.output.exists()
    run(Experiment(**plain), config)
    assert len((config.output / "table.md").read_text().split("\n\n")[0].splitlines()) == 3  # heading, rule, row


def test_processes_are_those_of_the_device():
    assert CommonConfig(workers=3).processes == 3
    assert CommonConfig().processes >= 1
    assert CommonConfig().run_folder == Path("runs/experiment")


def test_shares_in_percent_and_paired_differences():
    assert percent([0.25, 0.5]).values == (25.0, 50.0)
    assert paired([3.0, 2.0], [1.0, 1.0]).values == (2.0, 1.0)


def test_a_script_s_experiment_is_made_of_its_names_and_it_is_said_what_it_lacks():
    here = Experiment.of(__name__, summarize=len, columns={})
    assert (here.config, here.jobs, here.train, here.selects) == (Config, jobs, train, ())
    with pytest.raises(TypeError, match="'summarize' and 'columns'"):
        Experiment.of(__name__)
