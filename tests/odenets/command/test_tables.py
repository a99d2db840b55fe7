"""Tables fit a terminal, and are plain and whole elsewhere."""

import pytest
from rich.console import Console

from odenets.command import tables

ROWS = [[str(m), f"encoder.layers.encoder_layer_{m} [dim] attention", "0.12345", "1.5"] for m in range(2)]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 50 columns."""
    monkeypatch.setattr(tables, "Console", lambda **options: Console(force_terminal=True, width=50, **options))


def printed(capsys):
    tables.print_table(["", "block", "action", "h"], ROWS, sections=[1])
    return capsys.readouterr().out


def test_elsewhere_a_row_is_a_line_of_ascii_whatever_its_length(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = printed(capsys)
    assert text.isascii()
    assert [line.split() for line in text.splitlines()[1:]] == [" ".join(row).split() for row in ROWS]


@pytest.mark.usefixtures("terminal")
def test_in_a_narrow_terminal_names_are_broken_and_numbers_are_not(capsys):
    text = printed(capsys)
    assert text.count("0.12345") == text.count("1.5") == 2
    assert "…" not in text
