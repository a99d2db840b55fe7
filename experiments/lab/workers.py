"""Independent trainings side by side in worker processes, under one progress bar."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from odenets.training.runs import read_summary

__all__ = ["Report", "Task", "Workers"]

T = TypeVar("T")
R = TypeVar("R")

Report = Callable[[int], object]
"""Tells the progress bar how many units of work were done."""

_progress: Any = None


@dataclass(frozen=True)
class Task:
    """A job on its way to a worker; its cost is in units of the progress bar."""

    job: Any
    folder: Path
    settings: dict[str, Any]
    seeds: list[int]
    cost: int


class Workers:
    """Processes for independent jobs, to be used in a ``with`` statement.

    Each computes on one thread, so that results do not depend on how many workers there are, where each job seeds what
    it draws. A worker ends when the process that started it does, however that one ended, and at once when the ``with``
    statement ends by an error.

    Args:
        workers: number of processes; 1 works in this one.

    Raises:
        ValueError: fewer than one worker.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            self._progress = context.SimpleQueue()
            alive, self._alive = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(workers, context, _start, (self._progress, alive))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.workers > 1:
            if kind is not None:
                self._alive.close()  # ends the workers, also those that wait to report
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def map(self, work: Callable[[T, Report], R], items: Sequence[T], *, total: int, label: str) -> list[R]:
        """``[work(item, report) for item in items]``, in that order, with a progress bar.

        Args:
            work: a function at the top of a module; it calls ``report(n)`` when n units of work are done.
            items: picklable arguments, one per job, begun in order.
            total: units of work of all jobs together.
            label: of the progress bar.

        Raises:
            Exception: the first that a job raised; jobs not yet begun are dropped.
        """
        with tqdm(total=total, desc=label, unit="epoch") as bar:
            if self.workers == 1:
                before = torch.get_num_threads()
                torch.set_num_threads(1)
                try:
                    return [work(item, bar.update) for item in items]
                finally:
                    torch.set_num_threads(before)
            futures = [self._pool.submit(_run, work, item) for item in items]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not self._progress.empty():
                    bar.update(self._progress.get())
                for future in done:
                    future.result()
            return [future.result() for future in futures]

    def complete(
        self, work: Callable[[Task, Report], object], tasks: Sequence[Task], label: str
    ) -> list[dict[str, Any]]:
        """The summaries of tasks that each leave a finished run in a folder; those that are there are read, not run.

        Args:
            work, tasks, label: as for :meth:`map`; the tasks that cost most are begun first.

        Raises:
            ValueError: two tasks have one folder, or the summary in one is empty or broken; nothing is run.
            FileNotFoundError: a task leaves no finished run.
        """
        folders = [task.folder for task in tasks]
        if twice := sorted({str(path) for path in folders if folders.count(path) > 1}):
            raise ValueError(f"jobs must each have a folder of their own, got twice: {', '.join(twice[:4])}")
        there = {path: read_summary(path) for path in folders if (path / "summary.json").exists()}
        todo = sorted((task for task in tasks if task.folder not in there), key=lambda task: -task.cost)
        if todo:
            self.map(work, todo, total=sum(task.cost for task in todo), label=label)
        return [there.get(path) or read_summary(path) for path in folders]


def _start(progress: Any, alive: Any) -> None:
    global _progress
    _progress = progress
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel, alive])
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(work: Callable[[T, Report], R], item: T) -> R:
    return work(item, _progress.put)
