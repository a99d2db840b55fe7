"""The command's page shows what the command prints."""

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "command.md"
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def words(text):
    """What is printed without numbers, machine and spaces."""
    text = re.sub(r" on \w+ \(.*\)$", "", text, flags=re.MULTILINE)
    return re.sub(r"-?\d[\d.e+-]*", "#", text).split()


def test_what_it_says_that_record_prints_is_printed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, tried = {}, 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
            continue
        command, printed = text.removeprefix("$ odenets ").split("\n", 1)
        if command.startswith("record") and not printed.startswith("Error"):
            result = run(*shlex.split(command), "--device", "cpu")
            assert words(result.output) == words(printed)
            tried += 1
    assert tried == 2


def test_the_parts_of_what_info_prints_are_those_of_the_page(run):
    heads = ["Extras", "Devices", "Kernels of solvers.reductions"]
    (page,) = [text for _, text in BLOCKS if text.startswith("$ odenets info\n")]
    for printed in (page, run("info").stdout):
        assert [line for line in printed.splitlines() if line in heads] == heads
