"""The command's page shows what the command prints."""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from odenets.command.speed import timing
from odenets.command.speed.fields import FIELDS
from odenets.command.speed.solves import COLUMNS, ROWS

PAGE = Path(__file__).parents[3] / "docs" / "command.md"
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def words(text):
    """What is printed without numbers, machine and spaces."""
    text = re.sub(r" on \w+ \(.*\)$", "", text, flags=re.MULTILINE)
    return re.sub(r"-?\d[\d.e+-]*", "#", text).split()


def page(command):
    """What the page says that a command prints, by line."""
    (text,) = [text for _, text in BLOCKS if text.startswith(f"$ odenets {command}\n")]
    return text.splitlines()[1:]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_it_says_that_record_and_detect_print_is_printed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, tried = {}, 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        command, printed = text.removeprefix("$ odenets ").split("\n", 1)
        if command.startswith(("record", "detect")) and not printed.startswith("Error"):
            result = run(*shlex.split(command), "--device", "cpu")
            assert words(result.output) == words(printed)
            tried += 1
    assert tried == 3


def test_the_parts_of_what_info_prints_are_those_of_the_page(run):
    heads = ["Extras", "Devices", "Kernels of solvers.reductions"]
    for printed in (page("info"), run("info").stdout.splitlines()):
        assert [line for line in printed if line in heads] == heads


def test_the_kernels_that_info_tells_are_those_of_the_page(run):
    lines = page("info")
    kernels = lines[lines.index("Kernels of solvers.reductions") + 1 :]
    assert len(kernels) == 3
    assert set(kernels) <= set(run("info").stdout.splitlines())  # a GPU has lines of its own


@pytest.fixture
def bench(run, monkeypatch):
    """The lines of a short bench."""
    monkeypatch.setattr(timing, "SHORTEST", 1e-9)
    return run("bench", "--quick", "--seconds", 0).stdout.splitlines()


def test_the_heading_of_bench_is_that_of_the_page(bench):
    assert words(bench[0]) == words(page("bench")[0])
    assert bench[0].partition("(field calls)")[2] == page("bench")[0].partition("(field calls)")[2]


def test_the_table_of_bench_has_the_lines_and_columns_of_the_page(bench):
    columns, _, *lines = (cells(line) for line in page("bench") if line.startswith("|"))
    assert [(line[0], line[1]) for line in lines] == [*product(FIELDS, ROWS)]
    assert columns == ["field", "method", "one call (µs)", *COLUMNS]
    assert set(cells(bench[2])) <= set(columns)  # some libraries may not be installed
