"""Along which axis the samples lie, where it is not the first of the sum."""

import pytest
import torch
from torch import nn

from odenets import adapt, measures
from odenets.adapting import Samples


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def r(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        return x + self.r(x)


class InAnotherView(Branch):
    def forward(self, x):
        y = x[None]
        y = y + self.r(y)
        return y[0]


class ByToken(Branch):
    def forward(self, x):
        y = x.flatten(0, 1)
        y = y + self.r(y)
        return y.view(x.shape)


class TimeFirst(Branch):
    """Frames of a video as rows of the batch, first those of the first time."""

    def forward(self, x):
        samples, times, features = x.shape
        y = super().forward(x.transpose(0, 1).reshape(times * samples, features))
        return y.reshape(times, samples, features).mean(0)


class Timed(Branch):
    def forward(self, t, x):
        return x + t * self.r(x)


@pytest.mark.parametrize("block", [InAnotherView, ByToken])
def test_states_are_taken_as_they_pass_and_not_as_they_are_added(block):
    network = adapt(nn.Sequential(nn.Linear(8, 8), block(), nn.Linear(8, 2)), torch.randn(4, 4, 8))
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        (step,) = network.steps(x)
        y = network.model[0](x)
        torch.testing.assert_close(step.x1, y + network.model[1].r(y))
    assert network.record(x, action=measures.action)[1]["action"].shape == (1, 3)


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 8), torch.randn(2, 3, 8)], ids=["zeros", "random"])
def test_an_example_of_zeros_tells_as_much_as_any(example):
    assert adapt(TimeFirst(), example).blocks[0].samples == Samples(0, 3, apart=True)


def test_an_axis_that_only_independence_tells_is_said():
    class Centered(Branch):
        def forward(self, x):
            return super().forward(x - x.mean(0, keepdim=True))

    with pytest.warns(UserWarning, match="along the first axis of the inputs, and on none along the second"):
        network = adapt(Centered(), torch.randn(2, 6, 8))
    assert network.blocks[0].samples.axis == 1


def test_a_model_that_takes_one_number_of_samples_is_told():
    class Fixed(Branch):
        def forward(self, x):
            return super().forward(x.view(2, 8))

    with pytest.warns(UserWarning, match="no other number of samples"):
        adapt(Fixed(), torch.randn(2, 8))


@pytest.mark.parametrize("t", [torch.rand(1), torch.rand(4, 1), torch.tensor([3])], ids=["one", "each", "whole"])
def test_a_time_may_come_before_the_state(t):
    network = adapt(Timed(), (t, torch.randn(4, 8)))
    assert network.record(t, torch.randn(4, 8), action=measures.action)[1]["action"].shape == (1, 4)


def test_tokens_that_are_rows_of_the_batch_may_be_of_any_number():
    class Folded(Branch):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).view(x.shape).mean(1)

    network = adapt(nn.Sequential(Folded(), nn.Linear(8, 2)), torch.randn(2, 5, 8))
    x = torch.randn(3, 7, 8)
    (step,) = network.steps(x)
    torch.testing.assert_close(step.x0, x)
    assert network.record(x, action=measures.action)[1]["action"].shape == (1, 3)
