import math

import pytest
import torch

from solvers import Tolerance, integrate
from tests.solvers.problems import CONTROLS, D


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rtol": -1.0}, "rtol must be finite and not negative, got -1.0"),
        ({"atol": math.nan}, "atol must be finite"),
        ({"rtol": 0.0, "atol": 0.0}, "must not both be 0"),
        ({"first_step": 0.0}, "first_step must be positive"),
        ({"max_step": 0.0}, "max_step must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"max_steps": math.nan}, "max_steps must be at least 1 and finite"),
        ({"max_steps": math.inf}, "max_steps must be at least 1 and finite"),
    ],
)
def test_tolerances_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Tolerance(**change)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_large_states_take_the_steps_of_small_ones(control):
    small = torch.tensor([[1.0, 0.5], [0.3, -0.2]], dtype=D)
    large = small.repeat(1, 20_000)

    def swing(t, x):
        return torch.stack([x[:, 1::2], -x[:, ::2].sin()], -1).flatten(1)

    tolerance = Tolerance(rtol=1e-6, atol=1e-8)
    one, many = (
        integrate(swing, x, 0.0, 3.0, solver="bs23", control=control, tolerance=tolerance) for x in (small, large)
    )
    assert one.stats.evaluations == many.stats.evaluations
    torch.testing.assert_close(many.x1[:, :2], one.x1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", CONTROLS)
@pytest.mark.parametrize("atol", [0.0, torch.tensor([0.0, 1e-6], dtype=D)])
@pytest.mark.parametrize("repeats", [1, 20_000])
def test_zeros_without_error_are_within_a_relative_tolerance(atol, repeats, options):
    if isinstance(atol, torch.Tensor):
        atol = atol.repeat(repeats)
    x0 = torch.tensor([[0.0, 1.0]], dtype=D).repeat(1, repeats)
    solution = integrate(lambda t, x: -x, x0, 0.0, 1.0, tolerance=Tolerance(1e-6, atol), **options)
    torch.testing.assert_close(solution.x1, x0 / math.e, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["rtol", "atol"])
def test_a_tolerance_per_sample_is_not_taken_for_one_per_feature(name):
    x0, tolerance = torch.ones(3, 3, dtype=D), torch.tensor([1e-2, 1e-5, 1e-8], dtype=D)

    def solve(value):
        tolerances = Tolerance(**{name: value})
        return integrate(lambda t, x: -x, x0, 0.0, 1.0, control="sample", tolerance=tolerances)

    with pytest.raises(ValueError, match=rf"{name} of shape \(3,\) is one per feature .* \(3, 1\) for one per sample"):
        solve(tolerance)
    accepted = solve(tolerance[:, None]).sample_stats.accepted
    assert accepted[0] < accepted[2] or name == "atol"
    assert len(set(solve(tolerance[None]).sample_stats.accepted.tolist())) == 1
