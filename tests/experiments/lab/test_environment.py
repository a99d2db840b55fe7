import os
import subprocess
import sys
from pathlib import Path

import pytest

import odenets
from lab.environment import environment


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
    folder, record = Path(odenets.__file__).parent, environment()
    assert record["commit"] == git(repository, "rev-parse", "HEAD")
    if (folder.parent / ".git").exists():
        assert record["package_commit"].removesuffix("-dirty") == git(folder, "rev-parse", "HEAD")


def test_without_a_script_the_commit_is_that_of_the_working_directory(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)  # the running script is pytest's
    record = environment()
    assert (record["commit"], record["modified"]) == (git(repository, "rev-parse", "HEAD"), False)
    monkeypatch.chdir(tmp_path)
    assert (environment()["commit"], environment()["modified"]) == (None, None)
    git(tmp_path, "init", "-q")  # a repository without a commit
    assert (environment()["commit"], environment()["modified"]) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
