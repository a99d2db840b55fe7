"""Times at the edges of a solve, and those that are none."""

import math
from functools import partial

import pytest
import torch

from solvers import Tolerance, integrate
from tests.solvers.problems import CONTROLS, EACH, X0, D, Net, close, constant, growth

FINE = {"tolerance": Tolerance(1e-9, 1e-10)}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
def test_no_time_at_all(control, gradient):
    if control and gradient == "backsolve":
        pytest.skip("backsolve has one time for the batch")
    x0 = X0.clone().requires_grad_()
    solution = integrate(Net(), x0, 1.0, 1.0, at=[1.0, 1.0], gradient=gradient, **control)
    assert torch.equal(solution.states, torch.stack([X0, X0]))
    assert torch.autograd.grad(solution.states.sum(), x0)[0].eq(2).all()


def test_intervals_too_short_for_the_precision_are_over_at_once():
    end = math.nextafter(math.nextafter(1.0, 2), 2)
    at = [[1.0, math.nextafter(1.0, 2), end]] * 3
    x0 = X0.float()
    states = integrate(lambda t, x: x, x0, 1.0, end, at=at, control="sample").states
    assert states.isfinite().all()
    torch.testing.assert_close(states, x0[:, None].expand(3, 3, 2))


@pytest.mark.parametrize("options", [{"steps": 7}, *CONTROLS])
@pytest.mark.parametrize("end", [0.3, 1e-9, 1e4, 7.1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_time_of_an_even_grid_is_reached(options, end, dtype):
    at = torch.linspace(0, end, 51, dtype=dtype)
    states = integrate(constant, torch.zeros(1, 1, dtype=D), 0.0, end, at=at, **options).states
    torch.testing.assert_close(states[:, 0, 0], at.to(D), rtol=1e-6, atol=0)


def test_samples_with_times_of_their_own_share_output_times_that_lie_in_all():
    solve = partial(integrate, growth, X0, control="sample")
    t0, t1 = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, 2.0, 1.5])
    solution = solve(t0, t1, at=[1.0, 1.5], **FINE)
    start = t0.to(D)[None, :, None]
    close(solution.states, X0 * ((solution.times[:, None, None] ** 2 - start**2) / 2).exp())
    with pytest.raises(ValueError, match=r"at of sample 1 must lie between t0 = 0\.5 and t1 = 2"):
        solve(t0, t1, at=[1.0, 2.5])
    with pytest.raises(ValueError, match="at of sample 1 must lie"):
        solve(t0, t1, at=[0.25, 1.5])


BAD = [
    (0.5, TypeError, "at must be a tensor, an array or a list of times, got float"),
    ("0.5", TypeError, "got str"),
    ({0.5}, TypeError, "got set"),
    (["0.5"], TypeError, "at must hold real numbers"),
    ([None], TypeError, "at must hold real numbers"),
    ([True], TypeError, "at must hold real numbers"),
    (torch.tensor([1j]), TypeError, "at must hold real numbers"),
    (torch.tensor([True]), TypeError, "at must hold real numbers"),
    (torch.tensor(0.5), ValueError, r"at must have shape \(n,\)"),
    ([], ValueError, "at must hold at least one time"),
    (torch.zeros(0), ValueError, "at must hold at least one time"),
    ([0.5, 0.4], ValueError, "without turning back, got 0.4 behind 0.5"),
    ([0.5, 1.1], ValueError, "must lie between t0 = 0 and t1 = 1, got 1.1 at index 1"),
    ([-0.1], ValueError, "must lie between"),
    ([0.5, math.nan], ValueError, "must be finite, got nan at index 1"),
    ([math.inf], ValueError, "must be finite"),
    (torch.zeros(3, 1, 1), ValueError, "at must have shape"),
]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("at", "error", "message"), BAD)
def test_bad_times_name_at(at, error, message, control):
    with pytest.raises(error, match=message) as raised:
        integrate(growth, X0, 0.0, 1.0, at=at, **control)
    assert str(raised.value).startswith("at ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": EACH}, "control='sample' takes"),
        ({"at": EACH[:2], "control": "sample"}, r"at must have shape \(n,\) or \(3, n\), got \(2, 3\)"),
        ({"at": [[0.1], [0.2], [0.1, 0.2]], "control": "sample"}, "equally many times for every sample"),
        ({"at": torch.ones(1, requires_grad=True), "gradient": "checkpoint"}, "at must not require a gradient"),
        ({"at": torch.ones(1, requires_grad=True), "gradient": "backsolve"}, "at must not require a gradient"),
    ],
)
def test_what_excludes_each_other_names_at(options, message):
    with pytest.raises(ValueError, match=message):
        integrate(Net(), X0, 0.0, 3.0, **options)


def test_times_that_lose_their_gradient_in_no_time_are_refused():
    with pytest.raises(ValueError, match="at must not require a gradient where t0 = t1"):
        integrate(growth, X0, 1.0, 1.0, at=torch.ones(1, requires_grad=True))


def test_without_gradients_times_may_require_one():
    with torch.no_grad():
        solution = integrate(growth, X0, 0.0, 1.0, at=torch.ones(1, requires_grad=True), gradient="checkpoint")
    assert not solution.states.requires_grad
    assert not solution.times.requires_grad


# what other solvers met


@pytest.mark.parametrize("options", [{"steps": 3}, *CONTROLS])
def test_one_time_alone_gives_the_state_there(options):
    states = integrate(growth, X0, 0.0, 2.0, solver="dopri5", at=[1.0], **options).states
    torch.testing.assert_close(states, X0[None] * math.exp(0.5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", [{"steps": 3}, {}])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
def test_one_time_alone_behind_the_event(options, gradient):
    x0 = X0.clone().requires_grad_()
    more = {"parameters": ()} if gradient == "backsolve" else {}
    solution = integrate(
        lambda t, x: -torch.ones_like(x), x0, 0.0, 3.0, at=[2.5], event=lambda t, x: x.amin(), gradient=gradient,
        **more, **options,
    )  # fmt: skip
    assert solution.states.shape == (1, 3, 2)
    assert solution.states.isnan().all()
    assert torch.autograd.grad(solution.x1.sum(), x0)[0].isfinite().all()


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 3, "solver": "rk4"}, *CONTROLS])
@pytest.mark.parametrize(("t0", "t1"), [(0.1, 0.7), (0.7, 0.1)])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_the_field_is_evaluated_between_t0_and_t1(options, t0, t1, gradient):
    seen = []

    def field(t, x):
        seen.append(torch.as_tensor(t, dtype=D).detach().flatten())
        return -x

    at = [t0, (t0 + t1) / 2, t1]
    integrate(field, X0.clone().requires_grad_(), t0, t1, at=at, gradient=gradient, **options).states.sum().backward()
    times = torch.cat(seen)
    assert times.min() >= min(t0, t1)
    assert times.max() <= max(t0, t1)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("solver", ["rk4", "bs23", "dopri5"])
def test_many_times_in_a_step_give_the_states_that_one_gives(dtype, solver):
    at = torch.linspace(0, 2, 40, dtype=D)
    solve = partial(integrate, growth, X0.to(dtype), 0.0, 2.0, solver=solver, steps=3)
    expected = torch.cat([solve(at=[time]).states for time in at.tolist()])
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(solve(at=at).states, expected, rtol=eps, atol=eps)
    moving = at.clone().requires_grad_()
    torch.testing.assert_close(solve(at=moving).states, expected, rtol=eps, atol=eps)
