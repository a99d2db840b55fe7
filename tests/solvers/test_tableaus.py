import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from solvers import ButcherTableau, Embedded, Tolerance, get_tableau, integrate, rk_step
from tests.counting import Counted
from tests.solvers.problems import D

NAMES = [
    "euler", "midpoint", "heun", "heun3", "rk4", "rk4_38", "fehlberg2", "bs23", "dopri5", "tsit5", "dopri8",
]  # fmt: skip


def field(t, x):
    return torch.sin(x) + t


OWN, LOW = Embedded(2, (0.0, 1.0)), Embedded(1, (1.0, 0.0))


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


def test_the_interpolant_of_dopri8_satisfies_the_conditions_of_order_5():
    """``sum_i b_i(theta) c_i^k = theta^(k+1) / (k+1)``; the digit of other libraries misses them."""
    dopri8 = get_tableau("dopri8")
    assert (dopri8.order, dopri8.error_order, dopri8.interior, dopri8.stages) == (8, 7, 13, 14)
    nodes = np.array(dopri8.c)
    for theta in (0.1, 0.5, 0.9, 1.0):
        moments = [np.dot(dopri8.weights_at(theta), nodes**k) for k in range(5)]
        np.testing.assert_allclose(moments, [theta ** (k + 1) / (k + 1) for k in range(5)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(dopri8.weights_at(1.0), dopri8.b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fsal"), [("dopri8", True), ("euler", False), ("rk4", False), ("bs23", True), ("dopri5", True)]
)
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
        ({"a": ((), (0.25, 0.25, 0.0))}, "row 1 of a must have 1 entries, or 2 where the stage is implicit"),
        ({"a": ((), (0.75, -0.25))}, "diagonal entry in row 1 of a must be positive, got -0.25"),
        ({"b": (0.5, 0.4)}, "b must sum to 1"),
        ({"embedded": (("low", Embedded(1, (1.0,))),)}, "must have 2 weights"),
        ({"embedded": (("low", Embedded(1, (1.0, 1.0))),)}, "weights of embedded 'low' must sum to 1"),
        ({"low": "missing"}, "low must name an embedded solution"),
        ({"b": (math.nan, 1.0)}, "b must be finite, got"),
        ({"c": (0.0, math.inf), "a": ((), (math.inf,))}, "c must be finite, got"),
        ({"a": ((), (math.nan,))}, "row 1 of a must be finite"),
        ({"dense": ((math.nan,), (1.0,))}, "row 0 of dense must be finite"),
        ({"order": 3}, r"order must be at most 2, .*, got 3: sum_i b_i c_i\^2 is 0.25, not 1/3"),
        ({"order": 5}, "order must be at most 2"),
        ({"embedded": (("own", OWN), ("low", Embedded(2, (1.0, 0.0))))}, "order of embedded 'low' must be at most 1"),
        ({"embedded": (("low", LOW),), "low": "low"}, r"must hold the method's own solution.*add \('mine', Embedded"),
        ({"embedded": (("own", OWN), ("low", LOW)), "low": "own"}, "low must name another solution than the method's"),
    ],
)
def test_inconsistent_coefficients_are_rejected(change, message):
    good = {"name": "mine", "order": 2, "c": (0.0, 0.5), "a": ((), (0.5,)), "b": (0.0, 1.0)}
    ButcherTableau(**good)
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**(good | change))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ButcherTableau("mine", 1.0, (0.0,), ((),), (1.0,)),
            TypeError,
            "order must be a whole number, got 1.0",
        ),
        (
            lambda: ButcherTableau("mine", "1", (0.0,), ((),), (1.0,)),
            TypeError,
            "order must be a whole number, got '1'",
        ),
        (lambda: ButcherTableau("mine", 1, (0.0,), ((),), "1"), TypeError, "b must be a row of numbers, got '1'"),
        (lambda: ButcherTableau("mine", 1, 0.0, ((),), (1.0,)), TypeError, "c must be a row of numbers, got 0.0"),
        (
            lambda: ButcherTableau("mine", 1, (0.0,), ((),), (1.0,), {"mine": (1, (1.0,))}),
            TypeError,
            "an Embedded, got",
        ),
        (lambda: Embedded(2.5, (1.0,)), TypeError, "order of an embedded solution must be a whole number, got 2.5"),
        (lambda: Embedded(0, (1.0,)), ValueError, "order of an embedded solution must be at least 1, got 0"),
        (lambda: Embedded(1, (math.nan,)), ValueError, "b of an embedded solution must be finite"),
    ],
)
def test_what_is_no_number_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [list, np.array, lambda row: torch.tensor(row, dtype=D)])
def test_coefficients_come_in_any_container(kind):
    heun = get_tableau("heun")
    embedded = {name: Embedded(solution.order, kind(solution.b)) for name, solution in heun.embedded}
    a = [kind(row) for row in heun.a]
    assert ButcherTableau("heun", 2, kind(heun.c), a, kind(heun.b), embedded, low="euler") == heun


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri5", "implicit_euler", "trapezoid", "kvaerno5"])
@pytest.mark.parametrize("kind", [list, np.array, lambda rows: torch.tensor(rows, dtype=D)])
def test_the_rows_of_a_square_array_are_those_of_its_triangle(name, kind):
    tableau = get_tableau(name)
    square = kind([[*row, *[0.0] * (tableau.stages - len(row))] for row in tableau.a])
    assert dataclasses.replace(tableau, a=square) == tableau


def test_a_square_array_with_an_entry_above_its_diagonal_is_refused():
    root = 3**0.5 / 6
    with pytest.raises(ValueError, match=r"row 0 of a .*methods whose stages depend on later ones are not here"):
        ButcherTableau("gauss", 4, (0.5 - root, 0.5 + root), [[0.25, 0.25 - root], [0.25 + root, 0.25]], (0.5, 0.5))


def test_messages_name_methods_that_have_what_is_missing():
    error = "carries no embedded error: take bs23, dopri5, dopri8 or kvaerno5"
    for call in (
        lambda: get_tableau("rk4").error_order,
        rk_step(field, 0.0, torch.ones(1, 1), 0.1, get_tableau("rk4")).error,
    ):
        with pytest.raises(ValueError, match=f"rk4 {error}"):
            call()
    with pytest.raises(ValueError, match="rk4 has no interpolant of its own; bs23, dopri5, dopri8 and kvaerno5 have"):
        get_tableau("rk4").weights_at(0.5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("bs23", 3)])
def test_an_order_above_that_of_the_coefficients_is_refused(name, order):
    tableau = get_tableau(name)
    assert tableau.order == order
    with pytest.raises(ValueError, match=f"order must be at most {order}, that of the coefficients"):
        dataclasses.replace(tableau, order=order + 1)


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


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("heun2", "'heun'"),
        ("RK45", "'dopri5'"),
        ("DOP853", "'dopri8'"),
        ("RK23", "'bs23'"),
        ("LSODA", "'rodas4' or 'kvaerno5'"),
        ("Euler", "'euler'"),
    ],
)
def test_methods_of_torchdiffeq_and_scipy_have_their_place_named(name, place):
    with pytest.raises(ValueError, match=f"unknown solver {name!r}: take {place}"):
        get_tableau(name)
