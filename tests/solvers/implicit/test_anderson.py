"""Anderson's acceleration against linear algebra, in steps against Newton's, and stages under autocast."""

import pytest
import torch
from torch import nn

from solvers import NewtonError, RootFinder, get_tableau, integrate, rk_step
from solvers.implicit.anderson import Anderson

D = torch.float64


def solved_by(method):
    return get_tableau("implicit_euler").solved_by(RootFinder(method))


def test_a_linear_equation_is_solved_in_as_many_iterations_as_it_has_unknowns():
    """``p = A p + b`` of each sample, whose plain iterates run away."""
    a, b = 2 * torch.randn(5, 4, 4, dtype=D), torch.randn(5, 4, dtype=D)
    p, anderson = torch.zeros(5, 4, dtype=D), Anderson()
    for _ in range(8):
        p = p + anderson.correction(p, (a @ p[..., None])[..., 0] + b - p)
    torch.testing.assert_close(p, torch.linalg.solve(torch.eye(4, dtype=D) - a, b), rtol=1e-6, atol=1e-6)


def test_its_steps_are_newtons_in_outputs_and_gradients():
    layer = nn.Linear(3, 3, dtype=D)
    field = lambda t, x: torch.tanh(2 * layer(x)) - 2 * x  # noqa: E731
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    inputs = [x, *layer.parameters()]
    ends = [integrate(field, x, 0.0, 2.0, solver=solved_by(m), steps=3).x1 for m in ("newton", "anderson")]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-9)
    one, other = (torch.autograd.grad(end.square().sum(), inputs) for end in ends)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)
    with pytest.raises(NewtonError):
        rk_step(field, 0.0, x, 2.0, solved_by("fixed_point"))


def test_no_root_is_an_error():
    with pytest.raises(NewtonError):
        rk_step(lambda t, x: x + 1, 0.0, torch.ones(2, 3), 1.0, solved_by("anderson"))
    with pytest.raises(NewtonError):
        rk_step(lambda t, x: x.log(), 0.0, -torch.ones(2, 3), 1.0, solved_by("anderson"))


@pytest.mark.parametrize("method", ["newton", "newton_krylov", "anderson"])
def test_stages_are_found_outside_autocast(method):
    """In whose dtypes no iteration would come near them; its gradients as well."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            end = rk_step(lambda t, x: torch.tanh(layer(x)), 0.0, x, 0.5, solved_by(method)).x1
        results.append((end, *torch.autograd.grad(end.square().sum(), [*layer.parameters()])))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
