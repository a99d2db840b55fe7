import copy
import math
import re

import numpy as np
import pytest
import torch

import odenets
from odenets import measures
from odenets.checkpoints import fingerprint, load_weights, save_weights
from odenets.modes import dtype_of
from solvers import ButcherTableau, LearnedTableau, Tolerance, combine, get_tableau, integrate, rk_step
from solvers.coefficients import Coefficients
from tests.solvers.problems import D

STARTS = [("rk4", 3), ("rk4", 2), ("rk4", 1), ("bs23", 3), ("dopri5", 3), ("heun", 2), ("midpoint", 1), ("heun3", 2)]


def field(t, x):
    return torch.sin(x) + t


def wave(t, x):
    return -3 * torch.cos(torch.as_tensor(3 * t, dtype=x.dtype)) * x


def moved(start, order=None, scale=0.1, **options):
    """One whose parameters are drawn at random."""
    learned = LearnedTableau(start, order=order, **options)
    for p in learned.parameters():
        torch.nn.init.normal_(p, std=scale)
    return learned


def missed(now, order):
    """By how much the conditions are off, in order."""
    c, b = torch.stack(now.c), now.b
    a = torch.zeros(now.stages, now.stages, dtype=D)
    for i, row in enumerate(now.a):
        a[i, :i] = row
    torch.testing.assert_close(a.sum(1), c, rtol=0, atol=1e-14)
    sums = [b.sum() - 1, b @ c - 1 / 2, b @ c**2 - 1 / 3, b @ (a @ c) - 1 / 6][: {1: 1, 2: 2, 3: 4}[order]]
    return max(abs(one.item()) for one in sums)


@pytest.mark.parametrize(("start", "order"), STARTS)
def test_the_order_holds_at_random_parameters_and_frozen_tableaus_check_themselves(start, order):
    for _ in range(20):
        learned = moved(start, order)
        assert missed(learned.coefficients(), order) <= 1e-12
        assert learned.tableau().order == order  # whose own checks have passed


@pytest.mark.parametrize("stages", [2, 4, 5, 7])
def test_stages_alone_begin_with_a_chain(stages):
    learned = LearnedTableau(stages=stages)
    assert (learned.order, learned.stages, learned.interior) == (2, stages, stages)
    assert learned.tableau().b == pytest.approx([*[0.0] * (stages - 1), 1.0], abs=1e-15)
    assert missed(moved(None, stages=stages, order=1).coefficients(), 1) <= 1e-12


@pytest.mark.parametrize("stages", [4, 5, 8])
def test_a_chain_of_order_3_has_the_nearest_weights_of_it(stages):
    learned = LearnedTableau(stages=stages, order=3)
    assert missed(learned.coefficients(), 3) <= 1e-12
    assert sum(map(abs, learned.tableau().b)) < 9
    assert missed(moved(None, 3, 0.01, stages=stages).coefficients(), 3) <= 1e-12
    errors = []
    for n in (64, 128):
        x1 = integrate(wave, torch.ones(1, 1, dtype=D), 0.0, 2.0, solver=learned.tableau(), steps=n).x1
        errors.append(abs(x1.item() - math.exp(-math.sin(6.0))))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize(("start", "order"), STARTS)
def test_it_begins_as_its_start(start, order):
    learned, tableau = LearnedTableau(start, order=order), get_tableau(start)
    frozen = learned.tableau("mine")
    assert frozen.name == "mine"
    np.testing.assert_allclose(frozen.b, tableau.b, rtol=0, atol=1e-13)
    assert frozen.a == tableau.a
    x = torch.randn(4, 2, dtype=D)
    step = rk_step(field, 0.3, x, 0.1, learned)
    torch.testing.assert_close(step.x1, rk_step(field, 0.3, x, 0.1, tableau).x1, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("start", "order"), [("rk4", 1), ("rk4", 2), ("rk4", 3), ("dopri5", 3)])
def test_it_converges_at_its_order_on_a_problem_that_depends_on_time(start, order):
    learned, errors, counts = moved(start, order), [], [128, 256, 512]
    for solver in (learned, learned.tableau()):
        errors = []
        for n in counts:
            with torch.no_grad():
                x1 = integrate(wave, torch.ones(1, 1, dtype=D), 0.0, 2.0, solver=solver, steps=n).x1
            errors.append(abs(x1.item() - math.exp(-math.sin(6.0))))
        assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-order, abs=0.1)


@pytest.mark.parametrize(("start", "order"), [("rk4", 3), ("rk4", 1), ("bs23", 2)])
def test_gradients_of_the_coefficients_are_those_of_differences(start, order):
    learned, x = moved(start, order).double(), torch.randn(3, 2, dtype=D)
    values = tuple(p.detach().clone().requires_grad_() for p in learned.parameters())

    def solve(*parameters):
        names = [name for name, _ in learned.named_parameters()]
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Solve(learned, x), {f"learned.{k}": v for k, v in given.items()}, ())

    assert torch.autograd.gradcheck(solve, values)


class _Solve(torch.nn.Module):
    def __init__(self, learned, x):
        super().__init__()
        self.learned, self.x = learned, x

    def forward(self):
        return integrate(wave, self.x, 0.2, 1.0, solver=self.learned, steps=2).x1


@pytest.mark.parametrize("numel", [6, 1 << 15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_sums_with_weights_in_a_tensor_are_those_of_numbers(numel, dtype):
    x, stages = torch.randn(2, numel // 2, dtype=dtype), [torch.randn(2, numel // 2, dtype=dtype) for _ in range(3)]
    weights = torch.tensor([0.2, 0.0, 0.8], dtype=D, requires_grad=True)
    result = combine(x, stages, weights, 0.1)
    torch.testing.assert_close(result, combine(x, stages, weights.tolist(), 0.1))
    assert result.dtype == dtype
    result.abs().sum().backward()
    assert (weights.grad != 0).all()  # also of the weight that is 0


@pytest.mark.parametrize("numel", [3, 1 << 14])
@pytest.mark.parametrize("measure", ["action", "residue", "cosine", "displacement", "square_norm", "acceleration"])
def test_measures_are_those_of_the_frozen_tableau_and_have_gradients(measure, numel):
    learned, x = moved("rk4", 2), torch.randn(4, numel, dtype=D)
    function = getattr(measures, measure)
    value = function(rk_step(field, 0.0, x, 0.1, learned))
    frozen = rk_step(field, 0.0, x, 0.1, learned.tableau())
    torch.testing.assert_close(value, function(frozen))
    fused = rk_step(field, 0.0, x, 0.1, learned, reductions=("action", "residue"))
    torch.testing.assert_close(function(fused), function(frozen))
    torch.testing.assert_close(fused.x1, frozen.x1)
    value.sum().backward()
    assert learned.change_a.grad.abs().sum() > 0
    assert measure == "acceleration" or learned.change_b.grad.abs().sum() > 0  # which reads stages alone
    torch.testing.assert_close(measures.action(fused, p=3.0), measures.action(frozen, p=3.0))


def test_a_step_has_its_residue_and_its_output():
    learned, x = moved("rk4", 2), torch.randn(4, 3)
    step = rk_step(field, 0.0, x, 0.1, learned)
    torch.testing.assert_close(step.residue, (step.x1 - x) / 0.1, rtol=1e-4, atol=1e-5)
    assert step.output("order2") is step.x1
    for call in (step.error, lambda: step.at(0.5), lambda: step.output("euler")):
        with pytest.raises(ValueError, match=r"learned rk4 (carries no embedded error|has no)"):
            call()


@pytest.mark.parametrize("at", [None, [0.3, 0.7]])
def test_states_at_times_are_those_of_the_frozen_tableau(at):
    learned, x = moved("rk4", 2), torch.randn(4, 3, dtype=D)
    options = {"steps": 3, "at": at, "event": None}
    ours, frozen = (integrate(field, x, 0.0, 1.0, solver=s, **options) for s in (learned, learned.tableau()))
    torch.testing.assert_close(ours.states[-1], frozen.states[-1])
    assert ours.stats == frozen.stats


MAKERS = {
    "flow": lambda solver: odenets.Flow(odenets.MLPField(3), solver=solver, depth=2),
    "shared flow": lambda solver: odenets.Flow(odenets.MLPField(3), solver=solver, depth=2, shared=True),
    "untied flow": lambda solver: odenets.Flow(lambda: odenets.MLPField(3), solver=solver, stage_fields="untied"),
    "lazy flow": lambda solver: odenets.Flow(solver=solver, depth=2),
    "neural ODE": lambda solver: odenets.NeuralODE(odenets.MLPField(3), solver=solver, steps=2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_networks_train_it_and_keep_it_in_their_state(name, tmp_path):
    x, network = torch.randn(16, 3), MAKERS[name](LearnedTableau("rk4", order=2))
    network(x)
    before = network.tableau.tableau()
    target = torch.randn(16, 3)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    losses = []
    for _ in range(3):
        output, records = network.record(x, action=measures.action)
        loss = (output - target).square().mean() + 0.1 * records["action"].mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in network.tableau.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert network.tableau.tableau().b != before.b
    assert {"tableau.change_a", "tableau.change_b"} <= network.state_dict().keys()
    other = MAKERS[name](LearnedTableau("rk4", order=2))
    other(x)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))
    saved = save_weights(network, tmp_path / "weights.safetensors")
    again = load_weights(MAKERS[name](LearnedTableau("rk4", order=2)), saved)
    assert torch.equal(again(x), network(x))
    assert fingerprint(again) == fingerprint(network)
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    for wrong in (LearnedTableau("rk4", order=3), LearnedTableau("bs23", order=2)):
        if "ODE" not in name:
            with pytest.raises(ValueError, match="must have the solver that it was saved with, learned rk4"):
                load_weights(MAKERS[name](wrong), saved)


def test_parts_copies_and_other_depths_of_a_flow_have_it():
    flow, x = MAKERS["flow"](moved("rk4", 2)), torch.randn(4, 3)
    torch.testing.assert_close(flow.part(1, 2)(flow.part(0, 1)(x)), flow(x))
    assert flow.part(0, 1).tableau is flow.tableau
    assert torch.allclose(flow.at_depth(4)(x), flow(x), atol=0.1)
    torch.testing.assert_close(flow.ensemble(x, full_passes=True), flow(x))
    torch.testing.assert_close(flow(x, readout="ensemble"), flow(x))


def test_it_does_not_count_for_the_dtype_of_a_network():
    flow = odenets.Flow(lambda: odenets.MLPField(3).double(), solver=LearnedTableau("rk4"), depth=4)
    assert dtype_of(flow) == D
    x = torch.randn(5, 3, dtype=D)
    assert flow.at_depth(2, inputs=[x])(x).dtype == D


def test_a_state_brings_its_start_along():
    learned, other = moved("rk4", 2), LearnedTableau("rk4_38", order=2)
    other.load_state_dict(learned.state_dict())
    assert other.tableau().a == learned.tableau().a
    assert other.tableau().b == learned.tableau().b
    with pytest.raises(ValueError, match="of order 2 with 10 coefficients, and learned heun of order 2 and 2 stages"):
        LearnedTableau("heun", order=2).load_state_dict(learned.state_dict())
    with pytest.raises(ValueError, match="state is of order 2 with 10 coefficients, and learned rk4 of order 3"):
        LearnedTableau("rk4", order=3).set_extra_state(learned.get_extra_state())


def test_it_compiles_and_its_weights_are_nan_where_nothing_can_raise():
    flow, x = MAKERS["flow"](moved("rk4", 2)), torch.randn(4, 3)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow(x))
    with torch.no_grad():
        flow.tableau.change_a.copy_(-flow.tableau._start[:6])
    assert compiled(x).isnan().all()


@pytest.mark.parametrize("order", [2, 3])
def test_nodes_of_which_too_few_differ_are_refused(order):
    learned = LearnedTableau("rk4", order=order)
    with torch.no_grad():
        learned.change_a.copy_(-learned._start[:6])  # all at the first
    with pytest.raises(ValueError, match=rf"no weights b satisfy the conditions of order {order} with the nodes \[0.0"):
        integrate(field, torch.ones(1, 1), 0.0, 1.0, solver=learned, steps=1)
    learned.change_a.data.fill_(math.nan)
    with pytest.raises(ValueError, match="no weights b satisfy"):
        learned.tableau()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give start, .*, or stages"),
        ({"start": "rk4", "stages": 5}, ValueError, "give start, .*got 'rk4' and 5"),
        ({"start": "rk4", "order": 4}, ValueError, "order must be 1, 2 or 3, got 4"),
        ({"start": "rk4", "order": True}, TypeError, "order must be 1, 2 or 3, got True"),
        ({"start": "heun", "order": 3}, ValueError, "order must be at most 2, that of the start heun, got 3"),
        (
            {"start": "heun3", "order": 3},
            ValueError,
            "from 4 stages on, and heun3 has 3: take order=2, or 4 stages",
        ),
        ({"stages": 3, "order": 3}, ValueError, "from 4 stages on, and chain of 3 stages has 3: take order=2"),
        (
            {"start": "leapfrog"},
            ValueError,
            "must be an explicit method, as rk4, .*: leapfrog is for .* separable",
        ),
        ({"start": "etd2rk"}, ValueError, "must be an explicit method, as rk4, .*: etd2rk is for .* semilinear"),
        ({"start": "kvaerno5"}, ValueError, "start must be an explicit method, as rk4, .*: kvaerno5 is implicit"),
        ({"start": "euler"}, ValueError, "at least 2 stages, .*got euler"),
        ({"stages": 1}, ValueError, "stages must be at least 2"),
        ({"stages": 2.0}, TypeError, "stages must be a whole number, got 2.0"),
        ({"start": "rk5"}, ValueError, "unknown solver 'rk5'"),
        ({"start": LearnedTableau("rk4")}, TypeError, "start must be .*, got LearnedTableau"),
    ],
)
def test_starts_that_are_none_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LearnedTableau(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "learned rk4 carries no embedded error, .* take steps=n"),
        ({"tolerance": Tolerance()}, "carries no embedded error"),
        ({"control": "sample"}, "carries no embedded error"),
        ({"steps": 3, "control": "sample"}, "leave out steps"),
        ({"steps": 3, "graph": True, "keep": "last"}, "graph"),
        (
            {"steps": 3, "gradient": "checkpoint", "keep": "last"},
            r"would lose .*'direct', or .*tableau\(\)",
        ),
        ({"steps": 3, "gradient": "backsolve", "keep": "last"}, "gradient='backsolve' would lose the gradient"),
        ({"steps": 3, "gradient": "reversible", "keep": "last"}, "gradient='reversible' would lose the gradient"),
    ],
)
def test_what_would_lose_its_gradient_is_refused(options, message):
    net = odenets.MLPField(3)
    with pytest.raises(ValueError, match=message):
        integrate(net, torch.randn(2, 3), 0.0, 1.0, solver=LearnedTableau("rk4"), **options)
    if options.get("keep"):
        frozen = LearnedTableau("rk4").requires_grad_(False)
        if "gradient" in options:
            integrate(net, torch.randn(2, 3), 0.0, 1.0, solver=frozen, **options).x1.sum().backward()
            assert any(p.grad is not None for p in net.parameters())
            with torch.no_grad():  # where nothing is lost
                x1 = integrate(net, torch.ones(2, 3), 0.0, 1.0, solver=LearnedTableau("rk4"), **options).x1
            assert x1.isfinite().all()
    options = {k: v for k, v in options.items() if k != "keep"}
    with pytest.raises(ValueError, match=message):
        odenets.NeuralODE(net, solver=LearnedTableau("rk4"), **options)


def test_what_reads_an_embedded_error_refuses_it():
    flow, x = MAKERS["flow"](LearnedTableau("rk4")), torch.randn(2, 3)
    with pytest.raises(ValueError, match="carries no embedded error"):
        flow.record(x, error=measures.error)
    with pytest.raises(ValueError, match="carries no embedded error"):
        _ = flow.tableau.error_order
    with pytest.raises(ValueError, match=re.escape("learned rk4 has no output 'euler'; it has order3")):
        flow.tableau.forwarding("euler")


def test_a_step_keeps_the_coefficients_of_its_moment():
    learned = LearnedTableau("rk4", order=2)
    step = rk_step(field, 0.0, torch.ones(1, 2), 0.1, learned)
    assert isinstance(step.tableau, Coefficients)
    assert not isinstance(step.tableau, ButcherTableau)
    before = step.residue.clone()
    with torch.no_grad():
        learned.change_b.fill_(0.3)
        learned.change_a.fill_(0.1)
    assert torch.equal(step.residue, before)
    assert learned.double().change_a.dtype == D
