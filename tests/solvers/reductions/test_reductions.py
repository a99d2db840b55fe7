import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import finish_step, get_tableau, reductions
from solvers.reductions import (
    mean_square,
    mean_square_and_cosine,
    power_mean,
    root_mean_square,
    weighted_action,
    weighted_root_mean_square,
)
from solvers.reductions.reference import ReductionSpec
from tests.counting import VIEWS
from tests.solvers.reductions.operands import LARGE, SHAPES, TOLERANCE, D, laid_out

pytestmark = pytest.mark.usefixtures("route")
WEIGHTS = (2 / 9, 1 / 3, 0.0, 4 / 9)


def stages(r):
    return [r, 0.5 * r, r * math.nan, r + 1]


def mean(r):
    return r.flatten(1).mean(1)


PAIRS = {  # ours, and the reference
    "mean_square": (lambda r: (mean_square(r),), lambda r: (mean(r.square()),)),
    "root_mean_square": (lambda r: (root_mean_square(r),), lambda r: (mean(r.square()).sqrt(),)),
    "power_mean 1": (lambda r: (power_mean(r, 1),), lambda r: (mean(r.abs()),)),
    "power_mean 3": (lambda r: (power_mean(r, 3.0),), lambda r: (mean(r.abs().pow(3)),)),
    "mean_square_and_cosine": (
        mean_square_and_cosine,
        lambda r: (mean(r.square()), F.cosine_similarity(r.flatten(1), torch.ones_like(r.flatten(1)), dim=1, eps=0)),
    ),
    "weighted_action": (
        lambda r: (weighted_action(stages(r), WEIGHTS, 0.3),),
        lambda r: (0.3 * sum(w * mean(p.square()) for p, w in zip(stages(r), WEIGHTS, strict=True) if w),),
    ),
}
OURS, REFERENCE = ({name: pair[i] for name, pair in PAIRS.items()} for i in (0, 1))
NAMES = list(OURS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(NAMES), magnitude=st.sampled_from([1.0, 1e-3, 1e2]), **SHAPES)
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


@pytest.mark.parametrize("rows", ["constant", "normal"])
@pytest.mark.parametrize("features", [40_000, 25_600, 3589])
def test_sums_of_long_rows_are_within_1e_6_of_float64(rows, features):
    r = torch.full((4, features), 0.7) if rows == "constant" else torch.randn(4, features)
    r.requires_grad_()
    wide = r.detach().double().requires_grad_()
    for name, function in (
        OURS | {"displacement": lambda r: (weighted_root_mean_square([r, r], (0.3, 0.5), 0.1),)}
    ).items():
        for ours, theirs in zip(function(r), function(wide), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6 if name.endswith("cosine") else 0)
            (grad,), (expected,) = (
                torch.autograd.grad(v.sum(), x, retain_graph=True) for v, x in ((ours, r), (theirs, wide))
            )
            torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6 / features)


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


def test_many_gradients_at_once():
    """By each of the ways of torch to map gradients."""
    r = torch.randn(2, 3, 4, dtype=D)
    euler, heun = get_tableau("euler"), get_tableau("heun")
    functions = OURS | {
        "step": lambda r: finish_step(r, [2 * r], euler, 0.3, action=True)[1]["action"],
        "error": lambda r: finish_step(r, [r, 2 * r], heun, 0.3, error=True, residue=True)[1]["error"],
    }
    for function in functions.values():
        one = lambda r, function=function: tree_leaves(function(r))[-1]  # noqa: E731
        expected = torch.autograd.functional.jacobian(one, r)
        torch.testing.assert_close(torch.autograd.functional.jacobian(one, r, vectorize=True), expected)
        leaf = r.clone().requires_grad_()
        values, rows = one(leaf), torch.eye(2, dtype=D)
        pull = lambda row, v=values, x=leaf: torch.autograd.grad(v, x, row, retain_graph=True)[0]  # noqa: E731
        torch.testing.assert_close(torch.vmap(pull)(rows), expected)
        batched = torch.autograd.grad(values, leaf, rows, is_grads_batched=True)[0]
        torch.testing.assert_close(batched, expected)


SPECS = {
    "state": ReductionSpec(b=(0.5, 0.25), e=(0.0, 0.0), state=True),
    "all": ReductionSpec(
        b=(0.5, 0.25), e=(0.5, -0.5), rtol=0.1, atol=0.1, state=True, error=True, action=True, residue=True
    ),
    "values": ReductionSpec(b=(0.5, 0.25), e=(0.5, -0.5), error=True, action=True),
}


CALLS = {f"finish_step {name} {sized}": (spec, sized) for name, spec in SPECS.items() for sized in (False, True)}
CALLS |= {f"row_moments {power} {mean}": (power, mean) for power in (2.0, 3.0) for mean in (False, True)}


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", CALLS)
def test_torch_accepts_the_operators(name):
    """What torch asks of an operator, and its values under vmap and autocast."""
    (x, p), (what, how), sizes = torch.randn(2, 4, 3, 5, requires_grad=True).unbind(), CALLS[name], torch.rand(4)
    if name.startswith("finish_step"):
        operator = torch.ops.solvers.finish_step.default
        call = lambda x, p: (x, [p, p.detach() + 1], sizes if how else None, 0.3, *what.numbers)  # noqa: E731
    else:
        operator = torch.ops.solvers.row_moments.default
        call = lambda x, p: ([p, x], (1.0, -0.5), what, how)  # noqa: E731
    torch.library.opcheck(operator, call(x, p))
    x, p = x.detach(), p.detach()
    mapped = torch.vmap(lambda p: operator(*call(x, p)), 1)(torch.stack([p, p + 1], 1))
    for i in range(2):
        torch.testing.assert_close(tuple(v[i] for v in mapped), operator(*call(x, p + i)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(operator(*call(x, p)), (plain := operator(*call(x, p))), rtol=0, atol=0)
    assert all(v.dtype == torch.float32 for v in plain)


LAYOUTS = {
    "channels last": lambda r: r.contiguous(memory_format=torch.channels_last),
    "transposed": lambda r: r.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda r: r.movedim(0, 2).contiguous().movedim(2, 0),
    "contiguous": lambda r: r,
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_operators_say_how_their_results_are_laid_out_and_can_be_mapped(first, second, route):
    if route == "expression":
        pytest.skip("no operator")
    (x, p), g, solvers = torch.randn(2, 3, 4, 5, 6).unbind(), torch.rand(3), torch.ops.solvers
    x, p = LAYOUTS[first](x), LAYOUTS[second](p)
    step, weights, needs = ([p, p + 1], None, 0.3, *SPECS["all"].numbers), ((1.0, -0.5), 3.0, True), [True, False]
    calls = {
        solvers.finish_step: lambda x: (x, *step),
        solvers.finish_step_backward: lambda x: (*step, [x, g, g, None, g], needs),
        solvers.row_moments: lambda x: ([x, p], *weights),
        solvers.row_moments_backward: lambda x: ([x, p], *weights, [None, g], needs),
    }
    for operator, arguments in calls.items():
        call = lambda x, run=operator.default, arguments=arguments: run(*arguments(x))  # noqa: E731
        torch.library.opcheck(operator.default, arguments(x))
        mapped = torch.vmap(call)(torch.stack([x, x + 1]))
        for i in range(2):
            torch.testing.assert_close([v[i] for v in mapped], list(call(x + i)))


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


def test_the_displacement_between_two_states_is_not_kept():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(4, 20000, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = reductions.displaced(x0, x1)
    torch.testing.assert_close(values, mean_square_and_cosine(x1 - x0))
    ours = torch.autograd.grad([v.sum() for v in values], [x0, x1])
    plain = torch.autograd.grad([v.sum() for v in mean_square_and_cosine(x1 - x0)], [x0, x1])
    torch.testing.assert_close(ours, plain)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        reductions.displaced(x0, x1[:2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(9, 16, 32, 32), (5, 3, 50, 50), (3, 7, 11, 211), (1, 16, 128, 128)])
def test_a_displacement_over_several_blocks_is_the_formula_whatever_looks_on(shape, layout):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(shape, generator=generator).to(memory_format=layout) for _ in range(2))
    r = x1.double() - x0.double()
    square = r.square().mean((1, 2, 3))
    expected = square, r.mean((1, 2, 3)) / square.sqrt()
    with torch.no_grad():
        values = reductions.displaced(x0, x1)
        with Watching():  # by the operator
            watched = reductions.displaced(x0, x1)
    torch.testing.assert_close([v.double() for v in values], [*expected], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(one, other) for one, other in zip(values, watched, strict=True))
