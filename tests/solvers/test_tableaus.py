import math
import pickle

import pytest
import torch

from solvers import ButcherTableau, Embedded, Tolerance, get_tableau, integrate, rk_step
from tests.counting import Counted
from tests.solvers.problems import D

NAMES = ["euler", "midpoint", "heun", "heun3", "rk4", "rk4_38", "fehlberg2", "bs23", "dopri5", "tsit5"]


def field(t, x):
    return torch.sin(x) + t


@pytest.mark.parametrize("name", NAMES)
def test_solution_weights_are_among_the_outputs(name):
    tableau = get_tableau(name)
    assert tableau.b in [solution.b for _, solution in tableau.embedded]
    assert pickle.loads(pickle.dumps(tableau)) == tableau


def test_bs23_is_the_published_pair():
    bs23 = get_tableau("bs23")
    assert bs23.outputs == ("euler", "midpoint", "order2", "order3")
    assert bs23.error_weights == pytest.approx((-5 / 72, 1 / 12, 1 / 9, -1 / 8), abs=1e-16)
    assert (bs23.order, bs23.error_order, bs23.interior) == (3, 2, 3)


@pytest.mark.parametrize(("name", "fsal"), [("euler", False), ("rk4", False), ("bs23", True), ("dopri5", True)])
def test_fsal_is_derived(name, fsal):
    assert get_tableau(name).fsal is fsal


def test_names():
    assert get_tableau("bosh3") is get_tableau("bs23")
    assert get_tableau(get_tableau("heun")) is get_tableau("heun")
    with pytest.raises(ValueError, match=r"unknown solver 'rk5'.*euler.*dopri5.*bosh3"):
        get_tableau("rk5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order must be at least 1"),
        ({"c": (0.0,)}, "one entry per stage"),
        ({"c": (0.0, 0.4)}, r"row 1 of a sums to 0.5, but c\[1\] is 0.4"),
        ({"a": ((), (0.25, 0.25))}, "row 1 of a must have 1 entries"),
        ({"b": (0.5, 0.4)}, "b must sum to 1"),
        ({"embedded": (("low", Embedded(1, (1.0,))),)}, "must have 2 weights"),
        ({"embedded": (("low", Embedded(1, (1.0, 1.0))),)}, "weights of embedded 'low' must sum to 1"),
        ({"low": "missing"}, "low must name an embedded solution"),
    ],
)
def test_inconsistent_coefficients_are_rejected(change, message):
    good = {"name": "mine", "order": 2, "c": (0.0, 0.5), "a": ((), (0.5,)), "b": (0.0, 1.0)}
    ButcherTableau(**good)
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**(good | change))


def test_unknown_output():
    with pytest.raises(ValueError, match="bs23 has no output 'order4'; it has euler, midpoint, order2, order3"):
        get_tableau("bs23").solution("order4")
    with pytest.raises(ValueError, match="euler carries no embedded error"):
        _ = get_tableau("euler").error_order


@pytest.mark.parametrize(
    ("solver", "output", "interior"),
    [
        ("bs23", "euler", 1), ("bs23", "midpoint", 2), ("bs23", "order3", 3), ("bs23", "order2", 4),
        ("rk4", "euler", 1), ("rk4", "midpoint", 2), ("rk4", "order4", 4), ("dopri5", "euler", 1),
        ("dopri5", "order4", 7), ("dopri5", "order5", 6), ("heun", "euler", 1), ("midpoint", "euler", 1),
    ],
)  # fmt: skip
def test_the_solution_needs_the_stages_that_it_reads(solver, output, interior):
    method = get_tableau(solver)
    forwarding = method.forwarding(output)
    assert (forwarding.interior, forwarding.stages) == (interior, method.stages)
    x, counted = torch.randn(3, 2, dtype=D), Counted(field)
    whole = rk_step(field, 0.3, x, 0.1, method)
    step = rk_step(counted, 0.3, x, 0.1, forwarding, closing=False)
    assert counted.calls == len(step.stages) == interior
    torch.testing.assert_close(step.x1, whole.output(output))
    closed = rk_step(field, 0.3, x, 0.1, forwarding)
    assert all(torch.allclose(p, q) for p, q in zip(closed.stages, whole.stages, strict=True))
    for name in method.outputs:
        torch.testing.assert_close(closed.output(name), whole.output(name))


def test_a_step_without_closing_stages_says_which_it_needs():
    step = rk_step(
        lambda t, x: x, 0.0, torch.ones(1, 1), 0.1, get_tableau("bs23").forwarding("midpoint"), closing=False
    )
    with pytest.raises(ValueError, match="needs the closing stage"):
        step.error()
    with pytest.raises(ValueError, match="needs the closing stage"):
        step.output("order3")
    torch.testing.assert_close(step.output("euler"), torch.full((1, 1), 1.1))


@pytest.mark.parametrize("control", ["fixed", "adaptive"])
def test_solves_with_another_output_count_what_they_evaluate(control):
    counted = Counted(lambda t, x: -x)
    options = {"steps": 5} if control == "fixed" else {"tolerance": Tolerance(1e-3, 1e-4)}
    midpoint = get_tableau("bs23").forwarding("midpoint")
    solution = integrate(counted, torch.ones(2, 1), 0.0, 1.0, solver=midpoint, **options)
    assert solution.stats.evaluations == counted.calls
    torch.testing.assert_close(solution.x1, torch.full((2, 1), math.exp(-1)), rtol=1e-2, atol=0)


def test_forwarding_carries_another_output_on():
    bs23 = get_tableau("bs23")
    order2 = bs23.forwarding("order2")
    assert (order2.order, order2.fsal, order2.interior) == (2, False, 4)
    assert order2.error_weights == tuple(-w for w in bs23.error_weights)
    assert order2.forwarding("order3").error_weights == bs23.error_weights
    assert order2.forwarding("order3").fsal
    midpoint = bs23.forwarding("midpoint")
    x = torch.randn(3, 2, dtype=D)
    step = rk_step(field, 0.3, x, 0.1, midpoint)
    torch.testing.assert_close(step.x1, rk_step(field, 0.3, x, 0.1, get_tableau("midpoint")).x1)
    with pytest.raises(ValueError, match="bs23 has no output 'rk4'"):
        bs23.forwarding("rk4")
