"""The Triton kernels under Triton's interpreter: run by test_kernels_gpu.py in a process of their own."""

import math

import pytest
import torch

from solvers import get_tableau
from solvers.kernels import aten, gpu
from solvers.kernels.contract import Asked, Finish

BS23 = get_tableau("bs23")
B, E = BS23.b, BS23.error_weights
ALL = Asked(B, E, 0.1, 0.01, state=True, error=True, action=True, residue=True)
ASKED = {
    "state": Asked(B, state=True),
    "error": Asked(B, E, error=True),
    "scaled": Asked(B, E, 0.1, 0.01, error=True),
    "absolute": Asked(B, E, 0.0, 0.3, error=True),
    "residue": Asked(B, residue=True),
    "all": ALL,
    **{f"action {p}": Asked(B, power=p, action=True) for p in (1.0, 2.0, 2.5, 3.0)},
}
SHAPES = [(1, 1), (3, 1), (2, 5), (7, 33), (300, 3), (2, 2 * gpu.PART + 3), (1, 5, 1029), (2, 3, 5, 7)]
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to holds NaN
    yield
    torch.use_deterministic_algorithms(False)


def operands(shape, dtype=torch.float64, layout=torch.contiguous_format):
    made = torch.randn(5, *shape, dtype=torch.float64).to(dtype)
    return [x.contiguous(memory_format=layout) if x.ndim == 4 else x.clone() for x in made]


def close(found, expected, near):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=near, atol=near, equal_nan=True)


def check(ops, h, asked, needs=(True,) * 5):
    """Forward and backward beside the expression in float64."""
    x0, stages = (ops[0] if asked.state or asked.scaled else None), ops[1:]
    wide = [None if x is None else x.double() for x in (x0, *stages)]
    size = h.double() if isinstance(h, torch.Tensor) else h
    near = NEAR[stages[0].dtype]
    found, expected = gpu.forward(x0, stages, h, asked), aten.forward(wide[0], wide[1:], size, asked)
    close(found, expected, near)
    close(gpu.forward(x0, stages, h, asked), found, 0)
    grads = Finish(*(None if v is None else torch.randn_like(v) for v in found))
    outer = Finish(*(None if g is None else g.double() for g in grads))
    needs = (needs[0] and x0 is not None, *needs[1:])
    back = gpu.backward(x0, stages, h, asked, grads, found, needs)
    assert [grad is not None for grad in back] == list(needs)
    close(back, aten.backward(wide[0], wide[1:], size, asked, outer, needs), 10 * near)


@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(asked, shape):
    check(operands(shape), 0.3, asked)


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_dtypes_layouts_and_step_sizes(dtype, sized):
    h = torch.rand(3, dtype=torch.float64) + 0.1 if sized else 0.3
    check(operands((3, 2, 5, 7), dtype, torch.channels_last), h, ALL)
    check([x.transpose(1, 2) for x in operands((3, 5, 4), dtype)], h, ALL)


@pytest.mark.parametrize("needed", range(5))
def test_one_gradient(needed):
    check(operands((2, 9)), 0.3, ALL, [i == needed for i in range(5)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
def test_extreme_numbers(value, asked):
    ops = operands((3, 5))
    for x in ops:
        x[1] = value
    ops[0][2], ops[1][2], ops[2][2], ops[3][2], ops[4][2] = 1.0, 0.0, 0.0, 0.0, 0.5  # |x0| = |x1|
    x0 = ops[0] if asked.state or asked.scaled else None
    found = gpu.forward(x0, ops[1:], 0.3, asked)
    close(found, aten.forward(x0, ops[1:], 0.3, asked), 1e-12)
    if value == 0.0:
        check(ops, 0.3, asked)


def test_a_stage_that_is_not_read_spoils_nothing():
    ops = operands((2, 5))
    ops[4].fill_(math.nan)
    found = gpu.forward(ops[0], ops[1:], 0.3, Asked(B, state=True, action=True, residue=True))
    assert all(v.isfinite().all() for v in found if v is not None)


@pytest.mark.parametrize("asked", [ASKED["state"], ALL], ids=["state", "all"])
@pytest.mark.parametrize(("shape", "kernels"), [((128, 64), 1), ((2, 2 * gpu.PART), 2)])
def test_launches(monkeypatch, asked, shape, kernels):
    """One kernel forward and one backward; a second one only adds up the sums of rows that were cut."""
    launched = []
    for name in ("_finish", "_add_parts", "_finish_backward"):
        kernel = getattr(gpu, name)

        class Counting:
            def __getitem__(self, grid, kernel=kernel, name=name):
                return lambda *args, **kwargs: launched.append(name) or kernel[grid](*args, **kwargs)

        monkeypatch.setattr(gpu, name, Counting())
    ops = operands(shape, torch.float32)
    found = gpu.forward(ops[0], ops[1:], 0.3, asked)
    assert launched == (["_finish", "_add_parts"] if kernels == 2 and asked.error else ["_finish"])
    launched.clear()
    gpu.backward(ops[0], ops[1:], 0.3, asked, found, found, [True] * 5)
    assert launched == ["_finish_backward"]
