"""Random fields, spans and tolerances, which one graph serves, beside the loop on the host."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from solvers import Tolerance, integrate

D = torch.float64
numbers = st.floats(-1.5, 1.5, allow_subnormal=False)
times = st.floats(-1.5, 1.5, width=32)
exponents = st.floats(-6, -2)


class Mixture(nn.Module):
    """Linear and bent parts and one of time: ``x A + w tanh(x B + b) + d sin(u t)``; A and u are arguments."""

    def __init__(self):
        super().__init__()
        shapes = {"inner": (2, 2), "bias": (2,), "outer": (2,), "wave": (2,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=D)))

    def fill(self, values):
        values = torch.from_numpy(values)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(values[: parameter.numel()].view_as(parameter))
                values = values[parameter.numel() :]

    def forward(self, t, x, linear, speed):
        bent = self.outer * torch.tanh(x @ self.inner + self.bias)
        return x @ linear + bent + self.wave * torch.sin(speed * t)


def check(field, x, args, t0, t1, tolerance, **options):
    found = []
    for graph in (True, False):
        start, (linear, speed) = x.clone().requires_grad_(), (arg.clone().requires_grad_() for arg in args)
        solution = integrate(
            field, start, t0, t1, args=(linear, speed), tolerance=tolerance, graph=graph, **options
        )  # fmt: skip
        loss = (torch.linspace(1, 2, x.numel(), dtype=D).view_as(x) * solution.x1).sum()
        if "at" in options:
            loss = loss + solution.states.square().sum()
        wanted = [start, linear, speed, *field.parameters()]
        found.append((solution, torch.autograd.grad(loss, wanted, materialize_grads=True)))
    (ours, gradients), (theirs, others) = found
    assert ours.stats == theirs.stats
    assert ours.status == theirs.status
    for one, other in zip((ours.x1, *gradients), (theirs.x1, *others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    if "at" in options:
        torch.testing.assert_close(ours.states, theirs.states, rtol=1e-7, atol=1e-9)
        assert torch.equal(ours.sample_stats.evaluations, theirs.sample_stats.evaluations)


def tensors(rtol, atol):
    return Tolerance(rtol=torch.tensor(10**rtol, dtype=D), atol=torch.tensor(10**atol, dtype=D))


@pytest.mark.slow
def test_batches():
    field = Mixture()

    @settings(max_examples=20)
    @given(
        arrays(np.float64, 10, elements=numbers), arrays(np.float64, (3, 2), elements=numbers),
        arrays(np.float64, (2, 2), elements=numbers), st.floats(0, 6), times, times, exponents, exponents,
    )  # fmt: skip
    def each(values, x, linear, speed, t0, t1, rtol, atol):
        field.fill(values)
        args = torch.from_numpy(linear), torch.tensor(speed, dtype=D)
        check(field, torch.from_numpy(x), args, t0, t1, tensors(rtol, atol))

    each()


@pytest.mark.slow
def test_samples_and_output_times():
    field = Mixture()

    @settings(max_examples=12)
    @given(
        arrays(np.float64, 10, elements=numbers), arrays(np.float64, (3, 2), elements=numbers),
        arrays(np.float64, (2, 2), elements=numbers), st.floats(0, 6), times, times,
        arrays(np.float64, 2, elements=st.floats(0, 1)), exponents, exponents,
    )  # fmt: skip
    def each(values, x, linear, speed, t0, t1, parts, rtol, atol):
        field.fill(values)
        args = torch.from_numpy(linear), torch.tensor(speed, dtype=D)
        options = {"at": torch.from_numpy(t0 + (t1 - t0) * np.sort(parts)), "control": "sample"}
        check(field, torch.from_numpy(x), args, t0, t1, tensors(rtol, atol), **options)

    each()
