"""What finding and recording leave behind in a model, which is nothing but hooks that do nothing."""

import gc
import random
from collections import OrderedDict, defaultdict, deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import adapt


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.layer(x))


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.calls, self.last, self.deep = defaultdict(int), deque(maxlen=9), {"a": {"calls": 0}}
        self.cache = OrderedDict()

    def forward(self, x):
        self.calls["forward"] += 1
        self.last.append(x)
        self.deep["a"]["calls"] += 1
        self.cache[len(self.cache)] = random.random()
        return super().forward(x)


class Folding(Block):
    """As low-rank layers do, it folds weights in eval mode."""

    def train(self, mode=True):
        with torch.no_grad():
            self.layer.weight.mul_(0.5 if not mode and self.training else 2.0 if mode and not self.training else 1.0)
        return super().train(mode)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_passes_count_and_keep_is_undone_however_deep():
    model, state = Counting(), random.getstate()
    adapt(model, torch.randn(2, 4))
    assert (dict(model.calls), list(model.last), model.deep, dict(model.cache)) == ({}, [], {"a": {"calls": 0}}, {})
    assert random.getstate() == state


def test_weights_that_eval_mode_folds_stay():
    model, x = nn.Sequential(Folding(), nn.Linear(4, 2)), torch.randn(2, 4)
    before = model[0].layer.weight.clone()
    adapt(model, x)
    assert torch.equal(model[0].layer.weight, before)
    assert model.training


def test_what_is_refused_leaves_no_hooks():
    class Random(Block):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, True))

    model = Random()
    with pytest.raises(ValueError, match="two passes of Random in eval mode differ"):
        adapt(model, torch.randn(8, 4))
    assert hooks_of(model) == 0


def test_an_adapted_model_that_is_gone_leaves_no_hooks():
    model = Block()
    adapted = adapt(model, torch.randn(2, 4))
    assert hooks_of(model) > 0
    del adapted
    gc.collect()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("before", [True, False])
def test_states_are_those_on_the_side_of_dropout_on_which_they_are_added(before):
    class Dropping(Block):
        def forward(self, x):
            x = F.dropout(x, 0.5, self.training) if before else x
            self.seen = x, x + torch.tanh(self.layer(x))
            return self.seen[1] if before else F.dropout(self.seen[1], 0.5, self.training)

    model = nn.Sequential(nn.Linear(4, 4), Dropping(), nn.Linear(4, 2))
    (step,) = adapt(model, torch.randn(8, 4)).train().steps(torch.randn(8, 4))
    assert torch.equal(step.x0, model[1].seen[0])
    assert torch.equal(step.x1, model[1].seen[1])


def test_a_block_that_is_named_takes_its_first_argument_by_keyword():
    class Conditioned(Block):
        def forward(self, x, context):
            return x + torch.tanh(self.layer(x + context))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.context = Conditioned(), nn.Linear(4, 4)

        def forward(self, x):
            return self.block(context=self.context(x), x=x)

    x = torch.randn(2, 4)
    assert torch.equal(adapt(Net(), blocks=["block"]).steps(x)[0].x0, x)


def test_a_compiled_model_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"torch\.compile\(adapted\)"):
        adapt(torch.compile(Block()), torch.randn(2, 4))
