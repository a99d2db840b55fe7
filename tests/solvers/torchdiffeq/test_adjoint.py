import pytest
import torch
import torchdiffeq
from torch import nn

from solvers import odeint, odeint_adjoint, odeint_event
from tests.solvers.torchdiffeq.fields import D


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 3, dtype=D, generator=generator) / 2)
        self.b = nn.Parameter(torch.randn(3, dtype=D, generator=generator))
        self.unused = nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, t, y):
        return torch.tanh(y @ self.a) + self.b * torch.cos(t)


def gradients(solve, method="dopri5", backwards=False, **options):
    field = Field()
    y0 = torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()
    t = torch.tensor([0.1, 0.4, 1.0], dtype=D)
    t = (t.flip(0) if backwards else t).requires_grad_()
    y = solve(field, y0, t, method=method, rtol=1e-9, atol=1e-10, **options)
    loss = (y * torch.arange(y.numel(), dtype=D).reshape(y.shape)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (y0, t, field.a, field.b))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5"])
def test_gradients_are_those_through_the_solver_and_torchdiffeqs(method, backwards):
    result = gradients(odeint_adjoint, method, backwards)
    through = gradients(odeint, method, backwards)
    theirs = gradients(torchdiffeq.odeint_adjoint, "dopri5", backwards)
    for ours, direct, reference in zip(result, through, theirs, strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_fixed_method_with_more_steps_backward():
    result = gradients(
        odeint_adjoint, "rk4", options={"step_size": 0.01}, adjoint_method="midpoint",
        adjoint_options={"step_size": 0.002},
    )  # fmt: skip
    for ours, exact in zip(result, gradients(odeint), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_the_seminorm_saves_evaluations_and_keeps_the_gradient():
    counts, grads = [], []
    for norm in ({}, {"adjoint_options": {"norm": "seminorm"}}):
        field = Field()
        calls = [0]
        field.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        y0 = torch.ones(2, 3, dtype=D)
        y = odeint_adjoint(field, y0, torch.tensor([0.0, 3.0], dtype=D), rtol=1e-6, atol=1e-8, method="bosh3", **norm)
        forward, calls[0] = calls[0], 0
        y[-1].square().sum().backward()
        assert forward > 0
        counts.append(calls[0])
        grads.append(field.a.grad)
    assert counts[1] < counts[0]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_tuples_and_what_gets_gradients():
    rate = torch.tensor(0.5, dtype=D, requires_grad=True)
    state = (torch.ones(2, dtype=D, requires_grad=True), torch.ones((), dtype=D, requires_grad=True))

    def field(t, y):
        return -rate * y[0] * y[1], torch.zeros_like(y[1])

    t = torch.tensor([0.0, 2.0], dtype=D)
    for params, known in (((rate,), True), ((), False)):
        y = odeint_adjoint(field, state, t, rtol=1e-8, atol=1e-8, adjoint_params=params)[0][-1]
        torch.testing.assert_close(y, torch.exp(torch.tensor([-1.0, -1.0], dtype=D)), rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(y.sum(), (*state, rate), allow_unused=True)
        torch.testing.assert_close(grads[0], y.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[1], -2 * 0.5 * y.detach().sum(), rtol=1e-5, atol=1e-6)
        assert (grads[2] is not None) == known
        if known:
            torch.testing.assert_close(grads[2], -2 * y.detach().sum(), rtol=1e-5, atol=1e-6)


def test_memory_does_not_hold_the_steps():
    saved = []
    field = Field()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        odeint_adjoint(field, torch.ones(2, 3, dtype=D), torch.tensor([0.0, 5.0], dtype=D), method="bosh3")
    assert len(saved) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"func": lambda t, y: -y}, "func must be a torch module"),
        ({"options": {}, "method": "rk4", "adjoint_method": "dopri5"}, "adjoint_options must be given"),
        ({"adjoint_options": {"norm": "max"}}, "norm must be a function or 'seminorm', got 'max'"),
        ({"adjoint_options": {"norm": "seminorm"}, "method": "rk4"}, "adjoint_options .* not supported by rk4"),
        ({"adjoint_options": {"step": 1}}, "adjoint_options .* not supported by dopri5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    func = arguments.pop("func", Field())
    with pytest.raises(ValueError, match=message):
        odeint_adjoint(func, torch.ones(2, 3, dtype=D), torch.tensor([0.0, 1.0], dtype=D), **arguments)


TOLERANCES = {
    "a number per part": ((1e-7, 1e-6), (1e-8, 1e-8)),
    "a tensor per part": ((torch.full((3, 2), 1e-7), 1e-6), 1e-8),
    "of one part": ((1e-7, 1e-6), 1e-8),
    "zero for one part": (1e-7, (0.0, 1e-7)),
}


@pytest.mark.parametrize("name", TOLERANCES)
def test_tolerances_per_part_hold_backwards_too(name):
    """Also of what is zero at first, the gradients of the parameters, where an entry of atol is 0."""
    net = nn.Linear(2, 2, dtype=D)
    rtol, atol = TOLERANCES[name]
    state = (torch.ones(3, 2, dtype=D), torch.full((3, 1), 0.5, dtype=D))
    grads = []
    for solve in (odeint, odeint_adjoint):
        more = {"adjoint_params": tuple(net.parameters())} if solve is odeint_adjoint else {}
        x, y = solve(
            lambda t, s: (torch.tanh(net(s[0])), -s[1] * s[0].sum(1, True)), state,
            torch.tensor([0.0, 1.0], dtype=D), rtol=rtol, atol=atol, **more,
        )  # fmt: skip
        grads.append(torch.autograd.grad(x[-1].sum() + y[-1].square().sum(), list(net.parameters())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


PER_ENTRY = {
    "entries": (1e-7, torch.tensor([1e-8, 1e-7, 1e-8])),
    "both": (torch.full((2, 3), 1e-7), torch.tensor([1e-8, 1e-7, 1e-8])),
    "zero": (torch.tensor(1e-7), torch.tensor([0.0, 1e-8, 1e-8])),
}


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("name", PER_ENTRY)
def test_tolerances_per_entry_hold_backwards_too(name, method):
    rtol, atol = PER_ENTRY[name]
    grads = []
    for solve in (odeint, odeint_adjoint):
        field = Field()
        y = solve(
            field, torch.ones(2, 3, dtype=D), torch.tensor([0.0, 0.7], dtype=D), rtol=rtol, atol=atol, method=method
        )
        grads.append(torch.autograd.grad(y[-1].square().sum(), (field.a, field.b)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_tolerance_for_each_part_of_the_backward_solve_as_in_torchdiffeq():
    """For grad_t, y, grad_y and three parameters."""
    more = {"adjoint_rtol": (1e-6, 1e-9, 1e-9, 1e-6, 1e-6, 1e-6), "adjoint_atol": (1e-9,) * 6}
    for ours, theirs in zip(gradients(odeint_adjoint, **more), gradients(torchdiffeq.odeint_adjoint), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"adjoint_rtol must .* 6 entries, for grad_t, y, grad_y and 3 param"):
        gradients(odeint_adjoint, adjoint_rtol=(1e-3, 1e-3))


def test_a_complex_state_with_a_tolerance_per_entry():
    x = torch.tensor([1 + 0.5j, 0.2 - 1j], dtype=torch.complex128, requires_grad=True)
    atol = torch.tensor([1e-8, 1e-7])
    t = torch.tensor([0.0, 1.0], dtype=D)
    y = odeint_adjoint(lambda t, y: 1j * y, x, t, rtol=1e-7, atol=atol, adjoint_params=())[-1]
    (result,) = torch.autograd.grad(y.real.sum(), x)
    torch.testing.assert_close(result, torch.exp(torch.tensor(-1j)).to(result).expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_the_backward_solve_asks_the_field_between_the_times_only(method):
    seen = []
    x = torch.ones(2, dtype=D, requires_grad=True)
    t = torch.tensor([0.2, 0.5, 1.0], dtype=D, requires_grad=True)
    field = lambda t, y: seen.append(t.item()) or -y * torch.cos(t)  # noqa: E731
    odeint_adjoint(field, x, t, method=method, rtol=1e-4, atol=1e-4, adjoint_params=())[-1].sum().backward()
    assert min(seen) >= 0.2
    assert max(seen) <= 1.0


def test_adjoint_callbacks_that_its_method_does_not_call_are_warned_about():
    class Watched(Field):
        callback_accept_step_adjoint = staticmethod(lambda t, y, h: None)

    y = odeint_adjoint(Watched(), torch.ones(2, 3, dtype=D), torch.tensor([0.0, 0.2], dtype=D), adjoint_method="rk4")
    with pytest.warns(UserWarning, match="method 'rk4' takes every step and does not call callback_accept_step"):
        y.sum().backward()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_event_time_moves_with_the_start_by_either_gradient(reverse):
    """dy/dt = t + 2 from y(t0) = 1 to y = c: the time is a root of (t^2 - t0^2) / 2 + 2 (t - t0) = c - 1."""
    t0, result = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), []
    y0 = torch.ones(1, dtype=torch.float64)
    for solve in (odeint, odeint_adjoint):
        extra = {"adjoint_params": ()} if solve is odeint_adjoint else {}
        time, _ = odeint_event(
            lambda t, y: t + 2 + 0 * y, y0, t0, event_fn=lambda t, y: y[0] - (-0.3 if reverse else 2.0),
            reverse_time=reverse, odeint_interface=solve, rtol=1e-9, atol=1e-9, **extra,
        )  # fmt: skip
        result.append((time.item(), torch.autograd.grad(time, t0)[0].item()))
    assert result[0] == pytest.approx(result[1], rel=1e-6)
    assert result[1][1] == pytest.approx((0.3 + 2) / (result[1][0] + 2), rel=1e-6)
