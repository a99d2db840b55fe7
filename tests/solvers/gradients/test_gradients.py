"""How gradients flow through a solve: directly, by recomputing, by solving backwards."""

import pytest
import torch
from torch import nn

from odenets.analysis.memory import measure_memory
from solvers import Tolerance, integrate
from tests.counting import Counted, NoDouble

D = torch.float64
MODES = [("direct", "batch"), ("checkpoint", "batch"), ("backsolve", "batch")]
MODES += [("direct", "sample"), ("checkpoint", "sample")]


def field(t, x, w):
    return torch.tanh(x @ w) + t


def fall(t, x, k):
    """Height and speed under gravity and air."""
    return torch.stack([x[..., 1], -9.81 - k * x[..., 1] ** 2], -1)


@pytest.fixture
def inputs():
    x = torch.randn(2, 2, dtype=D, requires_grad=True)
    return x, torch.randn(2, 2, dtype=D, requires_grad=True)


def options(gradient, control, **others):
    return {"gradient": gradient, "control": control, "parameters": (), **others}


CASES = [(gradient, {"control": control}) for gradient, control in MODES]
CASES += [("direct", {"steps": 3}), ("checkpoint", {"steps": 5}), ("backsolve", {"steps": 20})]


@pytest.mark.parametrize(("gradient", "how"), CASES)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients(check, gradient, how, inputs):
    near, loose = (1e-8, {"atol": 1e-5, "rtol": 1e-3}) if gradient == "backsolve" else (1e-2, {})
    more = {"solver": "rk4"} if "steps" in how else {"tolerance": Tolerance(near, near), "solver": "dopri5"}
    # A sample per solve: finite differences must not meet another choice of steps.
    x, w = (inputs[0][:1].detach().requires_grad_(), inputs[1])

    def solve(x, w):
        return integrate(field, x, 0.0, 0.5, gradient=gradient, parameters=(), args=(w,), **how, **more).x1

    assert check(solve, (x, w), **loose)


@pytest.mark.parametrize(("gradient", "control"), MODES)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_event_gradients(check, gradient, control):
    x = torch.tensor([[2.0, 0.5]], dtype=D, requires_grad=True)
    k = torch.tensor(0.1, dtype=D, requires_grad=True)

    def solve(x, k):
        more = {"args": (k,), "tolerance": Tolerance(1e-8, 1e-8), "solver": "dopri5", "event": lambda t, x: x[..., 0]}
        solution = integrate(fall, x, 0.0, 5.0, **options(gradient, control, **more))
        return solution.event_time, solution.x1

    assert check(solve, (x, k), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_recomputing_gives_the_same_gradients(control, inputs):
    x, w = inputs
    result = []
    for gradient in ("direct", "checkpoint"):
        solution = integrate(
            field, x, 0.0, 2.0, **options(gradient, control, args=(w,), tolerance=Tolerance(1e-5, 1e-7))
        )
        result.append((solution.x1, *torch.autograd.grad(solution.x1.square().sum(), (x, w))))
    torch.testing.assert_close(result[0], result[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [None, 200])
def test_solving_backwards_gives_the_gradients_of_the_ode(steps, inputs):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, _ = inputs
    result = []
    for gradient in ("direct", "backsolve"):
        module = _Autonomous(net)
        tolerance = None if steps else Tolerance(1e-9, 1e-9)
        x1 = integrate(module, x, 0.0, 1.0, solver="dopri5", steps=steps, tolerance=tolerance, gradient=gradient).x1
        result.append(torch.autograd.grad(x1.square().sum(), (x, *net.parameters())))
    torch.testing.assert_close(result[0], result[1], rtol=1e-6, atol=1e-7)


class _Autonomous(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x)


@pytest.mark.parametrize("tolerance", [Tolerance(1e-3, torch.tensor([1e-4, 1e-3])), Tolerance(1e-3, 1e-4), None])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
def test_training_in_float32_makes_no_tensor_in_float64(gradient, tolerance):
    net, steps = _Autonomous(nn.Linear(2, 2)), 3 if tolerance is None else None
    with NoDouble():
        x1 = integrate(net, torch.ones(3, 2), 0.0, 1.0, tolerance=tolerance, steps=steps, gradient=gradient).x1
        x1.sum().backward()
    assert net.net.weight.grad.abs().sum() > 0


def test_evaluations_of_recomputing(inputs):
    counted = Counted(lambda t, x: torch.sin(x))
    x1 = integrate(counted, inputs[0], 0.0, 1.0, steps=9, solver="rk4", gradient="checkpoint").x1
    assert counted.calls == 36
    x1.sum().backward()
    assert counted.calls <= 3 * 36


def _peak(gradient, steps, solver="rk4"):
    net = _Autonomous(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    x = torch.randn(256, 64, requires_grad=True)

    def work():
        x1 = integrate(net, x, 0.0, 1.0, steps=steps, solver=solver, gradient=gradient, keep="last").x1
        x1.sum().backward()
        x.grad = None
        net.zero_grad()

    return measure_memory(work, torch.device("cpu")).peak


def test_peak_memory():
    growth = {g: _peak(g, 100) / _peak(g, 25) for g in ("direct", "checkpoint", "backsolve")}
    assert growth["direct"] > 3.5
    assert growth["checkpoint"] < 2.2  # the square root of 4, and the stages of one step
    assert growth["backsolve"] < 1.1
    stages = [_peak("checkpoint", n, "dopri5") - _peak("checkpoint", n, "euler") for n in (25, 100)]
    assert stages[1] < 1.2 * stages[0]  # those of one step, however many there are
    assert _peak("checkpoint", 100) < 0.15 * _peak("direct", 100)


class Normalized(nn.Module):
    """A field that reads the other samples of the batch while it trains."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2).double(), nn.Linear(2, 2).double()

    def forward(self, t, x):
        return torch.sin(self.linear(self.norm(x)) * torch.tensor([[1.0], [30.0], [5.0], [2.0], [12.0]])) - x


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x[:, 0])])
def test_samples_that_are_not_apart_are_not_recomputed_as_if_they_were(wrap):
    """Recomputed, the k-th steps of all samples stand side by side, which stood in different attempts before."""
    x = wrap(torch.randn(5, 2, dtype=torch.float64))
    module, kinds = Normalized(), {"solver": "bs23", "control": "sample", "gradient": "checkpoint"}
    field = (lambda t, s: module(t, s)) if isinstance(x, torch.Tensor) else lambda t, s: (module(t, s[0]), -s[1])
    tolerance = Tolerance(1e-6, 1e-6)
    with pytest.raises(ValueError, match="field must treat each sample as if it were alone"):
        integrate(field, x, 0.0, 1.0, tolerance=tolerance, **kinds)
    module.eval()
    gradients = []
    for gradient in ("checkpoint", "direct"):
        end = integrate(field, x, 0.0, 1.0, tolerance=tolerance, **kinds | {"gradient": gradient}).x1
        end = end if isinstance(end, torch.Tensor) else end[0]
        gradients.append(torch.autograd.grad(end.sum(), module.linear.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
