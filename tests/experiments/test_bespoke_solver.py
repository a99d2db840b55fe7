"""The experiment on learned solvers, on few starts."""

import pytest
import torch
from bespoke_solver import EXPERIMENT, FIELDS, Config, field_of, learn, starts_of, steps_of

from lab.experiment import run
from odenets.training.runs import read_summary
from solvers import get_tableau, integrate


def test_a_run_leaves_its_table_and_figures(tmp_path, capsys):
    run(EXPERIMENT, Config(quick=True, budgets=(10,), workers=1, output=tmp_path))
    assert "of the best other" in capsys.readouterr().out
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [row["method"] for row in rows] == 2 * ["learned", "untrained", "bs23", "rk4", "dopri5"]
    assert [row["evaluations"] for row in rows[:5]] == [10, 10, 12, 12, 12]
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"pendulum", "circles"}


def test_others_get_a_step_more_where_the_budget_is_no_multiple():
    steps = [steps_of(get_tableau(name), 20) for name in ("bs23", "rk4", "dopri5")]
    assert steps == [7, 5, 4]


def test_starts_are_different_ones():
    for field in FIELDS:
        parts = starts_of(Config(starts=50), field, 0)
        assert [len(part) for part in parts] == [50, 50, 200]
        assert len(torch.cat(parts).unique(dim=0)) == 300


def test_a_learned_solver_is_nearer_than_its_start_and_rk4_on_new_starts():
    config = Config(starts=64, iterations=150)
    field = field_of(config, "pendulum", 0)
    x, _, fresh = starts_of(config, "pendulum", 0)
    exact = [integrate(field, one, 0.0, 3.0, solver="dopri8", steps=50).x1 for one in (x, fresh)]

    def solve(x, solver, steps=2):
        return integrate(field, x, 0.0, 3.0, solver=solver, steps=steps).x1

    learned = learn(config, 2, 0.03, lambda solver: integrate(field, x, 0.0, 3.0, solver=solver, steps=2), exact[0])
    error = (solve(fresh, learned.tableau()) - exact[1]).norm()
    assert error < 0.5 * (solve(fresh, "rk4", 3) - exact[1]).norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": (12,)}, "budgets must be multiples of 5"),
        ({"orders": (3,)}, "orders must be 1 or 2"),
        ({"fields": ("lorenz",)}, "fields must be among"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
