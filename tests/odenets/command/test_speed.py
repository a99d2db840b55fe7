import pytest
import torch
from torch import nn

from odenets.analysis.memory import measure_memory
from odenets.command.speed import by_hand
from odenets.command.speed.fields import Field
from odenets.command.speed.solves import ROWS, STEPS, prepare
from odenets.command.speed.table import ratio_table


@pytest.fixture
def problem():
    """A smooth field, so that methods of different order agree at the tolerance."""
    torch.manual_seed(0)
    return Field(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))).double(), torch.randn(5, 3).double()


@pytest.mark.parametrize("method", by_hand.FIXED)
def test_loops_by_hand_are_the_methods(problem, method):
    integrated, expected = (prepare(method, who, *problem)() for who in ("by hand", "integrate"))
    torch.testing.assert_close(integrated, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("method", "who"), [(method, who) for method in ("bosh3", "dopri5") for who in ROWS[method]])
def test_solvers_under_error_control_solve_the_same_problem(problem, method, who):
    if who == "torchode":
        pytest.importorskip("torchode")
    expected = by_hand.rk4(*problem, 10 * STEPS)
    torch.testing.assert_close(prepare(method, who, *problem)(), expected, rtol=3e-3, atol=3e-3)


def test_the_loop_under_error_control_meets_its_tolerance(problem):
    expected = by_hand.rk4(*problem, 10 * STEPS)
    torch.testing.assert_close(by_hand.bosh3(*problem, 1e-8, 1e-8), expected, rtol=1e-7, atol=1e-7)


def test_bs23_by_integrate_keeps_no_more_than_field_calls():
    field, x = Field(nn.Sequential(nn.Linear(64, 64), nn.ReLU())), torch.randn(32, 64)
    left = [measure_memory(prepare("bs23", who, field, x)).left for who in ("by hand", "integrate")]
    assert left[1] <= 1.05 * left[0]


def test_rows_become_one_line_with_a_column_for_each_solver():
    row = {"device": "cpu", "field": "f", "backward": False, "method": "bosh3", "evaluations": 10, "floor": 1e-3}
    table = ratio_table([row | {"who": "by hand", "ratio": 1.5}, row | {"who": "odeint", "ratio": 2.0}])
    cells = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert cells[:7] == ["cpu", "f", "forward", "bosh3", "100", "1.50 (10)", "2.00 (10)"]
