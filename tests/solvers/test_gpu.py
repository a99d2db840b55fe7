"""Solves on a GPU: what a CPU gives, and no more waits for the device than are written down."""

import warnings

import pytest
import torch
from torch import nn

from solvers import Tolerance, integrate, odeint, odeint_adjoint

pytestmark = pytest.mark.gpu
D = torch.float64
TIGHT = Tolerance(1e-6, 1e-8)
SHAPES = [(5, 3), (40, 700)]  # fewer and more numbers than a kernel is for
WAYS = {
    "fixed": {"solver": "bs23", "steps": 5},
    "adaptive": {"solver": "dopri5", "tolerance": TIGHT},
    "loose": {"solver": "bs23"},
    "per sample": {"solver": "dopri5", "tolerance": TIGHT, "control": "sample"},
    "event": {"solver": "dopri5", "tolerance": TIGHT, "event": lambda t, x: x[:, :1].mean() - 0.3},
    "event per sample": {
        "solver": "dopri5", "tolerance": TIGHT, "control": "sample", "event": lambda t, x: x[:, 0] - 0.5
    },
    "checkpoint": {"solver": "dopri5", "tolerance": TIGHT, "gradient": "checkpoint"},
    "backsolve": {"solver": "dopri5", "tolerance": TIGHT, "gradient": "backsolve"},
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(width, 8, dtype=D), nn.Linear(8, width, dtype=D)

    def forward(self, t, x):
        return self.b(torch.tanh(self.a(x))) - x * t


def solved(device, shape, solve, dtype=D):
    """The end of a solve and the gradients of its square, on the CPU."""
    net = Net(shape[1]).to(device, dtype)
    x = (torch.arange(shape[0] * shape[1], dtype=D).sin().reshape(shape) + 1).to(device, dtype).requires_grad_()
    end = solve(net, x)
    grads = torch.autograd.grad(end.square().sum(), [x, *net.parameters()])
    return [end.detach().cpu(), *(grad.cpu() for grad in grads)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_integrate_as_on_a_cpu(way, shape):
    solve = lambda net, x: integrate(net, x, 0.0, 1.0, keep="last", **WAYS[way]).x1  # noqa: E731
    ours, expected = (solved(device, shape, solve) for device in ("cuda", "cpu"))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_states_as_on_a_cpu(dtype):
    solve = lambda net, x: integrate(net, x, 0.0, 1.0, solver="bs23", steps=4, keep="last").x1  # noqa: E731
    near = 1e-4 if dtype == torch.float32 else 0.1
    ours, expected = solved("cuda", (40, 700), solve, dtype), solved("cpu", (40, 700), solve)
    torch.testing.assert_close([v.double() for v in ours[:2]], expected[:2], rtol=near, atol=near)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [odeint, odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_odeint_as_on_a_cpu(method, function, shape):
    def solve(net, x):
        t = torch.linspace(0.0, 1.0, 4, dtype=D, device=x.device)
        return function(net, x, t, rtol=1e-7, atol=1e-9, method=method)

    ours, expected = (solved(device, shape, solve) for device in ("cuda", "cpu"))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_states_at_any_time_as_on_a_cpu(control):
    def states(device):
        x = torch.linspace(0.5, 2.0, 12, dtype=D, device=device).reshape(4, 3)
        solution = integrate(lambda t, x: -x * x, x, 0.0, 1.0, keep="steps", control=control)
        return [solution(t).cpu() for t in (0.0, 0.3, 1.0)]

    torch.testing.assert_close(states("cuda"), states("cpu"), rtol=1e-10, atol=1e-10)


def waits(run):
    """How often the host waits for the device."""
    run()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fixed_steps_never_wait(shape):
    net, x = Net(shape[1]).cuda(), torch.ones(shape, dtype=D, device="cuda")
    assert waits(lambda: integrate(net, x, 0.0, 1.0, solver="dopri5", steps=4, keep="last")) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_one_wait_for_each_attempt_and_three_for_the_first_step(control, shape):
    net, x, attempts = Net(shape[1]).cuda(), torch.ones(shape, dtype=D, device="cuda"), []

    def solve():
        stats = integrate(net, x, 0.0, 1.0, solver="dopri5", tolerance=TIGHT, control=control, keep="last").stats
        attempts.append(int((torch.as_tensor(stats.accepted) + torch.as_tensor(stats.rejected)).max()))

    with torch.no_grad():
        assert waits(solve) <= attempts[-1] + 3


def test_odeint_waits_for_its_times_alone():
    net, x = Net(700).cuda(), torch.ones(40, 700, dtype=D, device="cuda")
    t = torch.linspace(0.0, 1.0, 6, dtype=D, device="cuda")
    with torch.no_grad():
        assert waits(lambda: odeint(net, x, t, method="rk4")) <= 2


def test_fixed_steps_in_a_graph_of_the_device():
    net, x = Net(700).float().cuda(), torch.randn(40, 700, device="cuda")
    solve = lambda: integrate(net, x, 0.0, 1.0, solver="bs23", steps=4, keep="last").x1  # noqa: E731
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            solve()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            end = solve()
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(end, solve())
