"""What made a figure: the command, versions and device of its run, and the commits of the code."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import odenets
from odenets.training import runs

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """:func:`odenets.training.runs.environment` and commits.

    ``commit`` is that of the repository in which the running script lies, or else the working directory: a notebook,
    ``python -c`` and installed programs such as pytest are no scripts of one's own. None outside of repositories.
    ``modified`` tells whether tracked files differ from it, or the script is not in it. Where the package odenets lies
    in a repository, ``package_commit`` is that one's, with "-dirty" where files differ.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    script = None if script is None or _installed(Path(script)) else Path(script).resolve()
    commit, modified = (None, None) if script is None else _commit(script.parent, script)
    if commit is None:
        commit, modified = _commit(Path.cwd(), script)
    here = Path(odenets.__file__).resolve()
    package = None
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        package = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return runs.environment() | {"commit": commit, "modified": modified, "package_commit": package}


def _installed(script: Path) -> bool:
    """Whether a script is a program installed beside Python, as pytest is."""
    folders = {sysconfig.get_path(name) for name in ("scripts", "purelib", "platlib", "stdlib")} - {None}
    parents = {*script.absolute().parents, *script.resolve().parents}
    return not script.is_file() or any(path in parents for f in folders for path in (Path(f), Path(f).resolve()))


def _commit(folder: Path, script: Path | None) -> tuple[str | None, bool | None]:
    """The commit that a folder's repository stands at, and whether files differ from it; None without a commit."""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    clean = _git(folder, "status", "--porcelain", "--untracked-files=no") == ""
    if script is not None:  # which may be untracked, ignored or of no repository
        clean = clean and _git(folder, "status", "--porcelain", "--ignored", "--", str(script)) == ""
    return commit, not clean


def _git(folder: Path, *command: str) -> str | None:
    """What git answers for a folder; None where it fails or is not there."""
    names = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}  # which a hook sets, of another repository
    variables = {name: value for name, value in os.environ.items() if name not in names}
    try:
        done = subprocess.run(
            ["git", "-C", folder, *command], env=variables, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
