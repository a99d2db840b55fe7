"""The DETEST problems in a graph and by the loop on the host: states, steps, field calls and gradients are the same.

Problems of one dimension are one field, of which an argument selects; one graph serves them all.
"""

import pytest
import torch
from torch import nn

from solvers import StepUnderflowError, Tolerance, integrate
from tests.detest import PROBLEMS
from tests.solvers.torchdiffeq.test_detest import BACKWARDS, reference

D = torch.float64
TOLERANCE = Tolerance(rtol=1e-5, atol=1e-5)
GROUPS = (
    ("A1", "A2", "A3", "A4", "A5"),
    ("B1", "E1", "E2", "E3", "E4", "E5"),
    ("B2", "B3", "B4", "B5"),
    ("C1", "C2", "C3"),
    ("C4",),
    ("C5",),
    ("D1", "D2", "D3", "D4", "D5"),
)
LONG = {"B1", "B4", "B5", "D1", "D2", "D3", "D4", "D5", "E1", "E2", "E3"}  # hundreds of steps of bs23 until t = 20


class Selected(nn.Module):
    """The field of one of some problems of one dimension, scaled by a parameter."""

    def __init__(self, names):
        super().__init__()
        self.fields = list(dict.fromkeys(PROBLEMS[name].field for name in names))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=D))

    def choice(self, name):
        return torch.tensor(float(self.fields.index(PROBLEMS[name].field)))

    def forward(self, t, y, choice):
        v = self.fields[0](t, y)
        for i, field in enumerate(self.fields[1:], 1):
            v = torch.where(choice == i, field(t, y), v)
        return self.scale * v


def ends(name, backward, longest):
    """The first states of two samples that differ a little, and the times between which they go."""
    t0, t1, start = 0.0, min(PROBLEMS[name].end, longest), PROBLEMS[name].y0
    if backward:
        t0, t1 = min(BACKWARDS[name], longest), 0.0
        start = reference(name, t0)[1][-1]
    return torch.stack([start, start * 1.001]), t0, t1


def solved(field, name, backward, solver, graph):
    x, t0, t1 = ends(name, backward, 5.0 if solver == "bs23" and name in LONG else 20.0)
    x.requires_grad_(torch.is_grad_enabled())
    options = {"solver": solver, "tolerance": TOLERANCE, "args": (field.choice(name),), "graph": graph}
    solution = integrate(field, x, t0, t1, **options)
    if not torch.is_grad_enabled():
        return solution, ()
    weights = torch.linspace(1, 2, x.numel(), dtype=D).reshape(x.shape)
    return solution, torch.autograd.grad((weights * solution.x1).sum(), [x, field.scale])


def compare(names, solver):
    """In a graph and on the host.

    On C2 stability limits the step and rounding decides what the error is, so that the steps may part.
    """
    field = Selected(names)
    for name in names:
        for backward in (False, True):
            ours, gradients = solved(field, name, backward, solver, True)
            theirs, others = solved(field, name, backward, solver, False)
            what, parts = f"{name}, {'backward' if backward else 'forward'} in time: ", name == "C2"
            assert parts or ours.stats == theirs.stats, what
            assert ours.t1 == theirs.t1, what
            for one, other in zip((ours.x1, *gradients), (theirs.x1, *others), strict=True):
                error = (one - other).abs().max() / other.abs().max().clamp(min=1)
                assert error < (1e-4 if parts else 1e-9), f"{what}{error}"


def test_three_problems():
    with torch.no_grad():
        compare(("A1", "A3", "A5"), "bs23")


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_bs23(names):
    compare(names, "bs23")


@pytest.mark.slow
def test_dopri5():
    compare(GROUPS[-1], "dopri5")


def test_every_problem_is_in_a_group():
    assert sorted(name for names in GROUPS for name in names) == sorted(PROBLEMS)


@pytest.mark.slow
def test_a_pole_behind_the_start_ends_both():
    """A2 is ``1 / sqrt(1 + t)``. How many attempts end there hangs on rounding."""
    field, raised = Selected(["A2"]), []
    for graph in (True, False):
        options = {"tolerance": TOLERANCE, "args": (field.choice("A2"),), "graph": graph}
        with torch.no_grad(), pytest.raises(StepUnderflowError) as info:
            integrate(field, PROBLEMS["A2"].y0[None], 0.0, -2.0, **options)
        raised.append(info.value)
    ours, theirs = raised
    assert (ours.t, ours.sample) == (pytest.approx(theirs.t, rel=1e-9), theirs.sample)
    assert ours.solution.stats.accepted == pytest.approx(theirs.solution.stats.accepted, rel=0.02)
