"""Solves in a graph that cannot go on, for a part of the samples or all; attempts that are not finite."""

import pytest
import torch
from torch import nn

from solvers import MaxStepsError, NonFiniteError, Tolerance, integrate

D = torch.float64
X = torch.tensor([[0.1, 0.2], [0.5, 0.4], [0.9, 0.3]], dtype=D)
ENDS, FAST, WALL = (torch.tensor(float(i), dtype=D) for i in range(3))
LIMIT = Tolerance(rtol=1e-4, atol=1e-6, first_step=0.4, max_steps=120)


class Trouble(nn.Module):
    """A field that is NaN from t = 0.5 on where the sample's last number is above 0.25; one that changes fast there;
    and one that is NaN where a long step leads, and nowhere on the way.
    """

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=D))

    def forward(self, t, x, kind, where):
        t = torch.as_tensor(t, dtype=x.dtype)
        ends = torch.where((t > 0.5) & (where > 0.25), torch.nan, -x)
        fast = torch.where(where > 0.25, 400 * torch.cos(400 * t), -1.0) * torch.ones_like(x)
        wall = torch.where(x < -0.5, torch.nan, -20 * x)
        return self.rate * torch.where(kind == ENDS, ends, torch.where(kind == FAST, fast, wall))


def solved(graph, kind, t1, x=X, tolerance=LIMIT, **options):
    args = (kind.clone(), X[:, 1:].clone())  # no tensor that the field reads itself
    return integrate(Trouble(), x, 0.0, t1, args=args, tolerance=tolerance, graph=graph, **options)


@pytest.mark.slow
def test_errors_name_the_place_and_keep_the_part_that_stands():
    for kind, error in ((ENDS, NonFiniteError), (FAST, MaxStepsError)):
        raised = []
        for graph in (True, False):
            with torch.no_grad(), pytest.raises(error) as info:
                solved(graph, kind, 4.0, control="sample")
            raised.append(info.value)
        ours, theirs = raised
        assert ours.t == pytest.approx(theirs.t, rel=1e-6)
        assert ours.h == pytest.approx(theirs.h, rel=0.5)  # halved until t + h is t
        assert ours.sample == theirs.sample == 1
        torch.testing.assert_close(ours.solution.t1, theirs.solution.t1, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(ours.solution.x1, theirs.solution.x1, rtol=1e-6, atol=1e-9)


def rises(t, x):
    return torch.where(x > 2, torch.nan, x)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_errors_name_the_stage_that_is_not_finite(control):
    raised = []
    for graph in (True, False):
        with torch.no_grad(), pytest.raises(NonFiniteError) as info:
            integrate(rises, X, 0.0, 3.0, graph=graph, control=control)
        raised.append(info.value)
    ours, theirs = raised
    assert theirs.stage is not None
    assert theirs.sample is not None
    assert (ours.stage is None, ours.sample) == (False, theirs.sample)


@pytest.mark.slow
def test_samples_that_fail_alone_are_returned_as_they_stand_with_gradients():
    """The first sample reaches the end, the others stop before."""
    for kind in (ENDS, FAST):
        found = []
        for graph in (True, False):
            x = X.clone().requires_grad_()
            solution = solved(graph, kind, 1.0, x, control="sample", on_limit="return")
            found.append((solution, *torch.autograd.grad(solution.x1.square().sum(), x)))
        (ours, gradient), (theirs, other) = found
        assert ours.status == theirs.status
        assert ours.status[0] == "finished"
        assert "finished" not in ours.status[1:]
        torch.testing.assert_close(ours.t1, theirs.t1, rtol=1e-9, atol=0.0)
        torch.testing.assert_close(ours.x1, theirs.x1, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9)
        assert gradient.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_an_attempt_that_is_not_finite_is_made_again_with_a_smaller_step(control):
    """Per sample too all are sent back, whose gradients the NaN of one would reach."""
    found = []
    for graph in (True, False):
        x = X.clone().requires_grad_()
        solution = solved(graph, WALL, 0.5, x, control=control)
        found.append((solution, *torch.autograd.grad(solution.x1.square().sum(), x)))
    (ours, gradient), (theirs, other) = found
    assert ours.stats == theirs.stats
    assert ours.stats.rejected > 0
    torch.testing.assert_close(ours.x1, theirs.x1, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)
    assert gradient.isfinite().all()
