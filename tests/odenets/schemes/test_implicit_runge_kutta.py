"""RKCNN-I: its start is the method's, and its steps and gradients are those of dense solves with any coefficients."""

import math

import pytest
import torch

import odenets
from odenets import measures
from odenets.schemes import LearnedImplicitRungeKutta
from solvers import ButcherTableau, RootFinder, rk_step
from tests.odenets.schemes.fields import flow_of

G = 1 - 1 / math.sqrt(2)
SDIRK = ButcherTableau("sdirk2", 2, (G, 1.0), ((G,), (1 - G, G)), (1 - G, G))


def moved(flow, by=0.2):
    """The flow with other coefficients, drawn."""
    with torch.no_grad():
        for block in flow.blocks:
            for p in block.fields[1].parameters():
                p.add_(by * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("start", ["implicit_euler", "implicit_midpoint", "trapezoid", SDIRK, "kvaerno5"])
def test_it_begins_as_the_method(start):
    flow, x = flow_of(LearnedImplicitRungeKutta(start=start))
    plain = odenets.Flow.of([odenets.Block([b.fields[0]], b.h) for b in flow.blocks], solver=start)
    torch.testing.assert_close(flow(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", ["implicit_midpoint", "trapezoid", SDIRK])
@pytest.mark.parametrize("roots", ["newton", "newton_krylov"])
def test_equals_the_dense_solve_in_outputs_and_gradients(start, roots):
    """Each stage by Newton's steps on its equation as it stands, of which the last one carries the derivative."""
    scheme = LearnedImplicitRungeKutta(start=start, roots=RootFinder(roots))
    flow, x = flow_of(scheme, depth=2)
    moved(flow.double())
    wanted = x
    for block, step in zip(flow.blocks, flow.steps(x.detach()), strict=True):
        learned = block.fields[1]
        now = learned.coefficients(x, RootFinder())
        n = len(now.c)
        start_a = torch.tensor([[*row, *[0.0] * (n - len(row))] for row in scheme.a], dtype=torch.float64)
        a = start_a.tril(-1) + torch.diag(start_a.diagonal() * learned.change_diagonal.exp())
        if n == 2:
            a = a + torch.stack([torch.zeros(2), torch.cat([learned.change_a, torch.zeros(1)])]).double()
            c = a.sum(1)
            second = (0.5 - c[0]) / (c[1] - c[0])  # of b_1 + b_2 = 1 and b . c = 1 / 2
            b = torch.stack([1 - second, second])
        else:
            b = torch.ones(1, dtype=torch.float64)
        velocity, stages = (lambda y, f=block.fields[0]: f(0.0, y)), []
        for i in range(n):
            base = wanted + 0.3 * sum((a[i, j] * p for j, p in enumerate(stages)), torch.zeros_like(wanted))
            p = step.stages[i].detach()
            y = base + 0.3 * a[i, i] * p
            jacobian = torch.stack([torch.autograd.functional.jacobian(velocity, one[None])[0, :, 0] for one in y])
            system = torch.eye(3, dtype=torch.float64) - 0.3 * a[i, i].detach() * jacobian
            p = p + torch.linalg.solve(system, (velocity(y) - p)[..., None])[..., 0]
            stages.append(p)
        wanted = wanted + 0.3 * sum(b[i] * p for i, p in enumerate(stages))
    got = flow(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    inputs = [x, *flow.parameters()]
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), inputs, materialize_grads=True)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert flow.blocks[0].fields[1].change_diagonal.grad is None
    assert (ours[-1] != 0).any()


@pytest.mark.parametrize(("start", "order"), [("implicit_midpoint", 1), ("trapezoid", 2), (SDIRK, 2), ("kvaerno5", 2)])
def test_the_order_holds_whatever_the_coefficients_become(start, order):
    """On an equation that reads time."""
    scheme = LearnedImplicitRungeKutta(start=start)
    learned = scheme.learned(0, 1).double()
    with torch.no_grad():
        for p in learned.parameters():
            p.uniform_(0.1, 0.3)
    now = learned.coefficients(torch.ones(1, dtype=torch.float64), RootFinder())
    assert scheme.order == now.order == order
    x, errors = torch.ones(1, 1, dtype=torch.float64), []
    for n in (20, 40):
        with torch.no_grad():
            state = x
            for i in range(n):
                state = rk_step(lambda t, y: -y + math.cos(3 * t), i / n, state, 1 / n, now).x1
        exact = (math.cos(3.0) + 3 * math.sin(3.0) + 9 * math.exp(-1.0)) / 10
        errors.append(abs(state.item() - exact))
    assert math.log2(errors[0] / errors[1]) > order - 0.25


def test_each_block_learns_coefficients_that_stay_those_of_an_implicit_method():
    flow, x = flow_of("rkcnn_implicit", depth=2)
    optimizer = torch.optim.SGD([p for block in flow.blocks for p in block.fields[1].parameters()], lr=1.0)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        loss = (flow(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first
    one, other = (step.tableau for step in flow.steps(x))
    assert not torch.equal(one.b, other.b)
    for method in (one, other):
        assert method.a[1][1] > 0
        torch.testing.assert_close(method.b.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(method.b @ torch.stack(method.c), torch.tensor(0.5, dtype=torch.float64))


def test_its_measures():
    flow, x = flow_of(LearnedImplicitRungeKutta(start=SDIRK), depth=2)
    moved(flow)
    end, records = flow.record(x, action=measures.action, residue=measures.residue)
    for m, step in enumerate(flow.steps(x)):
        torch.testing.assert_close(step.x0 + 0.3 * step.residue, step.x1)
        wanted = 0.3 * sum(b * p.square().mean(1) for b, p in zip(step.tableau.b, step.stages, strict=True))
        torch.testing.assert_close(records["action"][m], wanted)
        torch.testing.assert_close(records["residue"][m], step.residue.square().mean(1))
    torch.testing.assert_close(end, step.x1)


def test_a_state_of_another_start_is_refused():
    one, _ = flow_of(LearnedImplicitRungeKutta(start="trapezoid"))
    other, x = flow_of(LearnedImplicitRungeKutta(start=SDIRK))
    with pytest.raises(ValueError, match="begin with another method than sdirk2"):
        other.load_state_dict(one.state_dict())
    again, _ = flow_of(LearnedImplicitRungeKutta(start=SDIRK))
    again.load_state_dict(moved(other).state_dict())
    torch.testing.assert_close(again(x), other(x))


def test_bad_starts_are_named():
    for start in ("rk4", "rodas4"):
        with pytest.raises(ValueError, match=f"start must be a diagonally implicit method, .* got {start}"):
            LearnedImplicitRungeKutta(start=start)
    with pytest.raises(TypeError, match="roots must be a RootFinder"):
        LearnedImplicitRungeKutta(roots="newton")
    assert LearnedImplicitRungeKutta().solved_by(RootFinder("anderson")).roots.method == "anderson"
