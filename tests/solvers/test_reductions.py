import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.reductions import (
    BLOCK,
    mean_square,
    mean_square_and_cosine,
    power_mean,
    root_mean_square,
    weighted_action,
)

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


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
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


@settings(max_examples=100, deadline=None)
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
    made = torch.randn(batch, *features, generator=torch.Generator().manual_seed(seed), dtype=D)
    r = laid_out((magnitude * made).to(dtype), layout)
    if name == "weighted_action" and dtype in (torch.bfloat16, torch.float16):
        return  # its stages are made in that precision
    found, expected = OURS[name](r), REFERENCE[name](r.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (batch,)
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 3 * BLOCK + 1), (7, BLOCK - 1), (2000, 3), (3, 2, 5, 7)])
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
    found = OURS[name](r)
    (grad,) = torch.autograd.grad(sum(v.sum() for v in found), r)
    assert grad.isfinite().all()
    if name != "weighted_action":
        assert all(torch.equal(v, torch.zeros(2)) for v in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
def test_extreme_numbers_pass_as_they_do_in_torch(name, value):
    r = torch.randn(3, 5)
    r[1, 2] = value
    for ours, theirs in zip(OURS[name](r), REFERENCE[name](r), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    r, direction = torch.randn(4, 3, 5, dtype=D), torch.randn(4, 3, 5, dtype=D)
    compiled = torch.compile(OURS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(r), OURS[name](r))
    mapped = torch.vmap(OURS[name], in_dims=1)(torch.stack([r, direction], 1))
    for i, one in enumerate((r, direction)):
        torch.testing.assert_close(tuple(v[i] for v in mapped), OURS[name](one))
    leaf = r.clone().requires_grad_()
    found, tangents = torch.func.jvp(OURS[name], (r,), (direction,))
    torch.testing.assert_close(found, OURS[name](r))
    for i, tangent in enumerate(tangents):
        (grad,) = torch.autograd.grad(OURS[name](leaf)[i].sum(), leaf)
        torch.testing.assert_close(tangent.sum(), (grad * direction).sum())
    torch.testing.assert_close(
        torch.func.grad(lambda r: sum(v.sum() for v in OURS[name](r)))(r),
        torch.autograd.grad(sum(v.sum() for v in OURS[name](leaf)), leaf)[0],
    )


def operators():
    r = torch.randn(4, 3, 5, requires_grad=True)
    for name in ("mean_square", "root_mean_square", "mean_square_and_cosine"):
        yield pytest.param(name, (r,), id=name)
    yield pytest.param("power_mean", (r, 3.0), id="power_mean")
    yield pytest.param("weighted_mean_square", ([r, 2 * r.detach()], [0.5, 0.25]), id="weighted_mean_square")


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("name", "args"), list(operators()))
def test_torch_accepts_the_operator(name, args):
    operator = getattr(torch.ops.odenets, name)
    torch.library.opcheck(operator.default, args)
    operand, *numbers = args
    if isinstance(operand, list):
        operand = [r.detach() for r in operand]
        found = torch.vmap(lambda r: operator([r, operand[1]], *numbers))(torch.stack([operand[0], operand[1]]))
        one = operator(operand, *numbers)
    else:
        operand = operand.detach()
        found = torch.vmap(lambda r: operator(r, *numbers), 1)(torch.stack([operand, operand + 1], 1))
        one = operator(operand, *numbers)
    torch.testing.assert_close(tuple(v[0] for v in found) if isinstance(found, tuple) else found[0], one)


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


def test_the_backward_pass_is_one_operation_over_the_operand():
    from tests.counting import Operations

    r = torch.randn(4, 100, requires_grad=True)
    out = mean_square(r).sum()
    with Operations() as operations:
        out.backward()
    full = [func for func in operations.counts if func == torch.ops.aten.mul.Tensor]
    assert full
    assert operations.total <= 4  # of these all but one on numbers per sample


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
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
