import os
import subprocess
from pathlib import Path

import odenets
from lab import runs
from lab.runs import environment
from odenets.training.runs import read_summary


def git(folder, *command):
    names = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "t")
    done = subprocess.run(
        ["git", "-C", folder, *command], env=os.environ | names, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_experiments(tmp_path, monkeypatch):
    def commit():
        record = environment(tmp_path)
        return record["commit"], record["modified"]

    assert commit() == (None, None)
    git(tmp_path, "init", "-q")
    assert commit() == (None, None)  # a repository without a commit
    (tmp_path / "train.py").write_text("print(1)")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-qm", "mine")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))  # as a hook of another repository sets it
    (tmp_path / "table.md").touch()
    assert commit() == (head, False)
    (tmp_path / "other.py").touch()  # which no commit holds
    assert commit() == (head, True)
    (tmp_path / "other.py").unlink()
    (tmp_path / "train.py").write_text("print(3)")
    assert commit() == (head, True)
    monkeypatch.setenv("PATH", "")
    assert commit() == (None, None)


def test_the_package_s_own_commit_is_kept_apart(tmp_path):
    folder, record = Path(odenets.__file__).parent, environment(tmp_path)
    assert record["commit"] is None
    if (folder.parent / ".git").exists():
        assert record["package_commit"].removesuffix("-dirty") == git(folder, "rev-parse", "HEAD")


def test_a_part_without_a_checkpoint_leaves_nothing_that_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda: {"commit": "one", "modified": False})
    runs.Run(tmp_path / "run", {}).begin()
    again = runs.Run(tmp_path / "run", {}, resume=True)
    again.begin()
    again.finish({}, seeds=[0])
    assert len(read_summary(tmp_path / "run")["environment"]["parts"]) == 1
