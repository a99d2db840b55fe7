"""Tables of rows that do not have all values."""

import numpy as np
import pytest

from lab.statistics import Interval
from lab.tables import table

ROWS = [
    {"name": "plain", "accuracy": Interval(90.0, 1.5, 5), "thesis": None, "meets": None},
    {"name": "other", "accuracy": Interval(91.0, 1.0, 5), "difference": Interval(1.0, 0.5, 5), "meets": False},
]


def lines(columns):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table(ROWS, columns).splitlines()]


def test_what_a_row_lacks_stays_empty_and_empty_columns_are_left_out():
    columns = {"": "{name}", "%": "{accuracy:.1f}", "-": "{difference:.2f}", "meets": "{meets}", "thesis": "{thesis}"}
    shown = lines(columns)
    assert shown[0] == ["", "%", "-", "meets"]
    assert shown[2:] == [["plain", "90.0 ± 1.5", "", ""], ["other", "91.0 ± 1.0", "1.00 ± 0.50", "no"]]


def test_a_function_makes_a_cell_where_it_finds_what_it_asks_for():
    assert lines({"sum": lambda row: row["accuracy"].mean + row["difference"].mean})[2:] == [[""], ["92.0"]]


@pytest.mark.parametrize("truth", [bool, np.bool_])
def test_truth_values_are_words(truth):
    rows = [{"ok": truth(True)}, {"ok": truth(False)}]
    assert [line.strip("| ") for line in table(rows, {"ok": "{ok}"}).splitlines()[2:]] == ["yes", "no"]


def test_a_function_gets_truth_values_as_they_are():
    rows = [{"action": True, "n": 1}, {"action": False, "n": 2}]
    shown = table(rows, {"n": "{n}", "": lambda row: "+ action" if row["action"] else ""})
    assert [line.strip("| ").endswith("+ action") for line in shown.splitlines()[2:]] == [True, False]


@pytest.mark.parametrize("format", ["name", "{{name}}", "{}"])
def test_a_format_that_names_no_value_is_refused(format):
    with pytest.raises(ValueError, match="column 'network' must be a format that names a value"):
        lines({"network": format})
