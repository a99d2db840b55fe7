"""Solves beside torchdiffeq's, and beside their floor: the same number of bare field calls."""

import pytest
import torch
import torchdiffeq

from benchmarks.fields import FIELDS, calls, make
from solvers import I, Tolerance, integrate

STEPS = 10
THEIRS = {"euler": "euler", "midpoint": "midpoint", "rk4": "rk4", "bs23": "bosh3"}
EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4, "bs23": 3}
TOLERANCE = Tolerance(1e-5, 1e-5)


@pytest.fixture(params=FIELDS)
def problem(request, device):
    """A field and its first state."""
    return request.param, *make(request.param, device)


@pytest.mark.parametrize("who", ["odenets", "torchdiffeq", "field calls alone"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def bench_fixed(measure, benchmark, problem, method, who):
    """Ten steps without error control."""
    name, field, x = problem
    benchmark.group = f"fixed {method}, {name}"
    n = STEPS * EVALUATIONS[method]
    times = torch.linspace(0.0, 1.0, STEPS + 1, device=x.device)
    run = {
        "odenets": lambda: integrate(field, x, 0.0, 1.0, solver=method, steps=STEPS, keep="last"),
        "torchdiffeq": lambda: torchdiffeq.odeint(field, x, times, method=THEIRS[method]),
        "field calls alone": lambda: calls(field, x, n),
    }[who]
    with torch.no_grad():
        measure(run, who=who, steps=STEPS, evaluations=n)


@pytest.mark.parametrize("who", ["odenets", "torchdiffeq", "field calls alone"])
def bench_adaptive(measure, benchmark, problem, who):
    """Error control at the same tolerance; the floor makes as many field calls as ours."""
    name, field, x = problem
    benchmark.group = f"adaptive bs23, {name}"
    with torch.no_grad():
        ours = integrate(field, x, 0.0, 1.0, tolerance=TOLERANCE, controller=I(), keep="last").stats
        theirs = [0]

        def counted(t, x):
            theirs[0] += 1
            return field(t, x)

        times = torch.tensor([0.0, 1.0], device=x.device)
        torchdiffeq.odeint(counted, x, times, method="bosh3", rtol=1e-5, atol=1e-5)
        run, evaluations = {
            "odenets": (
                lambda: integrate(field, x, 0.0, 1.0, tolerance=TOLERANCE, controller=I(), keep="last"),
                ours.evaluations,
            ),
            "torchdiffeq": (
                lambda: torchdiffeq.odeint(field, x, times, method="bosh3", rtol=1e-5, atol=1e-5),
                theirs[0],
            ),
            "field calls alone": (lambda: calls(field, x, ours.evaluations), ours.evaluations),
        }[who]
        measure(run, who=who, evaluations=evaluations, accepted=ours.accepted, rejected=ours.rejected)
