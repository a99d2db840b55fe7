"""A folder per experiment: a run of the library that records commits and is closed with a table and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.environment import environment
from odenets.training import runs
from odenets.training.runs import read_metrics

__all__ = ["Run", "finished_trainings"]


class Run(runs.Run):
    """A run folder of :class:`odenets.training.Run` whose summary states the commits of the code."""

    def environment(self) -> dict[str, Any]:
        return environment()

    def conclude(
        self,
        trainings: list[dict[str, Any]],
        keys: tuple[str, ...],
        rows: list[dict[str, Any]],
        table: str,
        verdict: list[str],
        *,
        started: float | None = None,
    ) -> str:
        """Close a run that is made of trainings in folders of their own; a second call changes no summary.

        Args:
            trainings: the results of each, its folder as ``name`` and its ``seed`` among them.
            keys: which of these tell its rows apart in the common ``metrics.csv``.
            rows, verdict: what was found, for the summary.
            table: the rows as text, for ``table.md`` with the verdict below.
            started: when the run began, in seconds since the epoch.

        Returns:
            Table, verdict and folder, to be shown.
        """
        text = table + "\n\n" + "\n".join(verdict) + "\n"
        self.write("table.md", text.encode())
        self.log([{k: r[k] for k in keys} | row for r in trainings for row in read_metrics(self.folder / r["name"])])
        if not self.finished:
            seeds = sorted({r["seed"] for r in trainings})
            self.finish({"rows": rows, "verdict": verdict}, seeds=seeds, started=started)
        return f"{text}\nrun folder: {self.folder}"


def finished_trainings(folder: str | Path) -> list[Path]:
    """The folders of a run's finished trainings.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(path.parent for path in Path(folder).glob("*/summary.json"))
    if not found:
        raise FileNotFoundError(f"folder {str(folder)!r} holds no finished training")
    return found
