"""``odenets bench``: a table of the solvers that are installed, on the device that is there."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from odenets.command import speeds
from odenets.command.speed import solves, timing
from odenets.command.speed.fields import FIELDS, Field
from odenets.command.speed.timing import Case, cases, measure
from odenets.command.speeds import QUICK

CPU = torch.device("cpu")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 1e-9)
    monkeypatch.setattr(timing, "FEWEST", 2)


@pytest.mark.usefixtures("short")
def test_the_table_is_markdown_with_machine_versions_and_threads(run):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    result = run("bench", "--quick", "--seconds", 0, "--threads", 1)
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert result.exit_code == 0
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [line.split("|")[2].strip() for line in table[2:]] == list(QUICK)
    assert f"torch {torch.__version__}" in result.stdout
    assert "threads of torch: 1" in result.stdout
    assert after == 3


@pytest.mark.usefixtures("short")
def test_json_holds_a_row_for_every_solver_that_is_installed(run):
    facts = json.loads(run("bench", "--quick", "--seconds", 0, "--json", "--backward").stdout)
    expected = [(m, who) for m in QUICK for who in solves.ROWS[m] if who not in solves.missing_peers()]
    assert [(row["method"], row["who"]) for row in facts["rows"]] == expected
    assert facts["backward"]
    by = {(row["method"], row["who"]): row for row in facts["rows"]}
    assert by["euler", "integrate"]["evaluations"] == solves.STEPS
    assert all(row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1] for row in facts["rows"])


@pytest.fixture
def small(short, monkeypatch):
    """One field and one method alone."""
    monkeypatch.setattr(speeds, "FIELDS", FIELDS[:1])
    for name in ("QUICK", "ROWS"):
        monkeypatch.setattr(speeds, name, ("euler",))


@pytest.fixture
def threads():
    """Three threads of torch, and those that there were after the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def velocities(monkeypatch):
    """What each call of a field sees: the threads of torch, and its gradients as they come."""
    forward, seen = Field.forward, SimpleNamespace(threads=set(), calls=0, backward=0)

    def spying(self, t, x):
        v = forward(self, t, x)
        seen.threads.add(torch.get_num_threads())
        if torch.is_grad_enabled():
            seen.calls += 1
            v.register_hook(lambda _: setattr(seen, "backward", seen.backward + 1))
        return v

    monkeypatch.setattr(Field, "forward", spying)
    return seen


@pytest.mark.usefixtures("small", "threads")
@pytest.mark.parametrize(("words", "count"), [([], 1), (["--threads", 2], 2)])
def test_field_calls_run_on_so_many_threads(run, velocities, words, count):
    assert run("bench", "--quick", "--seconds", 0, *words).exit_code == 0
    assert velocities.threads == {count}


@pytest.mark.usefixtures("short")
def test_gradients_are_taken_with_backward_alone(run, velocities):
    assert run("bench", "--quick", "--seconds", 0).exit_code == 0
    assert velocities.backward == velocities.calls == 0
    assert run("bench", "--quick", "--seconds", 0, "--backward").exit_code == 0
    assert velocities.backward > 0


@pytest.mark.parametrize("backward", [False, True])
def test_gradients_are_those_of_solve_and_floor(velocities, backward):
    for case in cases(FIELDS[:1], ["euler"], CPU, backward):
        for work in (case.solve, case.floor):
            velocities.backward = 0
            work()
            assert velocities.backward == backward * solves.STEPS


def ticking(seconds):
    """A clock that goes on by so many seconds whenever it is read."""
    ticks = iter(range(10**9))
    return lambda: seconds * next(ticks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("words", "clock", "seconds"), [([], "processor", 1.0), (["--threads", 2], "wall", 1000.0)])
def test_on_one_thread_of_a_cpu_the_time_of_the_processor_counts(run, monkeypatch, words, clock, seconds):
    clocks = SimpleNamespace(process_time=ticking(1.0), perf_counter=ticking(1000.0))
    monkeypatch.setattr(speeds, "time", clocks)
    facts = json.loads(run("bench", "--quick", "--seconds", 0, "--json", *words).stdout)
    assert facts["machine"]["clock"] == f"{clock} time"
    assert {row["seconds"] for row in facts["rows"]} == {seconds}


@pytest.fixture
def rounds(run, small, monkeypatch):
    """``rounds(...)``: those of a bench whose clock goes on by a quarter of a second whenever it is read."""

    def call(*words):
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=ticking(0.25)))
        (count,) = {row["rounds"] for row in json.loads(run("bench", "--json", *words).stdout)["rows"]}
        return count

    return call


def test_more_seconds_are_more_rounds(rounds):
    assert rounds("--seconds", 0) == 2 < rounds("--seconds", 5) < rounds("--seconds", 10)


def test_without_seconds_it_takes_two_minutes_or_a_quarter_of_one(rounds):
    assert rounds("--seconds", 15) == rounds("--quick") < rounds() == rounds("--seconds", 120)


@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_seconds_that_never_end_are_refused(run, seconds):
    result = run("bench", "--seconds", seconds)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--seconds" in result.stderr


def on_a_terminal(text):
    """The lines that one sees: a carriage return goes to the beginning of a line, whose letters stay."""
    lines = []
    for line in text.split("\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    return lines


@pytest.mark.usefixtures("small")
def test_in_a_terminal_the_progress_leaves_no_trace(run, monkeypatch):
    monkeypatch.setattr(speeds, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=ticking(0.25)))
    result = run("bench", "--quick", "--seconds", 100)
    assert re.search(r"round 1, \d\d s left", result.stderr)
    assert on_a_terminal(result.output)[0].startswith("Processor time of a solve")


def test_a_library_that_is_missing_is_told_and_left_out(run, short, monkeypatch):
    monkeypatch.setattr(solves, "find_spec", lambda name: None)
    result = run("bench", "--quick", "--seconds", 0)
    assert result.exit_code == 0
    assert "torchdiffeq is not installed: pip install torchdiffeq" in result.stdout
    assert "torchdiffeq" not in result.stdout.split("\n\n")[1]


def test_rounds_take_all_cases_in_turns_and_the_first_does_not_count():
    seconds, order = [0.0], []

    def work(name, cost):
        def take():
            order.append(name)
            seconds[0] += cost

        return take

    made = [Case("f", "euler", who, CPU, False, 10, work(who, 3.0), work("floor", 2.0)) for who in ("a", "b")]
    measure(made, 0.0, clock=lambda: seconds[0])
    assert order == ["a", "floor", "b", "floor"] * (1 + timing.FEWEST)
    for case in made:
        row = case.row
        assert (row["rounds"], row["seconds"], row["floor"], row["ratio"]) == (timing.FEWEST, 3.0, 2.0, 1.5)
        assert row["quartiles"] == [1.5, 1.5]


def test_the_floor_is_as_many_field_calls_as_the_solve():
    for case in cases(FIELDS[:1], ["bs23", "dopri5"], CPU, backward=False):
        calls = []
        field = next(each for each in case.floor.__closure__[0].cell_contents.args if isinstance(each, torch.nn.Module))
        handle = field.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        case.floor()
        floor, calls[:] = len(calls), []
        case.solve()
        handle.remove()
        assert floor == len(calls) == case.evaluations


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("words", [["bench"], ["record", "resnet18", "{images}"]], ids=" ".join)
def test_a_gpu_that_is_not_there_is_told(run, images, words):
    result = run(*(word.format(images=images) for word in words), "--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: --device cuda is not here: there is cpu alone")
    assert result.stderr.count("\n") == 1


def test_a_device_that_does_not_exist_is_told(run):
    result = run("bench", "--device", "gpu")
    assert result.exit_code == 2
    assert result.stderr == "Error: --device must be cpu, cuda, cuda:1, mps or auto, got gpu\n"


@pytest.mark.gpu
@pytest.mark.usefixtures("short")
def test_a_gpu_is_measured(run):
    facts = json.loads(run("bench", "--quick", "--seconds", 0, "--json", "--device", "cuda").stdout)
    assert facts["machine"]["device"] == torch.cuda.get_device_name(0)
    assert facts["machine"]["clock"] == "wall time"
