"""Shears are undone, and where undoing loses digits a pair of parts is kept before they are missed."""

import math

import pytest
import torch
from torch import nn

from solvers.gradients.captured import Captured
from solvers.gradients.shears import Shear, growth, loss, undone, with_gradients

D = torch.float64


def test_a_shear_is_undone():
    a, b = torch.randn(2, 4, 3, dtype=D)
    shear = Shear(0, 1, -0.5, 2.0, 0.3, 0)
    after = shear.forward(a, b.sin())
    torch.testing.assert_close(after, -0.5 * a + 2 * b.sin())
    steps = [shear, Shear(1, 0, 1.0, 0.1)]
    later = steps[1].forward(b, after)
    before = undone(steps, (after, later), lambda shear, x: x.sin() if shear.t == 0.3 else None)
    torch.testing.assert_close(before, (a, b))


def test_what_a_step_forgets_is_its_loss():
    assert loss([Shear(0, 1, 0.5, 1.0), Shear(1, 0, -0.25, 1.0), Shear(0, 1, 3.0, 1.0)]) == 8
    assert loss([Shear(0, 1, 0.0, 1.0)]) == math.inf
    assert growth(torch.float32) == pytest.approx(203, abs=1)


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=D))

    def forward(self, t, x, m, call):
        return torch.sin(self.weight * x)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.9, 0.3, 1e-3, 1e-9, 0.0, 1.2])
def test_gradients_are_those_of_the_steps_whatever_they_forget(scale):
    field, parts = Sine(), [torch.randn(4, 3, dtype=D, requires_grad=True) for _ in range(2)]
    steps = [(Shear(1, 0, scale, 0.4, 0.0, 0), Shear(0, 1, 1.0, 0.2))] * 20
    captured = Captured(field, None, names=("field", "params", "another way"), random=True)
    ends = with_gradients(captured, steps, tuple(parts), (), "these steps")
    x, r = parts
    for _ in range(20):
        r = scale * r + 0.4 * torch.sin(field.weight * x)
        x = x + 0.2 * r
    grads = []
    for one, two in (ends, (x, r)):
        inputs = [*parts, field.weight]
        grads.append(torch.autograd.grad(one.square().sum() + two.sum(), inputs))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_a_pair_is_kept_before_digits_are_missed():
    kept = {}
    for scale in (1.0, 0.9, 0.5, 0.0):
        steps = [(Shear(1, 0, scale, 1 - scale / 2, 0.0, 0), Shear(0, 1, 1.0, 0.01))] * 100
        captured = Captured(Sine().float(), None, names=("field", "params", "another way"), random=True)
        x = torch.zeros(2, 3, requires_grad=True)
        end, _ = with_gradients(captured, steps, (x, torch.zeros(2, 3)), (), "these steps")
        kept[scale] = len(end.grad_fn.saved_tensors) // 2 - 2
    assert kept == {1.0: 0, 0.9: 1, 0.5: 12, 0.0: 99}
