"""Gradients that undo the steps of a reversible pair."""

import math
import re

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, NeuralODE
from odenets.analysis.memory import measure_memory
from solvers import Reversible, SolverError, Tolerance, integrate
from solvers.gradients.pair import ReversibleSteps
from tests.counting import Counted
from tests.solvers.problems import D, decay, lotka

METHODS = ["euler", "heun", "heun3", "bs23", "rk4", "dopri5", "tsit5"]
WAYS = [
    {"steps": 12},
    {"tolerance": Tolerance(1e-4, 1e-6)},
    {"tolerance": Tolerance(1e-4, 1e-6), "control": "sample"},
    {"steps": 12, "at": [0.0, 0.25, 0.33, 1.0]},
    {"tolerance": Tolerance(1e-4, 1e-6), "at": [0.3, 0.9]},
]


def net(std=0.4):
    field = MLPField(3).double()
    for p in field.parameters():
        nn.init.normal_(p, std=std)
    return field


def by_hand(field, x, moves, tableau, coupling):
    """The same pair with a graph, by plain steps."""
    from solvers import rk_step

    y = z = x
    for t, h, taken in moves:
        y1 = y + (1 - coupling) * (z - y) + h * rk_step(field, t, z, h, tableau, closing=False).residue
        y1 = y1 if taken is None else torch.where(taken, y1, y)
        z1 = z + h * rk_step(field, t + h, y1, -h, tableau, closing=False).residue
        y, z = y1, z1 if taken is None else torch.where(taken, z1, z)
    return y


@pytest.mark.parametrize("solver", METHODS)
@pytest.mark.parametrize("steps", [True, False])
def test_gradients_are_those_of_the_steps_taken(solver, steps):
    if not steps and solver in ("euler", "heun3", "rk4"):
        pytest.skip("no error")
    a = torch.randn(3, 3, dtype=D, requires_grad=True)
    x0 = torch.randn(2, 3, dtype=D, requires_grad=True)
    how = {"steps": 4} if steps else {"tolerance": Tolerance(10.0, 10.0, first_step=0.2, max_step=0.2)}

    def field(t, x, a):
        return torch.tanh(x @ a) * math.cos(t)

    assert torch.autograd.gradcheck(
        lambda x, a: integrate(field, x, 0.0, 1.0, solver=solver, args=(a,), gradient=Reversible(0.9), **how).x1,
        (x0, a),
    )


@pytest.mark.parametrize("way", WAYS)
def test_state_and_gradient_are_near_those_of_the_method(way):
    field, x0 = net(), torch.randn(4, 3, dtype=D, requires_grad=True)
    found = []
    for gradient in ("direct", "reversible"):
        solution = integrate(field, x0, 0.0, 1.0, solver="dopri5", gradient=gradient, **way)
        states = solution.states if "at" in way else solution.x1
        grads = torch.autograd.grad(states.square().sum(), (x0, *field.parameters()))
        found.append(torch.cat([states.flatten(), *(g.flatten() for g in grads)]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 2e-3


def test_samples_with_steps_of_their_own_have_the_gradient_of_the_pair_by_hand():
    field, x0 = net(0.8), torch.randn(4, 3, dtype=D, requires_grad=True)
    tolerance = Tolerance(1e-4, 1e-6)
    recorded = []
    original = ReversibleSteps.accept

    def accept(self, accepted=None):
        original(self, accepted)
        recorded[:] = self.moves

    ReversibleSteps.accept = accept
    try:
        x1 = integrate(field, x0, 0.0, 1.0, control="sample", tolerance=tolerance, gradient="reversible").x1
    finally:
        ReversibleSteps.accept = original
    assert any(move.taken is not None for move in recorded)
    from solvers import get_tableau

    other = by_hand(field, x0, recorded, get_tableau("bs23"), 0.999)
    torch.testing.assert_close(x1, other, rtol=1e-12, atol=1e-12)
    for one, two in zip(
        torch.autograd.grad(x1.square().sum(), (x0, *field.parameters())),
        torch.autograd.grad(other.square().sum(), (x0, *field.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("bs23", 3), ("rk4", 4)])
def test_the_pair_has_the_order_of_its_method(solver, order):
    exact = integrate(lotka, torch.tensor([[1.0, 1.0]], dtype=D), 0.0, 1.0, solver="dopri5", steps=400).x1
    errors = [
        (integrate(lotka, torch.tensor([[1.0, 1.0]], dtype=D), 0.0, 1.0, solver=solver, steps=n,
                   gradient="reversible").x1 - exact).abs().max().item()
        for n in (20, 40)
    ]  # fmt: skip
    assert math.log2(errors[0] / errors[1]) > order - 0.35


def test_a_thousand_steps_are_undone_to_ten_digits():
    x0, seen = torch.tensor([[1.0, 1.0], [1.2, 0.8]], dtype=D, requires_grad=True), []
    import solvers.gradients.reversible as module

    original = module.check_inverse
    module.check_inverse = lambda y, x, *rest: seen.append((y - x).abs().max().item())
    try:
        integrate(lotka, x0, 0.0, 1.0, solver="rk4", steps=1000, gradient="reversible").x1.sum().backward()
    finally:
        module.check_inverse = original
    assert seen[0] < 1e-10


def test_without_gradients_the_numbers_are_the_same():
    field, x0 = net(), torch.randn(4, 3, dtype=D)
    x1 = integrate(field, x0, 0.0, 1.0, steps=5, gradient="reversible").x1
    with torch.no_grad():
        assert torch.equal(integrate(field, x0, 0.0, 1.0, steps=5, gradient="reversible").x1, x1)


def test_memory_does_not_grow_with_the_steps():
    field, x = net().float(), torch.randn(64, 3)

    def peak(steps):
        def work():
            x0 = x.clone().requires_grad_()
            integrate(field, x0, 0.0, 1.0, solver="rk4", steps=steps, gradient="reversible").x1.sum().backward()

        work()
        return measure_memory(work, "cpu").peak

    assert peak(100) <= 1.02 * peak(10)


def test_field_calls_of_both_passes():
    field = Counted(net())
    x0 = torch.randn(2, 3, dtype=D, requires_grad=True)
    solution = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=10, gradient="reversible")
    before = field.calls
    assert solution.stats.evaluations == 80
    solution.x1.sum().backward()
    assert field.calls - before <= 80 + 2  # and what looks at the field


@pytest.mark.parametrize("arguments", [{"steps": 6}, {"tolerance": Tolerance(1e-4, 1e-6)}])
def test_a_neural_ode_trains_so(arguments):
    grads = []
    for gradient in ("reversible", Reversible(0.999)):
        torch.manual_seed(0)
        ode = NeuralODE(net(), gradient=gradient, **arguments)
        x = torch.linspace(-1, 1, 6, dtype=D).view(2, 3)
        ode(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in ode.parameters()]))
        assert "reversible" in repr(ode).lower()
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


def test_float32_agrees_with_direct():
    field, x0 = net().float(), torch.randn(16, 3, requires_grad=True)
    found = []
    for gradient in ("direct", "reversible"):
        x1 = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=40, gradient=gradient).x1
        grads = torch.autograd.grad(x1.square().sum(), (x0, *field.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-3


def test_an_unstable_coupling_says_so():
    field, x0 = net(), torch.randn(4, 3, dtype=D, requires_grad=True)
    x1 = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=400, gradient=Reversible(0.9)).x1
    with pytest.raises(RuntimeError, match=r"undone, 400 steps end .* away from x0.*coupling nearer to 1"):
        x1.sum().backward()


@pytest.mark.parametrize("coupling", [0.0, -0.5, 1.5, math.nan, "much", True])
def test_couplings_that_are_none_are_refused(coupling):
    with pytest.raises(ValueError, match=r"coupling must be a number in \(0, 1\], got " + re.escape(repr(coupling))):
        Reversible(coupling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "kvaerno5"}, "takes explicit methods, got kvaerno5: take gradient='checkpoint'"),
        ({"event": lambda t, x: x.sum() - 1}, "finds no event"),
        ({"at": [0.5], "control": "sample"}, "no output times with control='sample'"),
        ({"keep": "steps"}, "keeps no steps"),
        ({"graph": True, "keep": "last"}, "graph=True has a gradient of its own.*leave out gradient='reversible'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrate(decay, torch.ones(2, 1, dtype=D), 0.0, 1.0, gradient="reversible", **arguments)


def test_times_that_require_a_gradient_are_refused():
    at = torch.tensor([0.5], requires_grad=True)
    with pytest.raises(ValueError, match="gradient='reversible', which loses it"):
        integrate(net(), torch.ones(2, 3, dtype=D), 0.0, 1.0, at=at, gradient="reversible")


def test_a_second_derivative_is_refused_also_beside_another_term():
    field, x0 = net(), torch.randn(2, 3, dtype=D, requires_grad=True)
    x1 = integrate(field, x0, 0.0, 1.0, steps=4, gradient="reversible").x1
    with pytest.raises(RuntimeError, match=r"no second derivatives.*Take gradient='direct'"):
        torch.autograd.grad(x1.sum() + x0.pow(3).sum(), x0, create_graph=True)


def test_a_solve_that_cannot_go_on_keeps_what_stands():
    with pytest.raises(SolverError) as caught:
        integrate(lambda t, x: x * x, torch.ones(1, 1), 0.0, 2.0, gradient="reversible")
    assert 0.9 < caught.value.solution.t1 <= 1


def test_weights_changed_since_are_refused():
    field, x0 = net(), torch.randn(2, 3, dtype=D, requires_grad=True)
    x1 = integrate(field, x0, 0.0, 1.0, steps=2, gradient="reversible").x1
    with torch.no_grad():
        next(field.parameters()).add_(1)
    with pytest.raises(RuntimeError):
        x1.sum().backward()


def test_a_graph_where_it_pays_leaves_it_alone():
    field, x0 = net(), torch.randn(2, 3, dtype=D)
    how = {"tolerance": Tolerance(1e-3, 1e-5), "keep": "last", "gradient": "reversible"}
    assert torch.equal(integrate(field, x0, 0.0, 1.0, graph="auto", **how).x1, integrate(field, x0, 0.0, 1.0, **how).x1)


def prey(t, x):
    a, b = x.unbind(-1)
    return torch.stack([a * (1 - b), b * (a - 1)], -1)


ONE = torch.ones(1, 1, dtype=D)
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
CONTRACTING = [
    (lambda t, x: -x, ONE, 20.0, {"solver": "rk4", "steps": 200}),
    (lambda t, x: -x, ONE, 10.0, {"solver": "euler", "steps": 100}),
    (lambda t, x: -10 * (x - math.cos(t)), ONE, 15.0, {"solver": "dopri5", "tolerance": Tolerance(1e-3)}),
    (lambda t, x: -10 * (x - t.cos()), ONE, 15.0, {"tolerance": Tolerance(1e-3), "control": "sample"}),
    (lambda t, x: -torch.tanh(3 * x), ONE, 2.0, {"solver": "bs23"}),
]
"""Where the pair comes apart."""
TAME = [
    (lambda t, x: -x, ONE, 1.0, {"solver": "euler", "steps": 10}, 0.06),
    (lambda t, x: -x, ONE, 5.0, {"solver": "rk4", "steps": 200}, 1e-8),
    (lambda t, x: x, ONE, 5.0, {"solver": "euler", "steps": 40}, 0.04),
    (lambda t, x: x, ONE, 5.0, {"solver": "dopri5"}, 0.005),
    (lambda t, x: x @ TURN, ONE.expand(1, 2), 4 * math.pi, {"solver": "euler", "steps": 200}, 0.01),
    (lambda t, x: x @ TURN, ONE.expand(1, 2), 4 * math.pi, {"solver": "dopri5"}, 0.01),
    (lambda t, x: torch.full_like(x, math.cos(t)), 0 * ONE, math.pi, {"solver": "euler", "steps": 40}, 0.08),
    (lambda t, x: torch.full_like(x, math.cos(t)), 0 * ONE, math.pi, {"solver": "bs23"}, 1e-3),
    (lambda t, x: x * (1 - x), ONE / 10, 6.0, {"solver": "euler", "steps": 40}, 0.02),
    (lambda t, x: x * (1 - x), ONE / 10, 6.0, {"solver": "bs23"}, 0.007),
    (prey, torch.tensor([[1.0, 0.5]], dtype=D), 10.0, {"solver": "euler", "steps": 200}, 0.01),
    (lambda t, x: 0 * x, 0 * ONE, 1.0, {"solver": "heun", "steps": 3}, 1e-12),
]
"""Where it stays together, and how far it is from the solution at most."""


@pytest.mark.parametrize("case", range(len(CONTRACTING)))
def test_states_that_come_apart_raise_without_gradients_too(case):
    field, x0, t1, how = CONTRACTING[case]
    with pytest.raises(RuntimeError, match=r"have come apart.*smaller coupling than 0\.999"), torch.no_grad():
        integrate(field, x0, 0.0, t1, gradient="reversible", **how)


@pytest.mark.parametrize("case", range(len(TAME)))
def test_states_that_stay_together_are_near_the_solution(case):
    field, x0, t1, how, error = TAME[case]
    x1 = integrate(field, x0, 0.0, t1, gradient="reversible", **how).x1
    path = integrate(field, x0, 0.0, t1, solver="rk4", steps=1000)
    scale = torch.stack(list(path.states)).abs().max().clamp(min=1e-3)
    assert (x1 - path.x1).abs().max() <= error * scale


def test_a_smaller_coupling_keeps_the_states_together():
    x0 = torch.ones(1, 1, dtype=D, requires_grad=True)
    x1 = integrate(lambda t, x: -x, x0, 0.0, 20.0, solver="rk4", steps=200, gradient=Reversible(0.85)).x1
    assert abs(x1.item() / math.exp(-20) - 1) < 0.01


def test_one_sample_that_comes_apart_is_seen_beside_a_large_one():
    rates, x0 = torch.tensor([[0.0], [1.0]], dtype=D), torch.tensor([[1e6], [1.0]], dtype=D)
    with pytest.raises(RuntimeError, match="those of sample 1 by 2"):
        integrate(lambda t, x: -rates * x, x0, 0.0, 20.0, solver="rk4", steps=200, gradient="reversible")


def test_one_sample_that_is_not_led_back_is_seen_beside_a_large_one():
    x0 = torch.tensor([[1e12, 0.0], [1.0, 0.0]], dtype=D, requires_grad=True)
    field = lambda t, x: x @ TURN * torch.tensor([[0.0], [1.0]], dtype=D)  # noqa: E731
    x1 = integrate(field, x0, 0.0, 10.0, solver="rk4", steps=300, gradient=Reversible(0.9)).x1
    with pytest.raises(RuntimeError, match="undone, 300 steps end"):
        x1.sum().backward()


@pytest.mark.parametrize("steps", [1, 20])
def test_a_state_of_zero_is_led_back_to(steps):
    x0 = torch.zeros(2, 1, dtype=D, requires_grad=True)
    integrate(
        lambda t, x: math.cos(t) + 0 * x, x0, 0.0, 2 * math.pi, solver="rk4", steps=steps, gradient="reversible"
    ).x1.sum().backward()
    assert x0.grad.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("window", [(0.4, 0.6), (0.44, 0.46), (0.95, 2.0), (-1.0, 0.04)])
@pytest.mark.parametrize("starts", [True, False])
def test_a_tensor_that_is_read_now_and_then_is_not_lost(window, starts):
    b = torch.ones(1, dtype=D, requires_grad=True)
    x0 = torch.ones(1, 1, dtype=D, requires_grad=starts)
    field = lambda t, x: -x * (b if window[0] < t < window[1] else 1.0)  # noqa: E731
    x1 = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=10, gradient="reversible").x1
    with pytest.raises(RuntimeError, match=r"reads a tensor of shape \(1,\).*hand it over in parameters"):
        x1.sum().backward()
    x1 = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=10, gradient="reversible", parameters=[b]).x1
    direct = integrate(field, x0, 0.0, 1.0, solver="rk4", steps=10).x1
    grads = [torch.autograd.grad(one.sum(), b)[0].item() for one in (x1, direct)]
    assert abs(grads[0] / grads[1] - 1) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(TypeError, match=r"takes float32 or float64.*x0\.float\(\)"):
        integrate(decay, torch.ones(1, 1, dtype=dtype), 0.0, 1.0, steps=3, gradient="reversible")


def test_a_rejected_attempt_that_is_not_finite_leaves_no_nan():
    x0 = torch.tensor([[1.0], [1.0]], dtype=D, requires_grad=True)
    fast, found = torch.tensor([[0.0], [15.0]], dtype=D), []
    for gradient in ("reversible", "direct"):
        field = lambda t, x: -x.sqrt() * (0.1 + fast * torch.exp(-100 * t * t))  # noqa: E731 - NaN below 0
        solution = integrate(
            field, x0, 0.0, 1.0, control="sample", tolerance=Tolerance(1e-4, first_step=0.4), gradient=gradient
        )
        found.append(torch.autograd.grad(solution.x1.sum(), x0)[0])
    assert solution.sample_stats.rejected[1] > solution.sample_stats.rejected[0]
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)


@pytest.mark.parametrize("gradient", ["reversible", "backsolve"])
@pytest.mark.parametrize("at", [None, [0.5, 2.0]])
def test_the_part_that_stands_is_a_state_as_it_was_given(gradient, at):
    x0 = (torch.ones(1, 1), torch.ones(1, 2))
    with pytest.raises(SolverError) as caught:
        integrate(lambda t, x: (x[0] * x[0], 0 * x[1]), x0, 0.0, 2.0, at=at, gradient=gradient, parameters=())
    assert [x.shape for x in caught.value.solution.x1] == [(1, 1), (1, 2)]


def test_clashes_and_names_from_elsewhere_are_refused_when_it_is_made():
    with pytest.raises(ValueError, match="finds no event"):
        NeuralODE(MLPField(2), event=lambda t, x: x[:, 0], gradient="reversible")
    with pytest.raises(TypeError, match=r"Reversible\(coupling=0\.999\)"):
        NeuralODE(MLPField(2), coupling=0.99)
    with pytest.raises(ValueError, match=r"gradient=Reversible\(0\.99\)"):
        NeuralODE(MLPField(2), gradient=0.99)
    with pytest.raises(TypeError, match="ReversibleFlow"):
        Flow(MLPField(2), gradient="reversible")
