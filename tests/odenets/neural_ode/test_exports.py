"""Programs of torch.export, AOTInductor and ONNX beside the modules that they are of, at other batch sizes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from odenets import ConvField, MLPField, NeuralODE, models
from solvers import Tolerance
from solvers.graph.compilation import TRACES

pytestmark = pytest.mark.skipif(not TRACES, reason="this torch has no adaptive solves as graphs")
BATCH = torch.export.Dim("batch", min=2, max=64)
SIZES = (2, 5, 33)


def exported(module, x):
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))


def both(field, **options):
    """A neural ODE whose loop is in the graph, and the same with the loop on the host."""
    return tuple(NeuralODE(field, graph=graph, **options).eval() for graph in (True, False))


@torch.no_grad()
def check(run, module, shape, sizes=SIZES):
    for size in sizes:
        x = torch.randn(size, *shape)
        assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own, up to 2.11
def test_an_adaptive_neural_ode_of_any_batch_saved_and_loaded(tmp_path):
    ode, host = both(MLPField(2, time=True))
    program = exported(ode, torch.randn(4, 2))
    check(program.module(), host, (2,))
    torch.export.save(program, tmp_path / "ode.pt2")
    check(torch.export.load(tmp_path / "ode.pt2").module(), host, (2,))


@pytest.mark.slow
def test_a_classifier_of_images():
    stem, head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    ode, host = both(ConvField(4))
    host(torch.randn(2, 4, 4, 4))
    program = exported(nn.Sequential(stem, ode, head), torch.randn(4, 1, 8, 8))
    check(program.module(), nn.Sequential(stem, host, head), (1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"solver": "bs23"}, {"solver": "tsit5", "tolerance": Tolerance(rtol=1e-5, max_steps=500)}, {"solver": "heun"}],
    ids=["bs23", "tsit5", "heun"],
)
def test_a_classifier_of_rows(options):
    stem, head = nn.Linear(5, 2), nn.Linear(2, 3)
    ode, host = both(MLPField(2), **options)
    program = exported(nn.Sequential(stem, ode, head), torch.randn(4, 5))
    check(program.module(), nn.Sequential(stem, host, head), (5,))


@pytest.mark.slow
def test_step_sizes_of_each_sample_in_any_batch():
    ode, host = both(MLPField(2), control="sample")
    check(exported(ode, torch.randn(4, 2)).module(), host, (2,))


ALONE = """
import sys, torch
run = torch._inductor.aoti_load_package("ode.pt2")
for x, y in torch.load("expected.pt"):
    torch.testing.assert_close(run(x), y, rtol=1e-5, atol=1e-5)
assert not {"odenets", "solvers"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_package_of_aotinductor_solves_where_nothing_of_ours_is(tmp_path):
    ode, host = both(MLPField(2))
    program = exported(ode, torch.randn(4, 2))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "ode.pt2"))
    with torch.no_grad():
        torch.save([(x, host(x)) for x in (torch.randn(size, 2) for size in SIZES)], tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ALONE]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "neural ode", "its own solver"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch and onnxscript
def test_fixed_steps_as_onnx(name, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    module, shape = {
        "flow": (models.small_network(solver="bs23", depth=3), (1, 8, 8)),
        "neural ode": (NeuralODE(MLPField(2, time=True), steps=4), (2,)),
        "its own solver": (NeuralODE(MLPField(2), steps=2, solver="rk4"), (2,)),
    }[name]
    x = torch.randn(4, *shape)
    module.eval()(x)
    path = tmp_path / "module.onnx"
    sizes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x):
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])

    check(run, module, shape, (1, 3, 17))
