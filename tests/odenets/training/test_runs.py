import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import odenets
from odenets.training.runs import Run, environment, finished_trainings, read_config, read_metrics, read_summary


def test_a_run_is_kept(tmp_path):
    run = Run(tmp_path / "run", {"epochs": 3, "seeds": (0, 1)})
    run.log([{"epoch": 1, "h": "0.5 0.5", "loss": 0.1 + 0.2}, {"epoch": 2, "h": "1, 2", "loss": None}])
    assert read_metrics(run.folder) == [
        {"epoch": "1", "h": "0.5 0.5", "loss": "0.30000000000000004"},
        {"epoch": "2", "h": "1, 2", "loss": ""},
    ]
    assert not run.finished
    with pytest.raises(FileNotFoundError, match=r"no finished run: summary.json is missing"):
        read_summary(run.folder)
    run.finish({"accuracy": 0.9}, seeds=[0, 1])
    assert run.finished
    assert read_summary(run.folder)["results"] == {"accuracy": 0.9}
    assert read_summary(run.folder)["environment"]["versions"]["torch"] in torch.__version__
    assert read_config(run.folder)["seeds"] == [0, 1]


def git(folder, *command):
    names = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "t")
    done = subprocess.run(
        ["git", "-C", folder, *command], env=os.environ | names, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.py").write_text("print(1)")
    git(folder, "init", "-q")
    git(folder, "add", "train.py")
    git(folder, "commit", "-qm", "mine")
    return folder


def test_the_commit_is_that_of_the_script(repository, tmp_path, monkeypatch):
    def commit_of(script):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
        record = environment()
        return record["commit"], record["modified"]

    monkeypatch.chdir(tmp_path)
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as a hook of another repository sets it
    assert commit_of(repository / "train.py") == (head, False)
    (repository / "other.py").write_text("print(2)")
    assert commit_of(repository / "train.py") == (head, False)
    assert commit_of(repository / "other.py") == (head, True)  # which no commit holds
    (repository / "train.py").write_text("print(3)")
    assert commit_of(repository / "train.py") == (head, True)
    (tmp_path / "alone.py").write_text("print(4)")
    assert commit_of(tmp_path / "alone.py") == (None, None)
    monkeypatch.chdir(repository)
    assert commit_of(tmp_path / "alone.py") == (head, True)


def test_the_package_s_own_commit_is_kept_apart(repository, monkeypatch):
    monkeypatch.chdir(repository)
    folder, made = Path(odenets.__file__).parent, environment()
    assert made["commit"] == git(repository, "rev-parse", "HEAD")
    if (folder.parent / ".git").exists():
        assert made["package_commit"].removesuffix("-dirty") == git(folder, "rev-parse", "HEAD")


def test_without_a_script_the_commit_is_that_of_the_working_directory(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)  # the running script is pytest's
    made = environment()
    assert (made["commit"], made["modified"]) == (git(repository, "rev-parse", "HEAD"), False)
    monkeypatch.chdir(tmp_path)
    assert (environment()["commit"], environment()["modified"]) == (None, None)
    git(tmp_path, "init", "-q")  # a repository without a commit
    assert (environment()["commit"], environment()["modified"]) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_numpy_s_and_torch_s_numbers_are_written_as_numbers(tmp_path):
    run = Run(tmp_path / "run", {"rate": np.float32(0.5)})
    run.log([{"a": np.float64(0.1), "b": np.float32(0.5), "c": torch.tensor(3), "d, e": np.int64(2), "f": "x\ry"}])
    assert read_metrics(run.folder) == [{"a": "0.1", "b": "0.5", "c": "3", "d, e": "2", "f": "x\ry"}]
    run.finish({"a": np.float32(0.5), "b": np.arange(2), "c": torch.ones(1)}, seeds=[0])
    assert read_summary(run.folder)["results"] == {"a": 0.5, "b": [0, 1], "c": [1.0]}
    assert read_config(run.folder) == {"rate": 0.5}


@pytest.mark.parametrize(("config", "changed"), [({"a": math.nan}, "b"), ({"a": 1, "b": None}, "a")])
def test_what_differs_of_a_configuration_is_named(tmp_path, config, changed):
    Run(tmp_path / "run", {"a": math.nan, "b": None})
    Run(tmp_path / "run", {"b": None, "a": math.nan}, resume=True)
    with pytest.raises(ValueError, match=rf"another configuration: \['{changed}'\] differ"):
        Run(tmp_path / "run", config, resume=True)


def test_processes_of_a_group_may_begin_a_run_together(tmp_path, monkeypatch):
    (tmp_path / "config.json.7.partial").touch()  # another has begun to write
    assert Run(tmp_path, {"epochs": 3}, resume=True).folder == tmp_path
    look = Path.iterdir

    def meanwhile(path):
        before = [*look(path)]
        other._write("config.json", b'{"epochs": 3}')  # another is done right after we have looked
        (path / "module1.pt").touch()
        return iter(before)

    other = Run(tmp_path / "run", {"epochs": 3})
    (other.folder / "config.json").rename(other.folder / "config.json.7.partial")
    monkeypatch.setattr(Path, "iterdir", meanwhile)
    assert read_config(Run(tmp_path / "run", {"epochs": 3}, resume=True).folder) == {"epochs": 3}


def test_an_existing_run_is_not_touched(tmp_path):
    Run(tmp_path / "run", {"epochs": 3})
    with pytest.raises(FileExistsError, match=r"already holds a run: resume it \(--resume\) or choose another"):
        Run(tmp_path / "run", {"epochs": 4})
    with pytest.raises(ValueError, match=r"another configuration: \['epochs'\] differ"):
        Run(tmp_path / "run", {"epochs": 4}, resume=True)
    assert read_metrics(Run(tmp_path / "run", {"epochs": 3}, resume=True).folder) == []
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        Run(tmp_path / "other", {})


def test_rows_may_gain_columns(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log([{"epoch": 1}, {"epoch": 2, "edits": "flow 0 block 0: merged, h 1 -> 2"}])
    assert read_metrics(run.folder) == [
        {"epoch": "1", "edits": ""},
        {"epoch": "2", "edits": "flow 0 block 0: merged, h 1 -> 2"},
    ]


def test_states_hold_no_code(tmp_path):
    run = Run(tmp_path / "run", {})
    assert run.load_state() is None
    run.save_state({"x": torch.ones(2), "epoch": 3})
    assert run.load_state()["epoch"] == 3
    torch.save({"x": Run}, tmp_path / "run" / "resume.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run.load_state()


def test_states_may_hold_numpy_s_scalars(tmp_path):
    """As a schedule leaves them that calls NumPy."""
    run = Run(tmp_path / "run", {})
    run.save_state({"lr": np.float64(0.5), "steps": [np.int64(3), (np.float32(0.25), "a")], "rows": torch.ones(2)})
    state = run.load_state()
    assert state is not None
    assert (state["lr"], state["steps"]) == (0.5, [3, (0.25, "a")])


def test_a_run_of_trainings_is_closed_once(tmp_path):
    run = Run(tmp_path / "run", {"epochs": 1})
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        finished_trainings(run.folder)
    results = []
    for seed in (1, 0):
        training = Run(run.folder / f"net-{seed}", {"seed": seed})
        training.log([{"epoch": 1, "loss": 0.5 + seed}])
        training.finish({}, seeds=[seed])
        results.append({"name": f"net-{seed}", "seed": seed, "way": "a"})
    assert [path.name for path in finished_trainings(run.folder)] == ["net-0", "net-1"]
    shown = run.conclude(results, ("way", "seed"), [{"accuracy": 0.9}], "| 0.9 |", ["it works"])
    assert (run.folder / "table.md").read_text() == "| 0.9 |\n\nit works\n"
    assert shown.startswith("| 0.9 |\n\nit works\n")
    assert [row["loss"] for row in read_metrics(run.folder)] == ["1.5", "0.5"]
    summary = read_summary(run.folder)
    assert summary["results"] == {"rows": [{"accuracy": 0.9}], "verdict": ["it works"]}
    assert summary["seeds"] == [0, 1]
    run.conclude(results, ("way", "seed"), [], "", [])
    assert read_summary(run.folder) == summary
