import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import get_tableau
from solvers.reductions import (
    combine,
    displaced,
    finish_step,
    functional,
    mean_square,
    mean_square_and_cosine,
    power_mean,
    root_mean_square,
    weighted_action,
)
from solvers.reductions.reference import ReductionSpec
from tests.counting import VIEWS

D = torch.float64
WEIGHTS = (2 / 9, 1 / 3, 0.0, 4 / 9)


def stages(r):
    return [r, 0.5 * r, r * math.nan, r + 1]


OURS = {
    "mean_square": lambda r: (mean_square(r),),
    "root_mean_square": lambda r: (root_mean_square(r),),
    "power_mean 1": lambda r: (power_mean(r, 1),),
    "power_mean 3": lambda r: (power_mean(r, 3.0),),
    "mean_square_and_cosine": mean_square_and_cosine,
    "weighted_action": lambda r: (weighted_action(stages(r), WEIGHTS, 0.3),),
}
REFERENCE = {
    "mean_square": lambda r: (r.square().flatten(1).mean(1),),
    "root_mean_square": lambda r: (r.square().flatten(1).mean(1).sqrt(),),
    "power_mean 1": lambda r: (r.abs().flatten(1).mean(1),),
    "power_mean 3": lambda r: (r.abs().pow(3).flatten(1).mean(1),),
    "mean_square_and_cosine": lambda r: (
        r.square().flatten(1).mean(1),
        torch.nn.functional.cosine_similarity(r.flatten(1), torch.ones_like(r.flatten(1)), dim=1, eps=0),
    ),
    "weighted_action": lambda r: (
        0.3 * sum(w * p.square().flatten(1).mean(1) for p, w in zip(stages(r), WEIGHTS, strict=True) if w),
    ),
}
NAMES = list(OURS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


LARGE = 1 << 16  # more than a block and a segment of any kernel


@pytest.fixture(autouse=True, params=["expression", "operator"])
def route(request, monkeypatch):
    """Every route to a result; memory that nobody wrote to holds NaN."""
    monkeypatch.setattr(functional, "SMALL", sys.maxsize if request.param == "expression" else -1)
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def laid_out(r, layout):
    match layout:
        case "channels last" if r.ndim == 4:
            return r.contiguous(memory_format=torch.channels_last)
        case "transposed":
            return r.movedim(-1, 1).contiguous().movedim(1, -1)
        case "sliced":
            return torch.cat([r, r], -1)[..., : r.shape[-1]]
        case "expanded":
            return r[:1].expand_as(r)
    return r


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 5),
    features=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(["contiguous", "channels last", "transposed", "sliced", "expanded"]),
    magnitude=st.sampled_from([1.0, 1e-3, 1e2]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_dtype_and_layout(name, batch, features, dtype, layout, magnitude, seed):
    noise = torch.randn(batch, *features, generator=torch.Generator().manual_seed(seed), dtype=D)
    r = laid_out((magnitude * noise).to(dtype), layout)
    if name == "weighted_action" and dtype in (torch.bfloat16, torch.float16):
        return  # its stages have that precision
    values, expected = OURS[name](r), REFERENCE[name](r.double())
    for ours, theirs in zip(values, expected, strict=True):
        assert ours.shape == (batch,)
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 3 * LARGE + 1), (7, LARGE - 1), (2000, 3), (3, 2, 5, 7)])
def test_shapes_beside_the_block(name, shape):
    r = torch.randn(shape)
    for ours, theirs in zip(OURS[name](r), REFERENCE[name](r.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    again = OURS[name](r)
    assert all(torch.equal(a, b) for a, b in zip(OURS[name](r), again, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2), (1, 1)])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients(check, name, shape):
    assert check(OURS[name], torch.randn(shape, dtype=D, requires_grad=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_reference_in_the_dtype_of_the_operand(name, dtype):
    r = torch.randn(4, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(sum(v.sum() for v in OURS[name](r)), r)
    wide = r.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(sum(v.sum() for v in REFERENCE[name](wide)), wide)
    assert grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_at_rest_values_and_gradients_are_finite(name):
    r = torch.zeros(2, 3, requires_grad=True)
    values = OURS[name](r)
    (grad,) = torch.autograd.grad(sum(v.sum() for v in values), r)
    assert grad.isfinite().all()
    if name != "weighted_action":
        assert all(torch.equal(v, torch.zeros(2)) for v in values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
def test_extreme_numbers_pass_as_they_do_in_torch(name, value):
    r = torch.randn(3, 5)
    r[1, 2] = value
    for ours, theirs in zip(OURS[name](r), REFERENCE[name](r), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    r, direction = torch.randn(4, 3, 5, dtype=D), torch.randn(4, 3, 5, dtype=D)
    compiled = torch.compile(OURS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(r), OURS[name](r))
    mapped = torch.vmap(OURS[name], in_dims=1)(torch.stack([r, direction], 1))
    for i, one in enumerate((r, direction)):
        torch.testing.assert_close(tuple(v[i] for v in mapped), OURS[name](one))
    leaf = r.clone().requires_grad_()
    values, tangents = torch.func.jvp(OURS[name], (r,), (direction,))
    torch.testing.assert_close(values, OURS[name](r))
    for i, tangent in enumerate(tangents):
        (grad,) = torch.autograd.grad(OURS[name](leaf)[i].sum(), leaf)
        torch.testing.assert_close(tangent.sum(), (grad * direction).sum())
    torch.testing.assert_close(
        torch.func.grad(lambda r: sum(v.sum() for v in OURS[name](r)))(r),
        torch.autograd.grad(sum(v.sum() for v in OURS[name](leaf)), leaf)[0],
    )


SPECS = {
    "state": ReductionSpec(b=(0.5, 0.25), e=(0.0, 0.0), state=True),
    "all": ReductionSpec(
        b=(0.5, 0.25), e=(0.5, -0.5), rtol=0.1, atol=0.1, state=True, error=True, action=True, residue=True
    ),
    "values": ReductionSpec(b=(0.5, 0.25), e=(0.5, -0.5), error=True, action=True),
}


def check_operator(operator, x, p, call):
    """What torch asks of an operator, and its values under vmap and autocast."""
    torch.library.opcheck(operator, call(x, p))
    x, p = x.detach(), p.detach()
    mapped = torch.vmap(lambda p: operator(*call(x, p)), 1)(torch.stack([p, p + 1], 1))
    for i in range(2):
        torch.testing.assert_close(tuple(v[i] for v in mapped), operator(*call(x, p + i)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(operator(*call(x, p)), (plain := operator(*call(x, p))), rtol=0, atol=0)
    assert all(v.dtype == torch.float32 for v in plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("sized", [False, True])
def test_torch_accepts_the_finish_of_a_step(spec, sized):
    x, p = torch.randn(2, 4, 3, 5, requires_grad=True).unbind()
    sizes = torch.rand(4) if sized else None
    operator = torch.ops.solvers.finish_step.default
    check_operator(operator, x, p, lambda x, p: (x, [p, p.detach() + 1], sizes, 0.3, *spec.numbers))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("power", [2.0, 3.0])
@pytest.mark.parametrize("mean", [False, True])
def test_torch_accepts_row_moments(power, mean):
    x, p = torch.randn(2, 4, 3, 5, requires_grad=True).unbind()
    operator = torch.ops.solvers.row_moments.default
    check_operator(operator, x, p, lambda x, p: ([p, x], (1.0, -0.5), power, mean))


def test_forward_mode_gives_tangents():
    r, direction = torch.randn(3, 4, dtype=D), torch.randn(3, 4, dtype=D)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(r, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(mean_square(dual)).tangent
    torch.testing.assert_close(tangent, (2 * r * direction).mean(1))


def test_autocast_changes_nothing():
    r = torch.randn(4, 300)
    plain = OURS["mean_square_and_cosine"](r)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mean_square_and_cosine(r), plain, rtol=0, atol=0)
        assert mean_square(r.bfloat16()).dtype == torch.float32


class Watching(TorchDispatchMode):
    """Sees every operation on more than a number per sample, views aside, and lets it through."""

    def __init__(self):
        super().__init__()
        self.large = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if func not in VIEWS and any(x.numel() > 4 for x in tensors):
            self.large.append(str(func))
        return result


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_reads_its_operands_by_one_operator_forward_and_one_backward(name, route):
    if route == "expression":
        pytest.skip("a chain of operations")
    r = torch.randn(4, 100, requires_grad=True)
    with Watching() as other:
        _ = stages(r) if name == "weighted_action" else ()
    with Watching() as forward:
        values = OURS[name](r)
    operator = "solvers.finish_step" if name == "weighted_action" else "solvers.row_moments"
    assert forward.large == [*other.large, f"{operator}.default"]
    if name != "weighted_action":
        with Watching() as backward:
            torch.autograd.grad(values[0].sum(), r)
        assert backward.large == [f"{operator}_backward.default"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    solver=st.sampled_from(["euler", "heun", "bs23", "dopri5"]),
    batch=st.integers(1, 4),
    features=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(["contiguous", "channels last", "transposed", "sliced", "expanded"]),
    scaled=st.booleans(),
    sized=st.booleans(),
    seed=st.integers(0, 10_000),
)
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
    x1.sum().backward()


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
        return x1, *values.values(), *grads, *mean_square_and_cosine(one), power_mean(one, 3)

    before = torch.get_num_threads()
    try:
        one_thread, three_threads = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one_thread, three_threads, strict=True))


def finish(solver="heun", stages=2, p=0, h=0.1, **options):
    x0 = torch.ones(2, 2)
    return finish_step(x0, [x0 if isinstance(p, int) else p] * stages, get_tableau(solver), h, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean_square([1.0]), TypeError, "r must be a tensor"),
        (lambda: mean_square(torch.ones(3)), ValueError, r"r must have shape \(B, \*S\)"),
        (
            lambda: mean_square_and_cosine(torch.ones(2, 2, dtype=torch.long)),
            TypeError,
            "floating dtype, got torch.int64",
        ),
        (lambda: power_mean(torch.ones(2, 2), 0.5), ValueError, "p must be finite and at least 1, got 0.5"),
        (lambda: weighted_action([torch.ones(2, 2)], (0.5, 0.5), 1.0), ValueError, "weights ask for 2 stages, got 1"),
        (lambda: weighted_action([torch.ones(2, 2)] * 2, (1.0,), 1.0), ValueError, "one per stage, got 1 for 2"),
        (lambda: weighted_action([torch.ones(2, 2)], (0.0,), 1.0), ValueError, "weights must not all be 0"),
        (
            lambda: weighted_action([torch.ones(2, 2), torch.ones(2, 3)], (0.5, 0.5), 1.0),
            ValueError,
            r"stages must have one shape, dtype and device, got \(2, 3\)",
        ),
        (
            lambda: weighted_action([torch.ones(2, 2), torch.ones(2, 2, dtype=D)], (0.5, 0.5), 1.0),
            ValueError,
            "one shape, dtype and device",
        ),
        (
            lambda: weighted_action([torch.ones(2, 2), torch.ones(2, 2, device="meta")], (0.5, 0.5), 1.0),
            ValueError,
            r"got \(2, 2\) torch.float32 meta beside \(2, 2\) torch.float32 cpu",
        ),
        (
            lambda: weighted_action([torch.ones(2, 2)], (1.0,), torch.ones(3)),
            ValueError,
            "h must be a number or one per",
        ),
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


def test_the_displacement_between_two_states_is_not_kept():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(4, 20000, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = displaced(x0, x1)
    torch.testing.assert_close(values, mean_square_and_cosine(x1 - x0))
    ours = torch.autograd.grad([v.sum() for v in values], [x0, x1])
    plain = torch.autograd.grad([v.sum() for v in mean_square_and_cosine(x1 - x0)], [x0, x1])
    torch.testing.assert_close(ours, plain)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        displaced(x0, x1[:2])


@pytest.mark.parametrize("h", [0.5, 1.0])
@pytest.mark.parametrize("without", ["action", "residue", "nothing"])
def test_a_single_stage_is_found_again_from_the_states(route, h, without):
    x0, p = (torch.randn(3, 20000, dtype=torch.float64, requires_grad=True) for _ in range(2))
    euler = get_tableau("euler")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        x1, values = finish_step(x0, (p,), euler, h, action=True, residue=True)
    assert x1 is not None
    if route != "expression":
        assert {x0.data_ptr(), x1.data_ptr()} <= set(saved)
        assert p.data_ptr() not in saved

    def loss(x1, values):
        of_action = 0 if without == "action" else values["action"].sum()
        return x1.square().sum() + of_action + (without != "residue") * (values["residue"] * values["cosine"]).sum()

    once = torch.autograd.grad(loss(x1, values), [x0, p], retain_graph=True)
    ours = torch.autograd.grad(loss(x1, values), [x0, p], create_graph=True)
    plain_x1 = x0 + h * p
    plain = {
        "action": h * p.square().mean(1),
        "residue": p.square().mean(1),
        "cosine": p.mean(1) / p.square().mean(1).sqrt(),
    }
    theirs = torch.autograd.grad(loss(plain_x1, plain), [x0, p], create_graph=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(once, theirs)
    again = [torch.autograd.grad(sum((g * g).sum() for g in grads), [x0, p]) for grads in (ours, theirs)]
    torch.testing.assert_close(*again)
