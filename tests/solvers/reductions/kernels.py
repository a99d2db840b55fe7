"""The Triton kernels, interpreted or on a GPU: run by test_kernels_gpu.py in a process of their own."""

import math
import os

import pytest
import torch

from solvers import get_tableau
from solvers.reductions import reference, triton
from solvers.reductions.reference import Reductions, ReductionSpec

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BS23 = get_tableau("bs23")
B, E = BS23.b, BS23.error_weights


def spec(**wanted):
    return ReductionSpec(b=B, e=E, **wanted)


ALL = spec(atol=0.3, state=True, error=True, action=True, residue=True)
SPECS = {
    "state": spec(state=True),
    "error": spec(error=True),
    "scaled": spec(rtol=0.1, atol=0.01, error=True),
    "absolute": spec(atol=0.3, error=True),
    "action": spec(action=True),
    "residue": spec(residue=True),
    "all": ALL,
    "all, scaled": spec(rtol=0.1, atol=0.01, state=True, error=True, action=True, residue=True),
}
SHAPES = [(1, 1), (3, 1), (2, 5), (7, 33), (300, 3), (2, 2 * triton.PART + 3), (1, 5, 1029), (2, 3, 5, 7)]
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to holds NaN
    yield
    torch.use_deterministic_algorithms(False)


def operands(shape, dtype=torch.float64, layout=torch.contiguous_format):
    tensors = torch.randn(5, *shape, dtype=torch.float64, device=DEVICE).to(dtype)
    return [x.contiguous(memory_format=layout) if x.ndim == 4 else x.clone() for x in tensors]


def close(values, expected, near):
    for ours, theirs in zip(values, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=near, atol=near, equal_nan=True)


def gradients(values, outer, inputs, needs):
    """Those of the inputs that need one, by torch."""
    pairs = [(v, g) for v, g in zip(values, outer, strict=True) if v is not None and g is not None]
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad([v for v, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    return [next(grads) if need else None for need in needs]


def check(ops, h, spec, needs=(True,) * 4):
    """Forward and, where the error is not scaled, backward beside the expression in float64."""
    x0, stages = (ops[0] if spec.state or spec.scaled else None), ops[1:]
    wide = [None if x is None else x.double().requires_grad_() for x in (x0, *stages)]
    size, near = h.double() if isinstance(h, torch.Tensor) else h, NEAR[stages[0].dtype]
    values, expected = triton.finish_step(x0, stages, h, spec), reference.finish_step(wide[0], wide[1:], size, spec)
    close(values.values, expected.values, near)
    close(triton.finish_step(x0, stages, h, spec).values, values.values, 0)
    grads = Reductions.of(None if v is None else torch.randn_like(v) for v in values.values)
    outer = [None if g is None else g.double() for g in grads.values]
    if spec.scaled:
        return
    ours = triton.finish_step_backward(stages, h, spec, grads, needs)
    assert [grad is not None for grad in ours] == list(needs)
    close(ours, gradients(expected.values, outer, wide[1:], needs), 10 * near)


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(spec, shape):
    check(operands(shape), 0.3, spec)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0)], ids=str)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_moments(power, weights, mean, shape):
    rows = [x.requires_grad_() for x in operands(shape)[: len(weights)]]
    expected = reference.row_moments(rows, weights, power, mean)
    values = triton.row_moments(rows, weights, power, mean)
    close(values, expected, 1e-12)
    outer = [None if v is None else torch.randn_like(v) for v in values]
    needs = [True] * len(weights)
    ours = triton.row_moments_backward(rows, weights, power, *outer, needs)
    close(ours, gradients(expected, outer, rows, needs), 1e-11)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_dtypes_layouts_and_step_sizes(dtype, sized):
    h = torch.rand(3, dtype=torch.float64, device=DEVICE) + 0.1 if sized else 0.3
    check(operands((3, 2, 5, 7), dtype, torch.channels_last), h, ALL)
    check([x.transpose(1, 2) for x in operands((3, 5, 4), dtype)], h, ALL)


@pytest.mark.parametrize("needed", range(4))
def test_one_gradient(needed):
    check(operands((2, 9)), 0.3, ALL, [i == needed for i in range(4)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_extreme_numbers(value, spec):
    ops = operands((3, 5))
    for x in ops:
        x[1] = value
    ops[0][2], ops[1][2], ops[2][2], ops[3][2], ops[4][2] = 1.0, 0.0, 0.0, 0.0, 0.5  # |x0| = |x1|
    x0 = ops[0] if spec.state or spec.scaled else None
    values = triton.finish_step(x0, ops[1:], 0.3, spec)
    close(values.values, reference.finish_step(x0, ops[1:], 0.3, spec).values, 1e-12)
    if value == 0.0:
        check(ops, 0.3, spec)


def test_a_stage_that_is_not_read_spoils_nothing():
    ops = operands((2, 5))
    ops[4].fill_(math.nan)
    values = triton.finish_step(ops[0], ops[1:], 0.3, spec(state=True, action=True, residue=True))
    assert all(v.isfinite().all() for v in values.values if v is not None)


@pytest.mark.parametrize("spec", [SPECS["state"], ALL], ids=["state", "all"])
@pytest.mark.parametrize(("shape", "kernels"), [((128, 64), 1), ((2, 2 * triton.PART), 2)])
def test_launches(monkeypatch, spec, shape, kernels):
    """One kernel forward and one backward; a second one only adds up the sums of rows that were cut."""
    launched = []
    for name in ("_finish", "_add_parts", "_finish_backward"):
        kernel = getattr(triton, name)

        class Counting:
            def __getitem__(self, grid, kernel=kernel, name=name):
                return lambda *args, **kwargs: launched.append(name) or kernel[grid](*args, **kwargs)

        monkeypatch.setattr(triton, name, Counting())
    ops = operands(shape, torch.float32)
    values = triton.finish_step(ops[0], ops[1:], 0.3, spec)
    assert launched == (["_finish", "_add_parts"] if kernels == 2 and spec.error else ["_finish"])
    launched.clear()
    triton.finish_step_backward(ops[1:], 0.3, spec, values, [True] * 4)
    assert launched == ["_finish_backward"]
