"""Networks whose depth is edited, and what must hold of their optimizers."""

import torch
from torch import nn

from odenets import Flow, MLPField, Network

X = torch.randn(32, 3)


def network(depth=3, *, flows=1, stage_fields="tied", gain=1.0):
    parts = []
    for _ in range(flows):
        flow = Flow(lambda: MLPField(3), depth=depth, stage_fields=stage_fields)
        for block in flow.blocks:
            for field in block.fields:
                field.second.weight.data.mul_(gain)
        parts.append(flow)
    return Network(nn.Identity(), parts, nn.Linear(3, 2), transitions=[nn.Linear(3, 3)] * (flows - 1))


def train(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()


def check_alignment(net, optimizer):
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in listed] == [id(p) for p in net.parameters()]
    assert set(optimizer.state) <= set(listed)
    for p, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == p.shape
