import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lab.runs import Run
from lab.workers import Task, Workers


def work(item, report):
    report(1)
    while item is None:
        time.sleep(1)
        for _ in range(20_000):  # more than a pipe holds unread
            report(1)
    if item < 0:
        raise ArithmeticError("item below zero")
    return item * item, os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_results_come_in_order_from_processes_of_so_many_threads(workers):
    before = torch.get_num_threads()
    with Workers(workers) as pool:
        first = pool.map(work, [3, 1, 2], total=3, label="first")
        second = pool.map(work, [4], total=1, label="second")
    assert [value for value, _, _ in first + second] == [9, 1, 4, 16]
    assert {threads for _, _, threads in first} == {1}
    assert all((pid == os.getpid()) == (workers == 1) for _, pid, _ in first)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("workers", "items"), [(1, [1, -1, 2]), pytest.param(2, [None, -1], marks=pytest.mark.slow)])
def test_an_error_in_a_job_comes_through_and_ends_the_others(workers, items):
    before = set(multiprocessing.active_children())
    with pytest.raises(ArithmeticError, match="item below zero"), Workers(workers) as pool:
        pool.map(work, items, total=3, label="jobs")
    deadline = time.monotonic() + 60
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Workers(0)


def task(folder, cost):
    return Task(None, folder, {}, [], cost)


def test_jobs_that_would_write_over_one_another_are_refused(tmp_path):
    with Workers(1) as pool, pytest.raises(ValueError, match=r"a folder of their own, got twice: .*1$"):
        pool.complete(lambda task, report: None, [task(tmp_path / str(job % 2), job) for job in (1, 2, 3)], "jobs")


def test_a_job_that_leaves_no_run_is_told(tmp_path):
    with Workers(1) as pool, pytest.raises(FileNotFoundError, match="holds no finished run"):
        pool.complete(lambda task, report: None, [task(tmp_path / "1", 1)], "jobs")


SLEEPER = """
import os, time
from lab.workers import Workers
def work(item, report):
    print(os.getpid(), flush=True)
    time.sleep(3600)
if __name__ == "__main__":
    with Workers(2) as pool:
        pool.map(work, [0], total=1, label="sleep")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this checkout and its laboratory
    command = [sys.executable, script]
    with subprocess.Popen(command, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 600
        while _alive(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_finished_jobs_are_read_and_the_others_run_dearest_first(tmp_path):
    done = []

    def leave(task, report):
        Run(task.folder, {}).finish({"square": task.cost**2}, seeds=[0])
        done.append(task.cost)

    tasks = [task(tmp_path / str(job), job) for job in (1, 3, 2)]
    leave(tasks[1], None)
    with Workers(1) as workers:
        found = workers.complete(leave, tasks, "jobs")
    assert [summary["results"]["square"] for summary in found] == [1, 9, 4]
    assert done == [3, 2, 1]
    (tasks[0].folder / "summary.json").write_text("")
    with Workers(1) as workers, pytest.raises(ValueError, match=r"1.summary\.json' is empty or broken .*; delete it"):
        workers.complete(leave, [*tasks, task(tmp_path / "4", 4)], "jobs")
    assert done == [3, 2, 1]
