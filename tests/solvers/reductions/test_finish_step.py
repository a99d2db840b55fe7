import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import get_tableau, reductions
from solvers.reductions import combine, finish_step, functional, weighted_action, weighted_root_mean_square
from tests.solvers.reductions.operands import LARGE, SHAPES, TOLERANCE, D, laid_out

pytestmark = pytest.mark.usefixtures("route")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(solver=st.sampled_from(["euler", "heun", "bs23", "dopri5"]), scaled=st.booleans(), sized=st.booleans(), **SHAPES)
def test_the_finish_of_a_step(solver, batch, features, dtype, layout, scaled, sized, seed):
    tableau, generator = get_tableau(solver), torch.Generator().manual_seed(seed)
    draw = lambda: laid_out(torch.randn(batch, *features, generator=generator, dtype=D).to(dtype), layout)  # noqa: E731
    x0, p = draw(), [draw() for _ in range(tableau.stages)]
    h = torch.rand(batch, generator=generator) + 0.1 if sized else 0.3
    tolerances = {"rtol": 0.1, "atol": 0.01} if scaled else {}
    error = tableau.error_weights is not None
    x1, values = finish_step(x0, p, tableau, h, error=error, action=True, residue=True, **tolerances)
    wide, size = [q.double() for q in p], h.double().reshape(-1, *[1] * len(features)) if sized else h
    r = sum(w * q for w, q in zip(tableau.b, wide, strict=True))
    expected = x0.double() + size * r
    assert (x1.dtype, x1.shape) == (dtype, x0.shape)
    near = TOLERANCE[dtype] if dtype in (torch.float64, torch.float32) else 2e-2
    torch.testing.assert_close(x1.double(), expected, rtol=near, atol=near)
    near = 1e-4 if dtype == torch.float32 else near
    torch.testing.assert_close(values["residue"].double(), r.square().flatten(1).mean(1), rtol=near, atol=near)
    action = sum(w * q.square().flatten(1).mean(1) for w, q in zip(tableau.b, wide, strict=True))
    action = action * (h.double() if sized else h)
    torch.testing.assert_close(values["action"].double(), action, rtol=near, atol=near)
    if error:
        eps = size * sum(w * q for w, q in zip(tableau.error_weights, wide, strict=True))
        eps = eps / (0.01 + 0.1 * torch.maximum(x0.double().abs(), expected.abs())) if scaled else eps
        torch.testing.assert_close(
            values["error"].double(), eps.square().flatten(1).mean(1).sqrt(), rtol=near, atol=near
        )


@pytest.mark.parametrize(("size", "h"), [(1e25, 1e-20), (1e-25, 1e20)])
@pytest.mark.parametrize("sized", [False, True])
def test_errors_are_scaled_by_the_step_before_they_are_squared(size, h, sized):
    x0, p, q = torch.zeros(2, 20_000), *(size * torch.randn(2, 2, 20_000)).requires_grad_().unbind()
    steps, tableau = torch.full((2,), h) if sized else h, get_tableau("heun")
    expected = (h * (q - p).double() / 2).square().mean(1).sqrt()
    of_p = torch.autograd.grad(expected.sum(), p)[0].double()
    for value in (
        weighted_root_mean_square([p, q], tableau.error_weights, steps),
        finish_step(x0, [p, q], tableau, steps, error=True, atol=1.0)[1]["error"],
        finish_step(x0, [p, q], tableau, steps, error=True, atol=1.0, rtol=1e-30)[1]["error"],
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(value.sum(), p, retain_graph=True)
        torch.testing.assert_close(grad.double(), of_p, rtol=1e-5, atol=float(of_p.abs().max()) * 1e-6)
    for rtol in (0.0, 1e-30):
        ratios = reductions.error_ratios(x0, x0, [p.detach(), q.detach()], tableau, steps, rtol, 1.0)
        torch.testing.assert_close(ratios.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_gradients_of_the_finish_of_a_step(check, scaled, sized):
    tolerances = {"rtol": 0.1, "atol": 0.01} if scaled else {}

    def finish(h, x0, *p):
        x1, values = finish_step(x0, p, get_tableau("bs23"), h, error=True, action=True, residue=True, **tolerances)
        return x1, *values.values()

    operands = [torch.randn(2, 3, dtype=D, requires_grad=True) for _ in range(5)]
    h = torch.rand(2, dtype=D, requires_grad=True) if sized else 0.3
    assert check(finish, (h, *operands))


@pytest.mark.parametrize("of", ["x1", "error", "action", "residue", "cosine"])
@pytest.mark.parametrize("needed", [0, 1, 3, 4])
def test_each_gradient_alone_is_that_of_the_expression(of, needed, monkeypatch):
    operands = [torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(5)]
    operands[needed].requires_grad_()
    tableau = get_tableau("bs23")
    wanted = {"error": True, "action": True, "residue": True, "rtol": 0.1, "atol": 0.1}
    x1, values = finish_step(operands[0], operands[1:], tableau, 0.4, **wanted)
    values["x1"] = x1
    monkeypatch.setattr(functional, "SMALL", sys.maxsize)
    x1, expected = finish_step(operands[0], operands[1:], tableau, 0.4, **wanted)
    expected["x1"] = x1
    if not expected[of].requires_grad:
        return
    (ours,), (theirs,) = (
        torch.autograd.grad(v[of].sum(), operands[needed], allow_unused=True, materialize_grads=True)
        for v in (values, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_stage_that_is_not_read_spoils_nothing():
    x0, *p = torch.randn(4, 2, 3).requires_grad_()
    x1, values = finish_step(
        x0, [*p, torch.full_like(x0, math.nan)], get_tableau("bs23"), 0.1, action=True, residue=True
    )
    (x1.sum() + sum(v.sum() for v in values.values())).backward(inputs=[x0])
    assert x1.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_numbers_no_error(shape):
    x0 = torch.zeros(shape, requires_grad=True)
    x1, values = finish_step(x0, [x0, x0], get_tableau("heun"), 0.1, error=True, action=True, residue=True)
    assert x1.shape == shape
    assert all(len(v) == len(x0) for v in values.values())
    assert not values["cosine"].any()
    assert torch.equal(reductions.mean_square_and_cosine(x0)[1], torch.zeros(len(x0)))
    x1.sum().backward()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("of", ["x1", "action", "residue"])
def test_a_stage_that_is_not_read_gets_no_gradient(sized, of, create_graph):
    x0, *p = torch.randn(5, 2, 3).requires_grad_()
    h = torch.rand(2).requires_grad_(create_graph) if sized else 0.1
    x1, values = finish_step(x0, p, get_tableau("bs23"), h, error=True, action=True, residue=True)
    loss = (values | {"x1": x1})[of].sum()
    grads = torch.autograd.grad(loss, p, allow_unused=True, create_graph=create_graph)
    assert [grad is None for grad in grads] == [False, False, False, True]


def test_a_state_alone_keeps_nothing_for_its_gradient():
    x, p, q = torch.randn(3, 2, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x1 = combine(x, [p, q], (0.5, 0.5), 0.1)
    assert not saved
    (grad,) = torch.autograd.grad(x1.sum(), p)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.05))


def test_threads_change_no_bit(route):
    if route == "expression":
        pytest.skip("torch's own sums depend on them")
    x0, *p = torch.randn(5, 7, 33 * LARGE + 5, requires_grad=True).unbind()
    one = torch.randn(1, 33 * LARGE + 5)

    def run(threads):
        torch.set_num_threads(threads)
        x1, values = finish_step(x0, p, get_tableau("bs23"), 0.1, error=True, action=True, residue=True)
        grads = torch.autograd.grad(x1.sum() + sum(values.values()).sum(), [x0, *p])
        return x1, *values.values(), *grads, *reductions.mean_square_and_cosine(one), reductions.power_mean(one, 3)

    before = torch.get_num_threads()
    try:
        one_thread, three_threads = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one_thread, three_threads, strict=True))


@pytest.mark.parametrize(("h", "size"), [(0.01, 100), (1.0, 5)], ids=["a small step", "a residual block"])
@pytest.mark.parametrize("without", ["action", "residue", "nothing"])
def test_gradients_of_a_single_stage_are_those_of_the_expression_whatever_the_state(without, h, size):
    x0, p = size + torch.randn(3, 20000).requires_grad_(), torch.randn(3, 20000, requires_grad=True)
    x1, values = finish_step(x0, (p,), get_tableau("euler"), h, action=True, residue=True)
    wide = p.detach().double().requires_grad_()
    squares = wide.square().mean(1)
    expected = {"action": h * squares, "residue": squares, "cosine": wide.mean(1) / squares.sqrt()}

    def grads(x1, values, p, **options):
        of_action = 0 if without == "action" else values["action"].sum()
        of_residue = 0 if without == "residue" else (values["residue"] * values["cosine"]).sum()
        return torch.autograd.grad(1e-6 * x1.sum() + of_action + of_residue, p, **options)[0]

    reference = grads(x0.detach().double() + h * wide, expected, wide, create_graph=True)
    (second,) = torch.autograd.grad(reference.square().sum(), wide)
    reference = reference.detach()
    for options in ({"retain_graph": True}, {"create_graph": True}):
        ours = grads(x1, values, p, **options)
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=float(reference.abs().max()) * 1e-6)
    (again,) = torch.autograd.grad(ours.square().sum(), p)
    torch.testing.assert_close(again.double(), second, rtol=1e-5, atol=float(second.abs().max()) * 1e-5)


def finish(solver="heun", stages=2, p=0, h=0.1, **options):
    x0 = torch.ones(2, 2)
    return finish_step(x0, [x0 if isinstance(p, int) else p] * stages, get_tableau(solver), h, **options)


def action(*others, weights=(0.5, 0.5), h=1.0):
    return weighted_action([torch.ones(2, 2), *others], weights, h)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reductions.mean_square([1.0]), TypeError, "r must be a tensor"),
        (lambda: reductions.mean_square(torch.ones(3)), ValueError, r"r must have shape \(B, \*S\)"),
        (
            lambda: reductions.mean_square_and_cosine(torch.ones(2, 2).long()),
            TypeError,
            "floating dtype, got torch.int64",
        ),
        (lambda: reductions.power_mean(torch.ones(2, 2), 0.5), ValueError, "p must be finite and at least 1, got 0.5"),
        (lambda: action(), ValueError, "weights ask for 2 stages, got 1"),
        (lambda: action(torch.ones(2, 2), weights=(1.0,)), ValueError, "one per stage, got 1 for 2"),
        (lambda: action(weights=(0.0,)), ValueError, "weights must not all be 0"),
        (lambda: action(torch.ones(2, 3)), ValueError, r"stages must have one shape, dtype and device, got \(2, 3\)"),
        (lambda: action(torch.ones(2, 2, dtype=D)), ValueError, "one shape, dtype and device"),
        (
            lambda: action(torch.ones(2, 2, device="meta")),
            ValueError,
            r"float32 meta beside \(2, 2\) torch.float32 cpu",
        ),
        (lambda: action(weights=(1.0,), h=torch.ones(3)), ValueError, "h must be a number or one per"),
        (lambda: finish(stages=3), ValueError, "stages must be the 2 of heun, got 3"),
        (lambda: finish(solver="bs23", stages=3, error=True), ValueError, "error needs the closing stage of bs23"),
        (lambda: finish(solver="rk4", stages=4, error=True), ValueError, "rk4 carries no embedded error"),
        (lambda: finish(p=torch.ones(2, 3)), ValueError, r"of x0, \(2, 2\) .* got \(2, 3\)"),
        (lambda: finish(p=torch.ones(2, 2, dtype=D)), ValueError, "shape, dtype and device of x0"),
        (lambda: finish(p=torch.ones(2, 2, device="meta")), ValueError, "float32 meta"),
        (lambda: finish(p=None), ValueError, "got NoneType"),
        (lambda: finish(rtol=0.0, error=True), ValueError, "not both 0, got 0.0 and 0.0"),
        (lambda: finish(atol=math.nan, error=True), ValueError, "must be finite"),
        (lambda: finish(h=torch.ones(3)), ValueError, r"h must be a number or one per sample .* got shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
