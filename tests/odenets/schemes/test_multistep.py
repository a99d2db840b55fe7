"""Two-step schemes are the recurrences of their papers, and keep their order where step sizes differ."""

import itertools
import math

import pytest
import torch

import odenets
from odenets import measures
from odenets.schemes import AdamsBashforth2, LinearMultistep
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of


def test_lm_is_the_recurrence_of_its_paper():
    flow, x = flow_of("lm")
    ks = [0.7, -0.4, 0.2, 0.5]
    with torch.no_grad():
        for block, k in zip(flow.blocks, ks, strict=True):
            block.fields[1].k.fill_(k)
    states = [x]
    for m, (f,) in enumerate(fields_of(flow)):
        k, now = flow.blocks[m].fields[1].k, states[-1]
        states.append(now + 0.3 * f(now) if m == 0 else (1 - k) * now + k * states[-2] + 0.3 * f(now))
    assert_same(flow, x, states[-1])


def test_lm_begins_as_the_residual_network():
    flow, x = flow_of(LinearMultistep())
    euler = odenets.Flow.of([odenets.Block([b.fields[0]], b.h) for b in flow.blocks], solver="euler")
    torch.testing.assert_close(flow(x), euler(x), rtol=0, atol=1e-15)


def test_adams_bashforth_is_its_formula():
    flow, x = flow_of(AdamsBashforth2())
    y, before = x, None
    for (f,) in fields_of(flow):
        v = f(y)
        y, before = y + 0.3 * (v if before is None else 1.5 * v - 0.5 * before), v
    assert_same(flow, x, y)


class Spiral(torch.nn.Module):
    """``x' = cos(t) A x``, whose solution is known."""

    def forward(self, t, x):
        return math.cos(t) * torch.stack([-0.2 * x[:, 0] - x[:, 1], x[:, 0] - 0.2 * x[:, 1]], 1)


def _end(t):
    turn = math.sin(t)
    return math.exp(-0.2 * turn) * torch.tensor([[math.cos(turn), math.sin(turn)]], dtype=torch.float64)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_adams_bashforth_is_of_order_two(sizes):
    errors = []
    for depth in (40, 80, 160):
        weights = [1.0 + 0.6 * (m % 2) * (sizes == "unequal") for m in range(depth)]
        h = [1.5 * w / sum(weights) for w in weights]
        flow = odenets.Flow(Spiral(), solver="ab2", depth=depth, h=h, shared=True)
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        errors.append((flow(x) - _end(1.5)).norm().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.8 < order < 2.3 for order in orders), orders


def test_lm_is_consistent_with_its_slowed_equation():
    """With one k for all blocks ``(1 + k) x' = v``, also where step sizes differ."""
    errors = []
    for depth in (100, 200):
        weights = [1.0 + 0.6 * (m % 2) for m in range(depth)]
        flow = odenets.Flow(
            Spiral(), solver=LinearMultistep(0.5), depth=depth, h=[1.5 * w / sum(weights) for w in weights], shared=True
        )
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        reference = odenets.Flow(lambda: _Slowed(), solver="rk4", depth=200, total_time=1.5, shared=True)
        errors.append((flow(x) - reference(x)).norm().item())
    assert 1.7 < errors[0] / errors[1] < 2.3


class _Slowed(Spiral):
    def forward(self, t, x):
        return super().forward(t, x) / 1.5


def test_actions_of_a_path_of_adams_bashforth_are_not_negative():
    """The weights of its velocities over the whole path are 1/2, 1, ..., 1, 3/2."""
    flow, x = flow_of("ab2", depth=5)
    steps = list(flow.steps(x))
    total = flow.record(x, action=measures.action)[1]["action"].sum(0)
    weights = [0.5, 1.0, 1.0, 1.0, 1.5]
    wanted = sum(0.3 * w * step.stages[0].square().mean(1) for w, step in zip(weights, steps, strict=True))
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("scheme", ["lm", "ab2"])
def test_parts_hand_the_memory_on(scheme):
    flow, x = flow_of(scheme)
    parts = [flow.part(0, 1), flow.part(1, 3), flow.part(3, 4)]
    state = x
    for part in parts:
        state = part(state)
    assert torch.equal(state, flow(x))
    assert parts[1].part(1, 2)(parts[1].part(0, 1)(parts[0](x))).shape == (5, 6)  # of a part too


@pytest.mark.parametrize("start", [1.0, -1.5, float("nan")])
def test_a_start_that_is_not_stable_is_refused(start):
    with pytest.raises(ValueError, match=r"start must be in \(-1, 1\)"):
        LinearMultistep(start)


def test_a_field_that_returns_one_buffer_is_refused():
    class Buffered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.buffer = torch.zeros(5, 3, dtype=torch.float64)

        def forward(self, t, x):
            with torch.no_grad():
                return self.buffer.copy_(x.detach())

    flow = odenets.Flow(Buffered(), solver="ab2", depth=3, shared=True)
    with pytest.raises(ValueError, match="must not write into what it has returned"):
        flow(torch.randn(5, 3, dtype=torch.float64))
