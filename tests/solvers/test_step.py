import math

import numpy as np
import pytest
import torch
from scipy.integrate import RK23, RK45

from solvers import ButcherTableau, get_tableau, rk_step
from solvers.runge_kutta import step_state
from tests.counting import Operations
from tests.solvers.problems import D

NAMES = [
    "euler", "midpoint", "heun", "heun3", "rk4", "rk4_38", "fehlberg2", "bs23", "dopri5", "tsit5", "dopri8",
]  # fmt: skip


LATE = {("rk4_38", 4), ("tsit5", 4)}  # their leading error terms nearly cancel on this problem at coarser steps


def field(t, x):
    return -x + math.cos(3 * t)


def slope(sizes, errors):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def carried_on(tableau, name):
    """The method whose solution is the embedded output ``name``."""
    solution = tableau.solution(name)
    return ButcherTableau(name, solution.order, tableau.c, tableau.a, solution.b)


@pytest.mark.parametrize(
    ("method", "output"), [(name, output) for name in NAMES for output in get_tableau(name).outputs]
)
def test_every_output_converges_at_its_order(method, output):
    """On a non-autonomous problem, where a tableau with shifted stage times is of order 1."""
    tableau = carried_on(get_tableau(method), output)
    counts = [256, 512, 1024] if (method, tableau.order) in LATE else [128, 256, 512]
    counts, errors = [24, 32, 48] if tableau.order > 5 else counts, []
    for n in counts:
        x, worst = torch.ones(1, 1, dtype=D), 0.0
        for i in range(n):
            x = rk_step(lambda t, x: -3 * math.cos(3 * t) * x, 2 * i / n, x, 2 / n, tableau).x1
            worst = max(worst, abs(x.item() - math.exp(-math.sin(6 * (i + 1) / n))))
        errors.append(worst)
    assert slope([1 / n for n in counts], errors) == pytest.approx(
        tableau.order, abs=0.1 if tableau.order < 6 else 0.15
    )


def test_bs23_error_falls_with_h_cubed_when_tied_and_with_h_when_untied():
    x = torch.randn(8, 3, dtype=D)
    matrices = [torch.randn(3, 3, dtype=D) for _ in range(4)]
    untied = [lambda t, x, a=a: torch.sin(x @ a) for a in matrices]
    bs23 = get_tableau("bs23")
    for fields, ratio, tolerance in ((untied[0], 8, 1), (untied, 2, 0.1)):
        coarse, fine = (rk_step(fields, 0.0, x, h, bs23).error().norm() for h in (0.02, 0.01))
        assert coarse / fine == pytest.approx(ratio, abs=tolerance)


@pytest.mark.parametrize(("name", "order"), [("bs23", 3), ("dopri5", 4), ("tsit5", 4), ("dopri8", 5)])
def test_the_interpolant_meets_both_ends_and_its_order_between(name, order):
    def field(t, x):
        return -3 * math.cos(3 * t) * x

    sizes, errors = [0.2, 0.1, 0.05] if order == 5 else [0.1, 0.05, 0.025], []
    for h in sizes:
        step = rk_step(field, 0.4, torch.tensor([[math.exp(-math.sin(1.2))]], dtype=D), h, get_tableau(name))
        torch.testing.assert_close(step.at(0.0), step.x0)
        torch.testing.assert_close(step.at(1.0), step.x1)
        thetas = [0.15, 0.4, 0.55, 0.85]
        errors.append(max(abs(step.at(c).item() - math.exp(-math.sin(3 * (0.4 + c * h)))) for c in thetas))
    assert slope(sizes, errors) > order + 0.7


@pytest.mark.parametrize(("name", "scipys"), [("bs23", RK23), ("dopri5", RK45)])
def test_the_interpolant_is_scipys(name, scipys):
    np.testing.assert_allclose(get_tableau(name).dense, np.pad(scipys.P, ((0, 0), (0, 0))), atol=1e-15)


def test_the_interpolant_takes_a_tensor_and_its_gradient_is_the_velocity_at_the_ends():
    step = rk_step(field, 0.3, torch.ones(1, 1, dtype=D), 0.1, get_tableau("bs23"))
    for theta, stage in ((0.0, 0), (1.0, 3)):
        theta = torch.tensor(theta, dtype=D, requires_grad=True)
        torch.testing.assert_close(step.at(theta), step.at(theta.item()))
        (slope,) = torch.autograd.grad(step.at(theta).sum(), theta)
        torch.testing.assert_close(slope / 0.1, step.stages[stage].sum())
    with pytest.raises(ValueError, match="rk4 has no interpolant of its own"):
        rk_step(field, 0.3, torch.ones(1, 1), 0.1, get_tableau("rk4")).at(0.5)
    open_ended = rk_step(field, 0.3, torch.ones(1, 1), 0.1, get_tableau("bs23"), closing=False)
    with pytest.raises(ValueError, match=r"at\(\) needs the closing stage of bs23"):
        open_ended.at(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_the_difference_of_the_outputs(name):
    tableau = get_tableau(name)
    step = rk_step(field, 0.3, torch.randn(4, 2, dtype=D), 0.1, tableau)
    torch.testing.assert_close(step.residue, (step.x1 - step.x0) / 0.1)
    if tableau.low is None:
        with pytest.raises(ValueError, match="carries no embedded error"):
            step.error()
    else:
        torch.testing.assert_close(step.error(), step.x1 - step.output(tableau.low))


@pytest.mark.parametrize(
    ("name", "with_error", "most"),
    [("euler", False, 1), ("midpoint", False, 2), ("rk4", False, 7), ("bs23", False, 5), ("bs23", True, 9)],
)
def test_operations_per_step_outside_the_field(name, with_error, most):
    x, p = torch.randn(4, 3), torch.randn(4, 3)
    with Operations() as operations:
        step = rk_step(lambda t, x: p, 0.0, x, 0.1, get_tableau(name), closing=with_error)
        if with_error:
            step.error()
    assert operations.total <= most


def test_closing_stage_is_optional_and_reused():
    bs23 = get_tableau("bs23")
    x = torch.randn(2, 2)
    short, full = (rk_step(field, 0.0, x, 0.1, bs23, closing=closing) for closing in (False, True))
    assert (len(short.stages), len(full.stages)) == (3, 4)
    torch.testing.assert_close(short.x1, full.x1, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs the closing stage"):
        short.error()
    with pytest.raises(ValueError, match="needs the closing stage"):
        short.output("order2")
    again = rk_step(field, 0.1, full.x1, 0.1, bs23, full.stages[-1])
    assert again.stages[0] is full.stages[-1]
    torch.testing.assert_close(again.x1, rk_step(field, 0.1, full.x1, 0.1, bs23).x1)


def test_step_size_may_be_a_tensor_per_sample():
    x = torch.randn(5, 3, dtype=D)
    sizes = torch.rand(5, 1, dtype=D)
    together = rk_step(lambda t, x: torch.sin(x), 0.0, x, sizes, get_tableau("bs23"))
    for i in range(5):
        alone = rk_step(lambda t, x: torch.sin(x), 0.0, x[i : i + 1], sizes[i].item(), get_tableau("bs23"))
        torch.testing.assert_close(together.x1[i : i + 1], alone.x1)
        torch.testing.assert_close(together.error()[i : i + 1], alone.error())


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda t, x: x[:1], ValueError, r"keep the shape of x: stage 0 has shape \(1, 2\), x has \(3, 2\)"),
        (lambda t, x: x.double(), TypeError, r"keep the dtype of x: stage 0 is torch.float64"),
        (lambda t, x: x.to("meta"), ValueError, r"keep the device of x: stage 0 is on meta"),
        (lambda t, x: [x], TypeError, r"must return a tensor, got list"),
    ],
)
def test_a_field_that_changes_its_input_is_named(bad, error, message):
    with pytest.raises(error, match=message):
        rk_step(bad, 0.0, torch.randn(3, 2), 0.1, get_tableau("bs23"))


def test_one_field_per_stage_must_fit_the_tableau():
    with pytest.raises(ValueError, match="one callable or one per stage of bs23, got 2"):
        rk_step([field, field], 0.0, torch.randn(3, 2), 0.1, get_tableau("bs23"))


class Reusing:
    """A field that writes every velocity into the same memory."""

    def __init__(self, x, view=False):
        self.buffer, self.view = torch.empty_like(x), view

    def __call__(self, t, x):
        torch.mul(x, -1.0, out=self.buffer)
        return self.buffer.view_as(x) if self.view else self.buffer


def late(t, x):
    """Writes into its input, but for the first stage."""
    return -(x.relu_() if t > 0 else x.relu())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda t, x: -x.relu_(), "must not write into its input: stage 0 changed x in place.*clone"),
        (lambda t, x: x.mul_(-1), "stage 0 changed x in place"),
        (lambda t, x: -x.view(-1)[:2].zero_().sum() * torch.ones_like(x), "stage 0 changed x in place"),
        ([lambda t, x: -x] * 3 + [lambda t, x: x.neg_()], "stage 3 changed x in place"),
        (Reusing(torch.ones(3, 2)), "must not write into what it has returned: stage 0 was overwritten"),
        (Reusing(torch.ones(3, 2), view=True), "stage 0 was overwritten"),
    ],
)
def test_a_field_that_writes_where_it_must_not_is_named_with_its_stage(bad, message):
    with pytest.raises(ValueError, match=message):
        rk_step(bad, 0.0, torch.randn(3, 2), 0.1, get_tableau("bs23"))


@pytest.mark.parametrize("name", ["euler", "bs23", "rk4"])
def test_writes_into_the_points_between_the_states_do_no_harm(name):
    x = torch.randn(3, 2)
    before = x.clone()
    step = rk_step(late, 0.0, x, 0.1, get_tableau(name), closing=False)
    torch.testing.assert_close(step.x1, rk_step(lambda t, x: -x.relu(), 0.0, x, 0.1, get_tableau(name)).x1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("same", [lambda t, x: x, lambda t, x: x.view_as(x), lambda t, x: x.detach()])
def test_a_field_may_return_its_input(same, requires_grad):
    x = torch.randn(3, 2, dtype=D, requires_grad=requires_grad)
    x1 = x
    for i in range(10):
        x1 = rk_step(same, i / 10, x1, 0.1, get_tableau("dopri5")).x1
    torch.testing.assert_close(x1, math.e * x, rtol=1e-6, atol=0)


def test_a_field_may_return_one_tensor_again_and_again():
    p = torch.ones(3, 2)
    step = rk_step(lambda t, x: p, 0.0, torch.zeros(3, 2), 0.5, get_tableau("bs23"))
    torch.testing.assert_close(step.x1, 0.5 * p)
    with torch.inference_mode():
        constant = torch.ones(3, 2)
    torch.testing.assert_close(
        rk_step(lambda t, x: constant, 0.0, torch.zeros(3, 2), 0.5, get_tableau("bs23")).x1, 0.5 * p
    )


def uncounted(way, function):
    """Called where torch counts no writes."""
    if way == "vmap":
        return lambda x: torch.vmap(function)(x[:, None]).squeeze(1)
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("way", ["vmap", "compile"])
def test_where_torch_counts_no_writes_the_field_gets_copies(way):
    x = torch.randn(3, 2)
    before = x.clone()
    bs23 = get_tableau("bs23")
    result = uncounted(way, lambda x: rk_step(lambda t, x: x.relu_() * -2, 0.0, x, 0.1, bs23).x1)(x)
    torch.testing.assert_close(result, rk_step(lambda t, x: x.relu() * -2, 0.0, before, 0.1, bs23).x1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_writes_are_noticed_in_inference_mode(where):
    x, bs23 = torch.randn(3, 2), get_tableau("bs23")
    reusing = Reusing(x)
    with torch.inference_mode():
        x0 = x + 0 if where == "inside" else x.clone()
        with pytest.raises(ValueError, match="must not write into its input: stage 0"):
            rk_step(lambda t, x: x.relu_() * -2, 0.0, x0.clone(), 0.1, bs23)
        with pytest.raises(ValueError, match="must not write into what it has returned: stage"):
            rk_step(reusing, 0.0, x0, 0.1, bs23)
        for step in (rk_step, step_state):
            end = step(lambda t, x: -x, 0.0, x0, 0.1, bs23)
            end = end if step is step_state else end.x1
            torch.testing.assert_close(end, step_state(lambda t, x: -x, 0.0, x, 0.1, bs23))
            assert not end.requires_grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_stage_that_begins_at_x_again_does_not_overwrite_it(mode):
    """A method whose second stage reads no other: its point is x itself."""
    tableau = ButcherTableau("twice", order=1, c=(0.0, 0.0), a=((), (0.0,)), b=(0.5, 0.5))
    field, x = [lambda t, x: x + 1.0, lambda t, x: x.add_(1.0)], torch.ones(2, 3)
    with mode(), pytest.raises(ValueError, match="must not write into its input: stage 1"):
        rk_step(field, 0.0, x, 1.0, tableau)
