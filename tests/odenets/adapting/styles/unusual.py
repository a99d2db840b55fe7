"""Models that are legal Python, though no module's border shows their steps."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from tests.odenets.adapting.styles.skeleton import Around, Residual, convolutions, mlp
from tests.odenets.adapting.styles.structures import Plain


class Direct(nn.Module):
    """``forward`` of a block is called directly, and methods of other names are."""

    class Block(Residual):
        def advance(self, x):
            return x + self.branch(x)

    def __init__(self):
        super().__init__()
        self.first, self.block, self.other = nn.Conv2d(3, 8, 3, padding=1), Plain(), self.Block()

    def forward(self, x):
        x = self.block.forward(self.first(x))
        return self.other.advance(x)

    def expected(self, x):
        a = self.first(x)
        b = a + self.block.branch(a)
        c = b + self.other.branch(b)
        return c, [("", a, b), ("", b, c)]


class Unregistered(nn.Module):
    """Layers in a list of Python's, so that only their parameters are known to the model."""

    def __init__(self):
        super().__init__()
        self.layers = [mlp(), mlp()]
        self.weights = nn.ParameterList(p for layer in self.layers for p in layer.parameters())

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

    def expected(self, x):
        y = x + self.layers[0](x)
        z = y + self.layers[1](y)
        return z, [("", x, y), ("", y, z)]


def add_input(module, args, output):
    return output + args[0]


class Hooked(nn.Module):
    """The state is added by a hook on the branch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), mlp(), nn.Tanh(), mlp())
        for i in (1, 3):
            self.layers[i].register_forward_hook(add_input)

    def forward(self, x):
        return self.layers(x)

    def expected(self, x):
        a = self.layers[0](x)
        b = a + nn.Sequential(*self.layers[1])(a)
        c = b.tanh()
        d = c + nn.Sequential(*self.layers[3])(c)
        return d, [("", a, b), ("", c, d)]


class Functional(nn.Module):
    """Weights of a block come from a small network, by ``torch.func.functional_call``."""

    def __init__(self):
        super().__init__()
        self.branch, self.scale = mlp(), nn.Linear(1, 1)

    def forward(self, x):
        scale = torch.exp(self.scale(torch.ones(1, dtype=x.dtype)))
        weights = {name: scale * p for name, p in self.branch.named_parameters()}
        return x + torch.func.functional_call(self.branch, weights, (x,))

    def expected(self, x):
        scale = torch.exp(self.scale.weight[0] + self.scale.bias)
        norm, up, _, down = self.branch
        y = F.layer_norm(x, (8,), norm.weight * scale, norm.bias * scale)
        y = F.gelu(F.linear(y, up.weight * scale, up.bias * scale))
        x1 = x + F.linear(y, down.weight * scale, down.bias * scale)
        return x1, [("", x, x1)]


class Features(nn.Module):
    """The state travels in a dictionary that the blocks change."""

    class Block(Residual):
        def forward(self, features):
            features["x"] = features["x"] + self.branch(features["x"])
            features["seen"] = features.get("seen", 0) + 1

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, x):
        features = {"x": self.first(x)}
        for block in self.blocks:
            block(features)
        return features["x"]

    def expected(self, x):
        a = self.first(x)
        b = a + self.blocks[0].branch(a)
        c = b + self.blocks[1].branch(b)
        return c, [("blocks.0", a, b), ("blocks.1", b, c)]


class ActivationsByHand(nn.Module):
    """Activations with weights of their own: a PReLU, a Swish, a KAN's layer. They are no steps; a block is one."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 8, 3, padding=1), Plain()
        self.slope, self.beta = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8, 1, 1))
        self.base, self.spline = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.first(x)
        x = x.relu() + self.slope * (x - x.abs()) * 0.5
        x = x * torch.sigmoid(self.beta * x)
        x = self.base(F.silu(x)) + self.spline(torch.cat([x.sin(), x.cos()], 1))
        return self.block(x)

    def expected(self, x):
        x = self.first(x)
        x = torch.where(x > 0, x, self.slope * x)
        x = x / (1 + torch.exp(-self.beta * x))
        x = self.base(x * x.sigmoid()) + self.spline(torch.cat([x.sin(), x.cos()], 1))
        x1 = x + self.block.branch(x)
        return x1, [("block", x, x1)]


class Masked(nn.Module):
    """Padded tokens stay what they are, once by ``where``, once by zeros."""

    def __init__(self):
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(8, 8), mlp(), mlp()

    def forward(self, x, mask):
        x = self.embed(x)
        x = torch.where(mask[..., None], x + self.one(x), x)
        x = (x + self.two(x)) * mask[..., None]
        return x.sum(1) / mask.sum(1, keepdim=True)

    def expected(self, x, mask):
        a = self.embed(x)
        b = a + self.one(a)
        c = torch.where(mask[..., None], b, a)
        d = c + self.two(c)
        return (d * mask[..., None]).sum(1) / mask.sum(1)[:, None], [("", a, b), ("", c, d)]


class AddingUnet(nn.Module):
    """LinkNet: the skip is added over all that lies below it, so that it is the outermost step."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 8, 3, padding=1), Plain(), Plain()
        self.down, self.up = nn.Conv2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x):
        skip = self.stem(x)
        x = self.up(self.block(self.down(skip)))
        return self.last(F.relu(x + skip))

    def expected(self, x):
        a = self.stem(x)
        inner = self.down(a)
        b = (a + self.up(inner + self.block.branch(inner))).relu()
        c = b + self.last.branch(b)
        return c, [("", a, b), ("last", b, c)]


class LayerDrop(nn.Module):
    """In training blocks, and an addition outside of any block, are left out at random."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(Plain() for _ in range(2))
        self.branch = convolutions()

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.5:
                x = block(x)
        if not self.training or torch.rand(()) < 0.5:
            x = x + self.branch(x)
        return x

    def expected(self, x):
        x, steps = self.first(x), []
        for name, branch in zip(
            ("blocks.0", "blocks.1", ""), (*(b.branch for b in self.blocks), self.branch), strict=True
        ):
            if not self.training or torch.rand(()) < 0.5:
                steps.append((name, x, x + branch(x)))
                x = steps[-1][2]
        return x, steps


class Loops(nn.Module):
    """Steps of a loop outside of any block: two additions each, of which one injects the input; and `lerp`."""

    def __init__(self):
        super().__init__()
        self.embed, self.inject, self.branch, self.last = nn.Linear(8, 8), nn.Linear(8, 8), mlp(), mlp()

    def forward(self, x):
        e = self.embed(x).relu()
        z = e
        for _ in range(3):
            z = torch.tanh(z + self.branch(z) + self.inject(e))
        return torch.lerp(z, self.last(z), 0.3)

    def expected(self, x):
        e = self.embed(x).relu()
        states = [e]
        for _ in range(3):
            z = states[-1]
            states.append((self.inject(e) + z + self.branch(z)).tanh())
        states.append(0.7 * states[-1] + 0.3 * self.last(states[-1]))
        return states[-1], [("", *pair) for pair in pairwise(states)]


class SumOfStates(nn.Module):
    """The states after all blocks are added up, which is no step, for no branch is computed for it."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.ModuleList(Plain() for _ in range(2))

    def forward(self, x):
        states = [self.first(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states[0] + states[1] + states[2]

    def expected(self, x):
        a = self.first(x)
        b = a + self.blocks[0].branch(a)
        c = b + self.blocks[1].branch(b)
        return a + b + c, [("blocks.0", a, b), ("blocks.1", b, c)]


class Squeezed(Around):
    """Gates within branches (squeeze and excitation), of which the last is a sum of two gates."""

    class Block(Residual):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x):
            y = self.branch(x)
            gate = self.fc2(self.fc1(y.mean((2, 3))).relu()) + self.fc2(self.fc1(y.amax((2, 3))).relu())
            return y * gate.sigmoid()[..., None, None] + x

        def by_hand(self, x):
            y = self.branch(x)
            gates = [self.fc2(self.fc1(s).relu()) for s in (y.mean((2, 3)), y.amax((2, 3)))]
            x1 = x + y * sum(gates).sigmoid().view(len(x), 8, 1, 1)
            return x1, [(x, x1)]

    def __init__(self):
        super().__init__(convolutions(3), [self.Block(), self.Block()], 8, (2, 3))
