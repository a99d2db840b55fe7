"""What blocks are within, return, share and hold: structure that is not a block with one addition."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.odenets.adapting.styles.skeleton import Around, Residual, convolutions


# -- blocks that hold more than an addition of their own ---------------------------------------------------------------
class Nested(Residual):
    """The branch holds residual blocks: its own additions are no steps."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.BatchNorm2d(8), Plain(), Plain(), nn.Conv2d(8, 8, 1)))

    def forward(self, x):
        return x + self.branch(x)


class Plain(Residual):
    def forward(self, x):
        return x + self.branch(x)


class Hierarchical(Residual):
    """Res2Net's branch: groups of channels, each convolved together with the result of the one before."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        groups = torch.chunk(F.relu(self.first(x)), 4, 1)
        outs = [groups[0]]
        for group, conv in zip(groups[1:], self.convs, strict=True):
            outs.append(F.relu(conv(group + outs[-1] if len(outs) > 1 else group)))
        return F.relu(self.last(torch.cat(outs, 1)) + x)

    def by_hand(self, x):
        y = self.first(x).relu()
        a = self.convs[0](y[:, 2:4]).relu()
        b = self.convs[1](y[:, 4:6] + a).relu()
        c = self.convs[2](y[:, 6:] + b).relu()
        x1 = (x + self.last(torch.cat([y[:, :2], a, b, c], 1))).relu()
        return x1, [(x, x1)]


class Reversible(nn.Module):
    """Two halves of the channels in turn, a step each."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.g = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], dim=1)

    def by_hand(self, x):
        a, b = x[:, :4], x[:, 4:]
        c = a + self.f(b)
        d = b + self.g(c)
        return torch.cat((c, d), 1), [(a, c), (b, d)]


class Dense(nn.Module):
    """Concatenates, adds, and concatenates: the addition is the one step."""

    def __init__(self):
        super().__init__()
        self.grow, self.branch, self.mix = nn.Conv2d(8, 4, 3, padding=1), convolutions(12, 12), nn.Conv2d(24, 8, 1)

    def forward(self, x):
        x = torch.cat([x, F.relu(self.grow(x))], 1)
        x = x + self.branch(x)
        return self.mix(torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1))

    def by_hand(self, x):
        x0 = torch.cat([x, self.grow(x).relu()], 1)
        x1 = x0 + self.branch(x0)
        return self.mix(torch.cat([x1, F.avg_pool2d(x1, 3, 1, 1)], 1)), [(x0, x1)]


class Reparameterized(nn.Module):
    """RepVGG's three linear branches: no step, for none of the three is a state that another moves."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.narrow = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.wide(x) + self.narrow(x) + self.norm(x))

    def by_hand(self, x):
        return (self.wide(x) + self.narrow(x) + self.norm(x)).relu(), []


class SumOfBranches(nn.Module):
    """Two branches that are computed from one state and added to each other: no step."""

    def __init__(self):
        super().__init__()
        self.one, self.two = convolutions(), convolutions()

    def forward(self, x):
        return self.one(x) + self.two(x)

    def by_hand(self, x):
        return self.one(x) + self.two(x), []


class Spectral(nn.Module):
    """A Fourier layer (complex weights) within a residual branch; its sum of two linear maps is no step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3, dtype=torch.cfloat) / 8)
        self.local = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        modes = torch.fft.rfft2(x)
        out = torch.zeros_like(modes)
        out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :3, :3], self.weight)
        return x + F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.local(x))

    def by_hand(self, x):
        low = torch.fft.rfft2(x)[..., :3, :3]
        modes = (low.unsqueeze(2) * self.weight).sum(1)
        y = torch.fft.rfft2(x) * 0
        y = torch.cat([torch.cat([modes, y[..., :3, 3:]], 3), y[..., 3:, :]], 2)
        x1 = x + F.gelu(torch.fft.irfft2(y, s=x.shape[-2:]) + self.local(x))
        return x1, [(x, x1)]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class CustomFunction(Residual):
    """An operation of the author's own, with its own backward pass."""

    def forward(self, x):
        return x + self.branch(Square.apply(x))

    def by_hand(self, x):
        x1 = x + self.branch(x * x)
        return x1, [(x, x1)]


# -- how blocks are called and what they return ------------------------------------------------------------------------
@dataclass
class BlockOutput:
    state: Tensor
    weights: Tensor | None = None


class ReturnsOutput(OrderedDict):
    """As Hugging Face's ``ModelOutput``."""

    state = property(lambda output: output["state"])


class Returns(Residual):
    """Takes keywords and returns a container."""

    def __init__(self, container):
        super().__init__()
        self.container = container

    def forward(self, *, state, scale=None):
        r = self.branch(state)
        state = state + (r if scale is None else scale * r)
        if self.container == "tuple":
            return state, r
        if self.container == "dictionary":
            return {"weights": r, "state": state}
        if self.container == "dataclass":
            return BlockOutput(state, r)
        return ReturnsOutput(weights=None, state=state)


class Containers(nn.Module):
    """Calls each block by keywords and takes the state out of what it returns; returns a dictionary itself."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.layers = nn.ModuleList(map(Returns, ("tuple", "dictionary", "dataclass", "output")))

    def forward(self, x):
        x = self.first(x)
        x = self.layers[0](state=x)[0]
        x = self.layers[1](state=x, scale=0.5)["state"]
        x = self.layers[2](scale=None, state=x).state
        x = self.layers[3](state=x).state
        return {"logits": self.head(x.mean((2, 3))), "features": x}

    def expected(self, x):
        x, steps = self.first(x), []
        for i, scale in enumerate((1, 0.5, 1, 1)):
            x0, x = x, x + scale * self.layers[i].branch(x)
            steps.append((f"layers.{i}", x0, x))
        return {"logits": self.head(x.mean((2, 3))), "features": x}, steps


class Shared(nn.Module):
    """One block called three times, each call a step; and one activation behind two additions of another block."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.shared, self.act = Plain(), nn.ReLU()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.act(self.first(x))
        for _ in range(3):
            x = self.shared(x)
        x = self.act(x + self.a(self.act(x)))
        x = self.act(x + self.b(self.act(x)))
        return self.head(x.mean((2, 3)))

    def expected(self, x):
        x = self.first(x).relu()
        states = [x]
        for _ in range(3):
            x = x + self.shared.branch(x)
            states.append(x)
        for conv in (self.a, self.b):
            x = (x + conv(x.relu())).relu()
            states.append(x)
        hints = ["shared"] * 3 + [""] * 2
        return self.head(x.mean((2, 3))), list(zip(hints, states[:-1], states[1:], strict=True))


class Checkpointed(nn.Module):
    """Blocks, and an addition outside of any block, whose states are computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Plain() for _ in range(2))
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())

    def add(self, x):
        return x + self.conv(x)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        x = checkpoint(self.add, x, use_reentrant=False) if self.training else self.add(x)
        return self.head(x.mean((2, 3)))

    def expected(self, x):
        a = self.first(x)
        b = a + self.blocks[0].branch(a)
        c = b + self.blocks[1].branch(b)
        d = c + self.conv(c)
        return self.head(d.mean((2, 3))), [("blocks.0", a, b), ("blocks.1", b, c), ("", c, d)]


class Scripted(Around):
    """A scripted block, a traced one, and a scripted branch."""

    def __init__(self):
        example = torch.randn(2, 8, 8, 8)
        plain = Plain().eval()
        script, trace = torch.jit.script(Plain()), torch.jit.trace(plain, example)
        last = Plain(torch.jit.script(convolutions()))
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), [script, trace, last], 8, (2, 3))
        self.traced = [plain.branch]  # for the parts of a trace are not called

    def expected(self, x):
        x, steps = self.first(x), []
        for i, block in enumerate(self.blocks):
            branch = self.traced[0] if i == 1 else block.branch
            steps.append((f"blocks.{i}", x, x + branch(x)))
            x = steps[-1][2]
        return self.head(x.mean((2, 3))), steps
