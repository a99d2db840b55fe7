"""Fields and flows of the tests of schemes, in float64."""

import torch
from torch import nn

import odenets


class Tanh(nn.Module):
    """``tanh(W x + b)``."""

    def __init__(self, features=3):
        super().__init__()
        self.layer = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, t, x):
        return torch.tanh(self.layer(x))


def flow_of(scheme, depth=4, h=0.3, features=3, **settings):
    """A flow of such fields, and states before it."""
    flow = odenets.Flow(lambda: Tanh(features), solver=scheme, depth=depth, h=h, **settings)
    return flow, torch.randn(5, features, dtype=torch.float64, requires_grad=True)


def fields_of(flow):
    """Of every block its fields as functions of the state."""
    return [[lambda x, f=f: f(0.0, x) for f in block.fields if isinstance(f, Tanh)] for block in flow.blocks]


def assert_same(flow, x, wanted):
    """That a flow's output and its gradients, in x and in all weights, are those of a formula."""
    inputs = [x, *(p for p in flow.parameters() if p.requires_grad)]
    got = flow(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    ours = torch.autograd.grad((got * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
