"""An experiment: what is trained and what is reported. How it runs is written here, once.

A script is a frozen :class:`~lab.config.Config`, jobs, what to train, what to report; ``no_batchnorm.py`` is short::

    class Config(lab.config.Config): ...    # a frozen dataclass, every field with a default

    def jobs(config):                   # a generator: jobs out, their results in; returns those that are reported
        return (yield [Job(depth, seed) for depth in config.depths for seed in config.seeds])

    def train(config, job, run, report):    # in a worker; run keeps checkpoints, report(n) moves the progress bar
        return {"accuracy": ...}        # stands in the job's summary, beside the job's own fields and its name

    def summarize(config, results):     # rows of the table
        return [{"depth": ..., "accuracy": mean_interval(...)}, ...]

    COLUMNS = {"blocks": "{depth}", "test accuracy": "{accuracy:.2f}"}

    EXPERIMENT = Experiment.of(__name__, selects=("depths",))   # verdict, quick, figures and others if there are any

    if __name__ == "__main__":
        command(EXPERIMENT, __doc__)

:class:`lab.training.Progress` is the callback that calls ``report`` after an epoch, where ``cost`` counts epochs. A
script elsewhere runs with this folder on the path: ``PYTHONPATH=experiments python elsewhere/script.py``.

:func:`run` loads the data before anything is written, opens the run folder, trains what is not there yet in worker
processes, writes table, verdict, figures and one summary. A run that was interrupted goes on with ``--resume``; its
summary lists under ``environment``, ``parts`` the commit and the seconds of every part of every training. ``--draw
FOLDER`` makes the table and the figures of a finished run again, and says what it lacks for the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro
from matplotlib.figure import Figure

from lab.config import Config, keep_given, recorded, science
from lab.results import Outcome, read_outcome
from lab.runs import Run
from lab.tables import check_columns, table
from lab.workers import Report, Task, Workers
from odenets import plotting
from odenets.training.runs import read_config, read_metrics, read_summary

__all__ = [
    "Columns", "Experiment", "Figures", "Jobs", "Outcome", "Report", "Row", "Run", "command", "draw", "run", "start",
]  # fmt: skip

Row = dict[str, Any]
Columns = Mapping[str, str | Callable[[Mapping[str, Any]], object]]
Figures = dict[str, Callable[[], Figure]]
"""Figures by name, each made when it is asked for."""


C = TypeVar("C", bound=Config)
J = TypeVar("J")
Jobs = Generator[Sequence[J], list[Row], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[C, J]):
    """What is trained and what is reported.

    A job is a frozen dataclass with a ``name``, that of its folder in that of the run, and a field ``seed`` or
    ``seeds``; where a field ``tuning`` is true, it serves a choice and is not reported.

    Attributes:
        config: class of the configuration.
        jobs: a generator that yields jobs, gets their results, and returns those that are reported.
        train: trains a job in a worker, at the top of a module; gets the configuration, the job, its run and what moves
            the progress bar; returns results.
        summarize: rows of the table, from the results.
        columns: of the table, as :func:`lab.tables.table` reads them, or what makes them from the configuration.
        verdict: what the rows say of the claims, in sentences.
        quick: the configuration of a few minutes; without it ``--quick`` is refused.
        selects: settings that say which jobs there are and not how one of them turns out.
        settings: what decides the outcome of a job beside the configuration and its own fields.
        seeds: of a job without a field ``seed`` or ``seeds``.
        cost: of a job, in units of the progress bar; those that cost most begin first.
        data: loads the data, so that a wrong folder shows before anything is written.
        details: what figures need of the results beside the rows, for the summary.
        figures: by name; one that raises FileNotFoundError says what the run folder lacks.
        keys: fields that tell the trainings apart in the common ``metrics.csv``; without them there is none.
    """

    config: type[C]
    jobs: Callable[[C], Jobs[J]]
    train: Callable[[C, J, Run, Report], Mapping[str, Any]]
    summarize: Callable[[C, list[Row]], list[Row]]
    columns: Columns | Callable[[C], Columns]
    verdict: Callable[[C, Outcome], list[str]] = lambda config, outcome: []
    quick: Callable[[C], C] | None = None
    selects: tuple[str, ...] = ()
    settings: Callable[[C, J], Mapping[str, Any]] = lambda config, job: {}
    seeds: Callable[[C, J], Sequence[int]] = lambda config, job: _seeds(job)
    cost: Callable[[C, J], int] = lambda config, job: 1
    data: Callable[[C], object] = lambda config: None
    details: Callable[[C, list[Row]], Mapping[str, Any]] = lambda config, results: {}
    figures: Callable[[C, Outcome], Figures] = lambda config, outcome: {}
    keys: tuple[str, ...] = ()

    @classmethod
    def of(cls, script: str, **others: Any) -> Experiment[Any, Any]:
        """The experiment of a script, whose ``Config``, ``COLUMNS`` and functions have the names above; and others.

        What loads the data is ``parts_of`` there.

        Raises:
            TypeError: the script lacks something, which the message names.
        """
        names = {field.name: field.name for field in fields(cls) if field.name not in ("keys", "seeds", "selects")}
        names |= {"config": "Config", "columns": "COLUMNS", "data": "parts_of"}
        here = vars(sys.modules[script])
        return cls(**{name: here[its] for name, its in names.items() if its in here} | others)

    def text(self, config: C, rows: list[Row], verdict: list[str]) -> str:
        """Table and verdict."""
        return table(rows, self.columns_of(config)) + "\n\n" + "\n".join(verdict) + "\n"

    def columns_of(self, config: C) -> Columns:
        """Columns of the table."""
        return self.columns(config) if callable(self.columns) else self.columns


def _seeds(job: Any) -> Sequence[int]:
    return job.seeds if hasattr(job, "seeds") else (job.seed,)


def command(experiment: Experiment[C, J], description: str | None) -> None:
    """Run an experiment as the command line says."""
    start(experiment, tyro.cli(experiment.config, description=description))


def start(experiment: Experiment[C, J], config: C) -> None:
    """:func:`run` for a command line: what cannot begin is said in a line, with exit status 2."""
    if config.draw is not None:
        with _in_a_line(FileNotFoundError):
            print(draw(experiment, config.draw))
        return
    with _in_a_line(OSError, ValueError):
        begun = _begin(experiment, config)
    _complete(experiment, *begun)


@contextmanager
def _in_a_line(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run(experiment: Experiment[C, J], config: C) -> None:
    """Train everything, print one table, write the run folder with its figures; or draw those of a finished run.

    Raises:
        FileExistsError: the folder holds a run and ``config.resume`` is false.
        ValueError: the run in the folder was made with another configuration, or its summary is empty or broken; a
            column names no value; ``config.quick`` without a quick configuration.
    """
    if config.draw is not None:
        print(draw(experiment, config.draw))
        return
    _complete(experiment, *_begin(experiment, config))


def _begin(experiment: Experiment[C, J], config: C) -> tuple[C, Run]:
    """The configuration and the run folder of an experiment that can begin."""
    if config.quick:
        if experiment.quick is None:
            raise ValueError("--quick needs an experiment with a quick configuration: Experiment(quick=...)")
        config = keep_given(experiment.quick(config), config)
    check_columns(experiment.columns_of(config))
    experiment.data(config)
    whole = Run(config.run_folder, science(config), resume=config.resume)
    if whole.finished:
        read_summary(whole.folder)  # raises where it is broken
    return config, whole


def _complete(experiment: Experiment[C, J], config: C, whole: Run) -> None:
    """Train what is not there yet; print and write what a run leaves."""
    started = time.time()
    results, summaries = _train_all(experiment, config, whole.folder)
    if experiment.keys:
        folders = [(r, whole.folder / r["name"]) for r in results]
        whole.log([{k: r[k] for k in experiment.keys} | row for r, path in folders for row in read_metrics(path)])
    rows = experiment.summarize(config, results)
    outcome = Outcome(rows, whole.folder, experiment.details(config, results))
    verdict = experiment.verdict(config, outcome)
    if figures := experiment.figures(config, outcome):
        plotting.save({name: make() for name, make in figures.items()}, whole.folder / "figures")
    text = experiment.text(config, rows, verdict)
    whole.write("table.md", text.encode())
    if not whole.finished:
        whole.parts = [{"name": name, **part} for name, s in summaries.items() for part in s["environment"]["parts"]]
        seeds = sorted({seed for r in results if not r.get("tuning") for seed in summaries[r["name"]]["seeds"]})
        whole.finish({"rows": rows, **outcome.details, "verdict": verdict}, seeds=seeds, started=started)
    print(f"{text}\nrun folder: {whole.folder}")


def draw(experiment: Experiment[C, J], folder: Path) -> str:
    """Make table and figures of a finished run again, in its folder, and say what there is.

    Raises:
        FileNotFoundError: the folder holds no finished run.
    """
    config = recorded(experiment.config, read_config(folder), folder)
    outcome, verdict = read_outcome(folder)
    text = experiment.text(config, outcome.rows, verdict or experiment.verdict(config, outcome))
    (folder / "table.md").write_text(text)
    lines = []
    for name, make in experiment.figures(config, outcome).items():
        try:
            paths = plotting.save({name: make()}, folder / "figures")
        except FileNotFoundError as error:
            lines.append(f"{name} is not drawn: {error}")
        else:
            lines += [f"{path} is drawn" for path in paths]
    return "\n".join([text, *lines])


def _train_all(experiment: Experiment[C, J], config: C, folder: Path) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The results that are reported, and the summaries of all trainings by name."""
    summaries: dict[str, dict[str, Any]] = {}
    shared = science(config, without=experiment.selects)
    with Workers(config.processes) as workers:

        def complete(jobs: Sequence[Any]) -> list[Row]:
            tasks = []
            for job in jobs:
                settings = {**asdict(job), **shared, **experiment.settings(config, job)}
                seeds, cost = [*experiment.seeds(config, job)], experiment.cost(config, job)
                tasks.append(Task(job, folder / job.name, settings, seeds, cost))
            finished = workers.complete(partial(_train, experiment.train, config), tasks, folder.name)
            summaries.update({task.job.name: summary for task, summary in zip(tasks, finished, strict=True)})
            return [summary["results"] for summary in finished]

        jobs = experiment.jobs(config)
        batch = next(jobs)
        while True:
            try:
                batch = jobs.send(complete(batch))
            except StopIteration as end:
                return end.value, summaries


def _train(train: Callable[..., Mapping[str, Any]], config: Config, task: Task, report: Report) -> None:
    """Train a job in a folder of its own; its results stand in its summary."""
    run = Run(task.folder, task.settings, resume=True)
    run.begin()
    results = train(config, task.job, run, report)
    run.finish({**asdict(task.job), "name": task.job.name, **results}, seeds=task.seeds)
