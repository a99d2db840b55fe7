"""``odenets bench``: a table of the solvers that are installed, on the device that is there."""

import json

import pytest
import torch

from odenets.command.speed import solves, timing
from odenets.command.speed.fields import FIELDS
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
