"""Stochastic depth: the draws in training mode, their expectation in eval mode."""

import pytest
import torch

import odenets
from odenets.schemes import StochasticDepth
from tests.odenets.schemes.fields import Tanh, assert_same, fields_of, flow_of


def test_eval_mode_takes_the_expectation():
    flow, x = flow_of(StochasticDepth(0.4))
    y = x
    for m, (f,) in enumerate(fields_of(flow)):
        y = y + (1 - (m + 1) / 4 * 0.6) * 0.3 * f(y)
    flow.eval()
    assert_same(flow, x, y)


@pytest.mark.parametrize("by", ["sample", "batch"])
def test_the_mean_of_a_block_in_training_is_its_step_in_eval_mode(by):
    flow = odenets.Flow(lambda: Tanh(), solver=StochasticDepth(0.3, by=by), depth=1)
    x = torch.randn(2, 3, dtype=torch.float64)
    passes = torch.stack([flow(x) for _ in range(3000)])
    share = ((passes - x).abs().sum(2) > 0).double().mean(0)
    assert ((share - 0.3).abs() < 0.04).all()  # 4.8 deviations of 3,000 draws
    same = ((passes - x).abs().sum(2) > 0)[:, 0] == ((passes - x).abs().sum(2) > 0)[:, 1]
    assert same.all() == (by == "batch")
    wanted = flow.eval()(x)
    torch.testing.assert_close(passes.mean(0), wanted, atol=0.04, rtol=0)


def test_a_batch_that_leaves_a_block_out_does_not_evaluate_it():
    calls = []
    flow = odenets.Flow(_Counting(calls), solver=StochasticDepth(1e-6, by="batch"), depth=1)
    x = torch.randn(2, 3)
    assert torch.equal(flow(x), x)
    assert not calls


class _Counting(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, t, x):
        self.calls.append(t)
        return x


def test_the_last_survival_stays_with_a_copied_block():
    flow, _ = flow_of(StochasticDepth(0.5))
    flow.resize([0.3] * 5)
    assert [block.fields[1].probability.item() for block in flow.blocks] == [0.875, 0.75, 0.625, 0.5, 0.5]


@pytest.mark.parametrize("survival", [0, -0.1, 1.5])
def test_a_survival_at_which_nothing_is_left_is_refused(survival):
    with pytest.raises(ValueError, match=r"survival must be a probability in \(0, 1\], for at 0 nothing is left"):
        StochasticDepth(survival)
