"""When a solve is a graph, and what takes its place where it is none."""

import math
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from solvers import integrate, odeint
from solvers.graph import compilation

ROOT = Path(__file__).parents[3]
X = torch.ones(3, 2, dtype=torch.float64)


def decay(t, x):
    return -x


@pytest.fixture
def anew(monkeypatch):
    """Nothing has been compiled, nor warned of."""
    monkeypatch.setattr(compilation, "_warned", False)
    compilation.forget()
    yield
    compilation.forget()


@pytest.fixture
def graphs(monkeypatch):
    """The states whose solves were to be graphs; each is solved by the loop on the host."""
    found = []
    monkeypatch.setattr(compilation, "solve_in_graph", lambda field, x0, *args, **options: found.append(x0))
    return found


def warned_once(solve):
    with pytest.warns(UserWarning, match="graph=True solves as graph=False does, for ") as record:
        first = solve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = solve()
    reference = integrate(decay, X, 0.0, 1.0)
    for solution in (first, again):
        assert torch.equal(solution.x1, reference.x1)
        assert solution.stats == reference.stats
    return str(record[0].message)


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_of_cpp_one_warning_and_the_loop_on_the_host(monkeypatch):
    def lacking(*_):
        raise InvalidCxxCompiler

    monkeypatch.setattr(compilation, "BACKEND", lacking)
    message = warned_once(lambda: integrate(decay, X, 0.0, 1.0, graph=True))
    assert message.endswith("there is no compiler of C++")


@pytest.mark.slow
@pytest.mark.usefixtures("anew")
@pytest.mark.filterwarnings("ignore:graph=True solves")
def test_the_lack_of_a_compiler_is_remembered(monkeypatch):
    asked = []

    def lacking(*_):
        asked.append(True)
        raise InvalidCxxCompiler

    monkeypatch.setattr(compilation, "BACKEND", lacking)
    for _ in range(3):
        integrate(decay, X, 0.0, 1.0, graph=True)
    assert len(asked) == 1


@pytest.mark.usefixtures("anew")
def test_where_torch_does_not_compile_one_warning_and_the_loop_on_the_host(monkeypatch):
    monkeypatch.setattr(compilation, "is_dynamo_supported", lambda: False)
    message = warned_once(lambda: integrate(decay, X, 0.0, 1.0, graph=True))
    assert message.endswith("this Python has no torch.compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert integrate(decay, X, 0.0, 1.0, graph="auto").status == "finished"
        times = torch.tensor([0.0, 1.0], dtype=X.dtype)
        assert odeint(decay, X, times, options={"graph": True}).shape == (2, 3, 2)


NO_COMPILER = """
import warnings, torch
from solvers import integrate
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    solution = integrate(lambda t, x: -x, torch.ones(3, 2), 0.0, 1.0, graph=True)
assert solution.status == "finished"
assert [str(w.message) for w in record if "graph=True" in str(w.message)] == [
    "graph=True solves as graph=False does, for there is no compiler of C++"
]
"""


@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path):
    environment = dict(os.environ) | {
        "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", NO_COMPILER]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_auto_takes_graphs_for_states_up_to_a_size(graphs):
    small, large = torch.ones(2, 1 << 14), torch.ones(2, (1 << 14) + 1)
    for x in (small, large):
        integrate(decay, x, 0.0, 1.0, graph="auto", keep="last")
    assert len(graphs) == 1
    assert graphs[0] is small
    integrate(decay, large, 0.0, 1.0, graph=True)
    assert graphs[1] is large


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3},
        {"event": lambda t, x: x - 0.5},
        {"keep": "steps"},
        {"gradient": "checkpoint"},
        {"solver": "heun", "at": [0.5, 1.0]},
        {"controller": lambda state, error, order: state._replace(accepted=True)},
        {"x0": X + 0j},
    ],
    ids=lambda options: next(iter(options)),
)
def test_auto_is_the_loop_on_the_host_for_what_no_graph_takes(graphs, options):
    options = {"x0": X} | options
    x0 = options.pop("x0")
    ours, theirs = (integrate(decay, x0, 0.0, 1.0, graph=graph, **options) for graph in ("auto", False))
    assert not graphs
    assert torch.equal(ours.x1, theirs.x1)
    assert ours.stats == theirs.stats
    assert len(ours.states) == len(theirs.states)


def test_auto_is_the_loop_on_the_host_under_autocast_and_transforms(graphs):
    with torch.autocast("cpu"):
        integrate(decay, X, 0.0, 1.0, graph="auto")
    torch.func.jvp(lambda x: integrate(decay, x, 0.0, 1.0, graph="auto").x1, (X,), (X,))
    assert not graphs


class Asks(nn.Module):
    def forward(self, t, x):
        return -x if x.sum() > 0 else x


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, t, x):
        return self.norm(x)


FREE = torch.ones(2, dtype=X.dtype, requires_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("field", [Asks(), Normed(), lambda t, x: -x * FREE], ids=["asks", "norm", "reads"])
def test_auto_is_the_loop_on_the_host_for_fields_that_cannot_be_a_graph(field):
    for _ in range(2):
        assert integrate(field, X, 0.0, 1.0, graph="auto", keep="last").status == "finished"


class Rate(nn.Module):
    def __init__(self, rate, layer=None):
        super().__init__()
        self.rate, self.layer = rate, layer or nn.Identity()

    def forward(self, t, x):
        return self.rate * self.layer(x)


@pytest.mark.slow
def test_fields_that_differ_in_a_number():
    for rate in (-0.5, -0.25, math.pi):
        with torch.no_grad():
            ours, theirs = (integrate(Rate(rate), X, 0.0, 1.0, graph=graph) for graph in (True, False))
        torch.testing.assert_close(ours.x1, theirs.x1)


@pytest.mark.slow
def test_many_fields_of_one_class():
    for kind in (nn.Tanh, nn.ReLU, nn.Sigmoid):
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):  # which is 8
            ours, theirs = (integrate(Rate(-1, kind()), X, 0.0, 1.0, graph=graph) for graph in (True, False))
        torch.testing.assert_close(ours.x1, theirs.x1)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 2, dtype=X.dtype)

    def forward(self, t, x, labels, mask):
        return torch.where(mask[:, None], self.table(labels) - x, 0.0)


@pytest.mark.slow
def test_arguments_that_are_integers_or_booleans():
    field, found = Labelled(), []
    args = torch.tensor([0, 1, 0]), torch.tensor([True, False, True])
    for graph in (True, False):
        x1 = integrate(field, X, 0.0, 1.0, args=args, graph=graph).x1
        found.append((x1, *torch.autograd.grad(x1.square().sum(), field.table.weight)))
    torch.testing.assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("field", [lambda t, x: x[:, :1], lambda t, x: x.float(), lambda t, x: (x,)])
def test_what_a_field_returns_is_named_as_on_the_host(field):
    messages = []
    for graph in (True, False):
        with pytest.raises((TypeError, ValueError)) as info:
            integrate(field, X, 0.0, 1.0, graph=graph)
        messages.append(str(info.value))
    assert messages[0] == messages[1]


def test_numpy_arrays_as_arguments_of_a_solve_are_numbers(graphs):
    integrate(decay, X, np.float64(0.0), np.array(1.0), graph=True)
    assert len(graphs) == 1


def test_what_a_field_reads_may_change():
    """A number of a module whose name begins as torch's; a tensor that comes to require a gradient."""
    module = types.ModuleType("torchlike")
    sys.modules["torchlike"] = module
    exec("RATE = 1.0\ndef field(t, x): return -RATE * x", vars(module))
    for rate in (1.0, 2.0):
        module.RATE = rate
        with torch.no_grad():
            x1 = integrate(module.field, X, 0.0, 1.0, graph=True).x1
        torch.testing.assert_close(x1, integrate(module.field, X, 0.0, 1.0).x1)
    weight = torch.ones((), dtype=torch.float64)
    field = lambda t, x: weight * x  # noqa: E731
    integrate(field, X, 0.0, 1.0, graph=True)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="field reads a tensor that requires a gradient"):
        integrate(field, X, 0.0, 1.0, graph=True)


@pytest.mark.usefixtures("anew")
def test_where_the_compiler_fails_one_warning_and_the_loop_on_the_host(monkeypatch):
    def failing(*_):
        raise InductorError(RuntimeError("PassManager::run failed"), None)

    monkeypatch.setattr(compilation, "BACKEND", failing)
    assert "the compiler failed" in warned_once(lambda: integrate(decay, X, 0.0, 1.0, graph=True))
