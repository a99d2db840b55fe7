import math

import numpy as np
import pytest
import torch

from solvers import MaxStepsError, NonFiniteError, Tolerance, integrate
from tests.solvers.problems import D, lotka


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_the_first_step_is_looked_for_within_the_solve(control):
    """A slow start, from which the usual guess would go to where the field is not defined, or overflows."""
    times = []

    def field(t, x):
        times.append(float(torch.as_tensor(t).max()))
        return 1e-4 * torch.exp(torch.as_tensor(5 * t)) + 0 * x

    growth = integrate(field, torch.ones(2, 1), 0.0, 1.0, control=control)
    torch.testing.assert_close(growth.x1, torch.full((2, 1), 1 + 1e-4 * (math.exp(5) - 1) / 5), rtol=1e-3, atol=0)
    assert max(times) <= 1
    circle = integrate(
        lambda t, x: 1e-4 * (1 - torch.as_tensor(t).double() ** 2).sqrt() + 0 * x, torch.ones(2, 1, dtype=D), 0.0, 1.0,
        control=control,
    )  # fmt: skip
    torch.testing.assert_close(circle.x1, torch.full((2, 1), 1 + 1e-4 * math.pi / 4, dtype=D), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_a_sample_begins_with_the_step_of_a_batch_of_its_own(dtype):
    x0 = torch.tensor([[1.0, 1.0], [0.1, 2.0], [1e-7, 1e-7]], dtype=dtype)
    options = {"tolerance": Tolerance(1e-6, 1e-8), "keep": "states"}
    together = integrate(lotka, x0, 0.0, 1.0, control="sample", **options).times[1]
    alone = [integrate(lotka, x[None], 0.0, 1.0, **options).times[1] for x in x0]
    np.testing.assert_allclose(together.numpy(), alone, rtol=1e-12 if dtype == D else 1e-6)


@pytest.mark.parametrize("limits", [{"rtol": 0.0, "atol": 1e-12}, {"rtol": 1e-20, "atol": 1e-12}])
def test_a_tolerance_too_small_for_the_precision_is_named(limits):
    """State and field are finite, and 1e9 / 1e-12 has no square in float32."""
    x0, tolerance = torch.full((2, 1), 1e9), Tolerance(**limits)
    message = r"^tolerance is too small for float32, got rtol=.* atol=1e-12: .* float64, or Tolerance\(first_step="
    with pytest.raises(NonFiniteError, match=message):
        integrate(lambda t, x: -x, x0, 0.0, 1.0, tolerance=tolerance)
    limited = Tolerance(**limits, max_steps=3)
    with pytest.raises(MaxStepsError):
        integrate(lambda t, x: -x, x0.double(), 0.0, 1.0, tolerance=limited)
