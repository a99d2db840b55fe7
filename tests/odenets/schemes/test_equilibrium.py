"""Equilibria against roots found by SciPy, dense implicit gradients, implicit Euler steps and their limit."""

import numpy as np
import pytest
import torch
from scipy.optimize import root
from torch import nn

import odenets
from odenets import measures
from odenets.least_action import LeastAction
from odenets.schemes import Equilibrium
from solvers import RootFinder, get_tableau, rk_step
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of


class Injected(nn.Module):
    """``tanh(W z + U x + t)``, which no smallness of W makes a contraction."""

    def __init__(self, size=4, gain=1.5):
        super().__init__()
        self.own, self.other = (nn.Linear(size, size, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            self.own.weight.mul_(gain)

    def forward(self, t, z, x):
        return torch.tanh(self.own(z) + self.other(x) + t)


def newton(f, z):
    """A root of ``f(z) = z`` to rounding, with a graph, by dense matrices: Newton's steps through autograd."""
    for _ in range(30):
        matrix = torch.stack(
            [torch.autograd.functional.jacobian(f, one[None], create_graph=True)[0, :, 0] for one in z]
        )
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        z = z + torch.linalg.solve(eye - matrix, (f(z) - z)[..., None])[..., 0]
        z = z.detach() if (f(z) - z).norm() > 1e-12 else z
    return z


@pytest.mark.parametrize("scheme", ["equilibrium", "implicit_euler"])
@pytest.mark.parametrize("h", [0.3, 1.0])
def test_equals_the_root_in_outputs_and_gradients(scheme, h):
    flow, x = flow_of(scheme, depth=2, h=h)
    wanted = x
    for (v,) in fields_of(flow):
        start = wanted
        z = newton(lambda z, s=start, v=v: s + h * v(z), start.detach())
        matrix = torch.stack([torch.autograd.functional.jacobian(v, one[None])[0, :, 0] for one in z.detach()])
        system = torch.eye(3, dtype=torch.float64) - h * matrix
        moved = start + h * v(z.detach())  # and one more of Newton's steps, whose derivative is that of the root
        wanted = z.detach() + torch.linalg.solve(system, (moved - z.detach())[..., None])[..., 0]
    got = flow(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    inputs, weights = [x, *flow.parameters()], torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_it_is_the_implicit_euler_method():
    flow, x = flow_of("equilibrium")
    euler = flow.of(flow.blocks, solver="implicit_euler")
    assert_same(flow, x, euler(x))


@pytest.mark.parametrize("roots", ["auto", "newton", "newton_krylov", "anderson"])
def test_an_injected_equilibrium_is_scipys_without_contraction(roots):
    field = Injected()
    assert torch.linalg.matrix_norm(field.own.weight, 2) > 1
    flow = odenets.Flow(
        field, solver=Equilibrium(injection="argument", roots=RootFinder(roots, max_iterations=20)), h=0.5
    )
    x = torch.randn(6, 4, dtype=torch.float64)
    z = flow(x).detach()
    for one, start in zip(z, x, strict=True):
        f = lambda y, s=start: field(0.5, torch.from_numpy(y), s).detach().numpy() - y  # noqa: E731
        wanted = root(f, one.numpy() + 1e-3, tol=1e-12)
        assert wanted.success
        np.testing.assert_allclose(one.numpy(), wanted.x, atol=1e-9)


def test_gradients_of_an_injected_equilibrium_by_central_differences():
    field = Injected()
    flow = odenets.Flow(field, solver=Equilibrium(injection="argument"))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, (x,))
    weight = field.other.weight
    (got,) = torch.autograd.grad(flow(x).square().sum(), weight)
    wanted = torch.zeros_like(weight)
    for i, j in np.ndindex(4, 4):
        ends = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += shift
                ends.append(flow(x).square().sum().item())
                weight[i, j] -= shift
        wanted[i, j] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_implicit_euler_leads_there_as_its_steps_grow():
    """On ``z' = f(z, x0) - z``, whose first step comes from x0: the distance falls as 1 / h."""
    field = Injected()
    x = torch.randn(5, 4, dtype=torch.float64)
    z = odenets.Flow(field, solver=Equilibrium(injection="argument"), h=1e-12)(x)  # at t = 0
    errors = []
    for h in (1e2, 1e3, 1e4):
        step = rk_step(lambda t, y: field(0.0, y, x) - y, 0.0, x, h, get_tableau("implicit_euler"))
        errors.append((step.x1 - z).norm().item())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    flow, x = flow_of("equilibrium", depth=1, h=1.0)  # and with the sum: the step h / (1 + h) of the field alone
    (v,) = fields_of(flow)[0]
    step = rk_step(lambda t, y: x + v(y) - y, 0.0, x, 1e8, get_tableau("implicit_euler"))
    torch.testing.assert_close(step.x1, flow(x), rtol=1e-7, atol=1e-7)


def test_its_measures_and_its_parts():
    flow, x = flow_of("equilibrium", depth=3)
    end, records = flow.record(x, action=measures.action, residue=measures.residue)
    for m, step in enumerate(flow.steps(x)):
        v = flow.blocks[m].fields[0](0.0, step.x1)
        torch.testing.assert_close(step.residue, v, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(records["action"][m], 0.3 * v.square().mean(1), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(flow.part(1, 3)(flow.part(0, 1)(x)), end)


@pytest.mark.parametrize("solver", ["implicit_euler", "equilibrium"])
def test_images_take_no_matrices(solver, monkeypatch):
    """Networks of images of any size: Newton's iteration with products alone, and least action on it."""
    monkeypatch.setattr("solvers.implicit.steps.jacobian", None)
    flow = odenets.Flow(lambda: odenets.ConvField(8), solver=solver, depth=2)
    network = odenets.Network(nn.Conv2d(3, 8, 1), flow, nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 5)))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    LeastAction()(network, x, y).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    for step in flow.steps(network.encoder(x)):
        m = 0 if step.t == 0 else 1
        wanted = step.x0 + 0.5 * flow.blocks[m].fields[0](0.0, step.x1)
        assert (step.x1 - wanted).norm() <= 1e-5 * step.x1.norm()


def test_a_tolerance_takes_fewer_calls_and_holds():
    torch.manual_seed(1)
    x, counts, errors = torch.randn(4, 8, 8, 8), {}, {}
    field = odenets.ConvField(8, activation="silu")
    exact = odenets.Flow(field, solver=Equilibrium(), h=0.5).double()(x.double())
    field.float()
    for roots in ("newton_krylov", "anderson"):
        for tolerance in (None, 1e-3):
            calls = []
            handle = field.register_forward_hook(lambda *_, c=calls: c.append(1))
            with torch.no_grad():
                z = odenets.Flow(field, solver=Equilibrium(roots=RootFinder(roots), tolerance=tolerance), h=0.5)(x)
            handle.remove()
            counts[roots, tolerance] = len(calls)
            errors[roots, tolerance] = ((z - exact).norm() / exact.norm()).item()
        assert counts[roots, 1e-3] < counts[roots, None]
        assert errors[roots, 1e-3] < 2e-3
        assert errors[roots, None] < 1e-5
    assert counts["anderson", None] < counts["newton_krylov", None]


def test_memory_does_not_depend_on_the_iterations():
    field = odenets.ConvField(8, activation="silu")
    x = torch.randn(4, 8, 8, 8)

    def saved(tolerance, roots):
        flow, sizes = odenets.Flow(field, solver=Equilibrium(roots=RootFinder(roots), tolerance=tolerance), h=0.5), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            flow(x)
        return sum(sizes)

    assert saved(None, "newton_krylov") == saved(0.5, "newton_krylov") == saved(None, "anderson")


@pytest.mark.parametrize("h", [1.0, 5.0])
@pytest.mark.parametrize("solver", ["equilibrium", "implicit_euler", "rkcnn_implicit"])
def test_roots_of_monotone_fields_are_found_at_large_steps(solver, h):
    """``-K^T relu(K x)`` in float32, whose kinks keep the last digits moving; steps bring no states apart."""
    flow = odenets.Flow(lambda: odenets.fields.SymmetricField(8, kernel_size=3), solver=solver, depth=3, h=h)
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(3.0)
    x, y = torch.randn(2, 8, 8, 8, 8)
    one, other = flow(x), flow(y)
    one.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    if solver != "rkcnn_implicit":  # the trapezoidal rule is not contractive
        norms = torch.linalg.vector_norm((one - other).flatten(1), dim=1) / (x - y).flatten(1).norm(dim=1)
        assert (norms <= 1 + 1e-5).all()


def test_no_equilibrium_is_an_error_with_its_residual():
    class Away(nn.Module):
        def forward(self, t, x):
            return x + 1  # z = x0 + z + 1

    for roots in ("auto", "newton_krylov", "anderson", "fixed_point"):
        flow = odenets.Flow(Away(), solver=Equilibrium(roots=RootFinder(roots)), h=1.0)
        with pytest.raises(RuntimeError, match=r"no equilibrium is found .*\|z\| is .*Take a smaller h"):
            flow(torch.ones(2, 3))


def test_batch_norm_is_refused_in_training_and_graphs_are():
    flow = odenets.Flow(lambda: odenets.ConvField(3, norm="batch"), solver="equilibrium", depth=2)
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"in training mode, and equilibrium calls its field until"):
        flow(x)
    flow.eval()(x)
    with pytest.raises(Exception, match=r"equilibrium iterates until its stages are found|Observed exception"):
        torch.compile(flow, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_depth_changes_only_where_h_counts():
    x = torch.randn(3, 4, dtype=torch.float64)
    flow = odenets.Flow(lambda: Injected(gain=0.5), solver=Equilibrium(injection="argument"), depth=2)
    with pytest.raises(ValueError, match=r"another depth is another function .*injection='sum'"):
        flow.at_depth(4)
    torch.testing.assert_close(flow.at_depth(2)(x), flow(x))
    summed, x = flow_of("equilibrium", depth=4, h=0.1)
    assert (summed.at_depth(8)(x) - summed(x)).norm() < 0.2 * (summed(x) - x).norm()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"injection": "product"}, ValueError, "injection must be 'sum' or 'argument', got 'product'"),
        ({"roots": "anderson"}, TypeError, "roots must be a RootFinder"),
        ({"tolerance": 1.0}, ValueError, r"tolerance must be a share in \(0, 1\)"),
        ({"tolerance": "small"}, TypeError, "tolerance must be a number"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Equilibrium(**arguments)
    assert Equilibrium().solved_by(RootFinder("anderson")) == Equilibrium(roots=RootFinder("anderson"))
