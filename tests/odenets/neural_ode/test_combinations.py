"""Every gradient, control, event, times, condition, tree and dtype of a NeuralODE at once, against a closed form."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss
from torch import nn
from torch.testing import assert_close

from odenets import NeuralODE, measures
from solvers import Tolerance

MODES = [
    *({"gradient": gradient} for gradient in ("direct", "checkpoint", "backsolve")),
    *({"gradient": gradient, "steps": 60, "solver": "rk4"} for gradient in ("direct", "checkpoint", "backsolve")),
    *({"gradient": gradient, "control": "sample"} for gradient in ("direct", "checkpoint")),
]


class Decay(nn.Module):
    """``v = -r (1 + t) c x`` of a tensor, or of each in a dictionary."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t, x, c):
        if isinstance(x, dict):
            return {name: self(t, part, c) for name, part in x.items()}
        return -self.rate * (1 + t) * c * x


def clock(t):
    """``int (1 + t) dt``."""
    return t + t * t / 2


def end_of(t0, t1, c, field, x, event, each, level):
    """When the samples' solves end, ``(B,)``, and which of them meet the event."""
    if not event:
        return t1, torch.zeros(len(x), dtype=torch.bool)
    met = (1 + 2 * (clock(t0) + torch.log(x[:, 0].abs() / level) / (field.rate * c[:, 0]))).sqrt() - 1
    direction = (t1 - t0).sign()
    inside = ((met - t0) * direction > 0) & ((met - t1) * direction < 0)
    if each:
        return torch.where(inside, met, t1), inside
    first = torch.where(inside, met * direction, torch.inf).argmin()
    return (met[first].expand(len(x)) if inside.any() else t1), inside.any().expand(len(x))


def check_gradients(one, other, inputs, weight, tolerance):
    there = ~other.detach().abs().isnan()
    losses = [(weight * torch.where(there, states, 0).abs()).sum() for states in (one, other)]
    if not losses[0].requires_grad or not losses[1].requires_grad:
        return
    pairs = [torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True) for loss in losses]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(
    mode=st.sampled_from(MODES),
    event=st.booleans(),
    times=st.sampled_from(["none", "batch", "sample"]),
    tree=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    back=st.booleans(),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_decay_is_its_closed_form(mode, event, times, tree, dtype, back, own, seed):
    """States, gradients of x, of the condition and of the parameter, and the action, also up to an event."""
    torch.manual_seed(seed)
    each, field, samples = "control" in mode, Decay(), 3
    x = torch.randn(samples, 2, dtype=dtype)
    x = (x / x.abs() * (1 + torch.rand(samples, 2))).requires_grad_()
    c = (0.5 + torch.rand(samples, 1, dtype=torch.float64)).requires_grad_()
    own, times = own and each, "batch" if times == "sample" and not each else times
    t0, t1 = (torch.full((samples,), t, dtype=torch.float64) for t in ((1.0, 0.0) if back else (0.0, 1.0)))
    if own:
        t0, t1 = t0 + 0.1 * torch.rand(samples), t1 + 0.1 * torch.rand(samples)
    at = None
    if times == "sample":
        at = t0[:, None] + (t1 - t0)[:, None] * torch.tensor([0.0, 0.4, 1.0, 1.0])
    elif times == "batch":
        first, last = (t0.min(), t1.min()) if back else (t0.max(), t1.max())
        at = (first + (last - first) * torch.tensor([0.0, 0.3, 0.3, 1.0], dtype=torch.float64)).expand(samples, 4)
    level, sign = (2.2 if back else 0.9), (-1 if back else 1)

    def crossing(t, state):
        gap = (state["one"] if tree else state)[:, 0].abs() - level
        return gap if each else gap * sign

    tolerance = {} if "steps" in mode else {"tolerance": Tolerance(1e-10, 1e-10)}
    ends = {"t0": t0, "t1": t1} if own else {"t0": t0[0], "t1": t1[0]}
    ode = NeuralODE(field, event=crossing if event else None, **ends, **mode, **tolerance)
    out = ode({"one": x, "two": 2 * x} if tree else x, c, at=at if times == "sample" or at is None else at[0])
    out = out["one"] if tree else out

    end, met = end_of(t0, t1 if at is None else at[:, -1], c, field, x, event, each, level)

    def exact(t):
        return x * torch.exp(-field.rate * c * (clock(t) - clock(t0))[:, None])

    expected = exact(end)
    if at is not None:
        behind = met[:, None] & ((at - end[:, None]) * (t1 - t0).sign()[:, None] > 0)
        expected = torch.stack([exact(t) for t in at.unbind(1)], 1).masked_fill(behind[..., None], torch.nan)
        expected = expected.transpose(0, 1) if times == "batch" else expected
    small = 1e-3 if "steps" in mode else 1e-5
    assert_close(out, expected, rtol=small / 10, atol=small / 10, equal_nan=True)
    inputs = [x, c, field.rate]
    check_gradients(out, expected, inputs, torch.randn(out.shape), small)
    if tree or at is not None:
        return
    _, records = ode.record(x, c, action=measures.action)
    action = torch.zeros(samples, dtype=torch.float64)
    for node, weight in zip(*leggauss(20), strict=True):
        t = t0 + (end - t0) * (node + 1) / 2
        action = action + weight / 2 * (end - t0) * field(t[:, None], exact(t), c).abs().square().mean(1)
    assert_close(records["action"].sum(0), action, rtol=small, atol=small)
    check_gradients(records["action"].sum(0), action, inputs, torch.randn(samples), small)
