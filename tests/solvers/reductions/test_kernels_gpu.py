"""The Triton kernels: on a GPU, and where there is none interpreted, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent

COMPILE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from solvers.reductions import triton as gpu
from triton import language as tl

dtype, stages, sized, parts = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", int(sys.argv[4])
power = float(sys.argv[5])
wide = "fp64" if dtype == "fp64" else "fp32"
one, value = "*" + dtype, "*" + wide
b, e = (0.5,) * stages, (0.25,) * stages
accumulator = tl.float64 if wide == "fp64" else tl.float32
rows = {"sized": sized, "ROWS": 4 if parts == 1 else 1, "COLS": 256, "wide": accumulator}
numbers = {"b": b, "e": e, "rtol": 0.1, "atol": 0.01, "power": power}
flags = {"has_error": True, "has_action": True, "has_residue": True}


def build(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    kernel = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert kernel.asm["cubin"]
    assert not re.search(r"\\b(atom|red)\\.", kernel.asm["ptx"])


types = {"x0": one, "stages": (one,) * stages, "sizes": value, "h": "fp64", "batch": "i32", "n": "i32"}
values = {name: value for name in ("error", "action", "square", "mean")}
build(
    gpu._finish,
    types | values | {"x1": one, "sums": value},
    numbers | flags | rows | {"has_state": True, "parts": parts, "span": 512},
)
build(
    gpu._finish_backward,
    types | {"grad": one, "g_error": value, "g_action": value, "g_square": value, "g_mean": value}
    | {"grads": (one,) * stages, "tiles": "i32"},
    {k: v for k, v in numbers.items() if k != "rtol"} | rows
    | {"has_grad": True, "has_error": True, "has_action": True, "has_square": True, "has_mean": True}
    | {"needs": (True,) * stages},
)
if parts > 1:
    types = {"sums": value, "sizes": value, "h": "fp64", "batch": "i32", "n": "i32"} | values
    del rows["COLS"]
    build(gpu._add_parts, types, flags | rows | {"parts": parts, "ROWS": 128})
"""


def run(*command, **environment):
    process = subprocess.run(
        [sys.executable, *command], cwd=HERE.parents[2], text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[2]), **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


@pytest.mark.skipif(triton.__version__ < "3.5", reason="the interpreter of Triton 3.4 fails on NumPy 2.4")
@pytest.mark.parametrize("which", ["one_gradient or launches", pytest.param("test", marks=pytest.mark.slow)])
def test_interpreted(which):
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which)
    assert " passed" in run("-m", "pytest", *options, str(HERE / "kernels.py"), TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_gpu():
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-n", "auto")
    assert " passed" in run("-m", "pytest", *options, str(HERE / "kernels.py"), TRITON_INTERPRET="0")


@pytest.mark.parametrize(
    ("dtype", "stages", "sized", "parts", "power"),
    [
        ("fp32", 4, False, 4, 2),
        pytest.param("fp64", 1, False, 1, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 1, True, 1, 2.5, marks=pytest.mark.slow),
        pytest.param("fp64", 4, True, 1, 3, marks=pytest.mark.slow),
    ],
)
def test_compiled_for_a_gpu_without_atomics(dtype, stages, sized, parts, power):
    run("-c", COMPILE, dtype, str(stages), str(sized), str(parts), str(power), TRITON_INTERPRET="0")
