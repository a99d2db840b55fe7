"""Models that add outside of blocks."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.odenets.adapting.styles.skeleton import convolutions, mlp
from tests.odenets.adapting.styles.structures import Plain


class TopLevel(nn.Module):
    """All in one forward: layers in lists, no block is a module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.down = nn.Conv2d(8, 8, 1, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for i in range(2):
            x = F.relu(self.norms[i](self.convs[i](x)) + x)
        y = self.down(x)
        y = y + F.max_pool2d(self.convs[2](self.norms[2](x).relu()), 2)
        return self.head(y.flatten(2).mean(-1))

    def expected(self, x):
        a = self.stem(x)
        b = (a + self.norms[0](self.convs[0](a))).relu()
        c = (b + self.norms[1](self.convs[1](b))).relu()
        d = self.down(c)
        e = d + F.max_pool2d(self.convs[2](self.norms[2](c).relu()), 2)
        return self.head(e.mean((2, 3))), [("", a, b), ("", b, c), ("", d, e)]


class RawParameters(nn.Module):
    """No submodule at all. A sequence of its length is mixed by matrices, which fixes the length."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(8, 8) / 3) for _ in range(4))
        self.b = nn.Parameter(torch.zeros(8))
        self.mix, self.out = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8, 5))

    def forward(self, x):
        x = x @ self.w[0] + self.b
        x = x + torch.tanh(x @ self.w[1])
        x = x + torch.einsum("ts,bsd->btd", self.mix, x.relu())
        x = torch.baddbmm(x, torch.tanh(x @ self.w[2]), self.w[3].expand(len(x), -1, -1))
        return x.mean(1) @ self.out

    def expected(self, x):
        a = torch.einsum("btd,de->bte", x, self.w[0]) + self.b
        b = a + (a @ self.w[1]).tanh()
        c = b + self.mix @ b.clamp(min=0)
        d = c + (c @ self.w[2]).tanh() @ self.w[3]
        return d.mean(1) @ self.out, [("", a, b), ("", b, c), ("", c, d)]


class FunctionsOnly(nn.Module):
    """A GELU and a LayerNorm by hand, positions, biases: additions that are no steps, and one that is."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.position, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))
        self.g, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 5)

    def norm(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + self.g) + self.bias

    def gelu(self, x):
        return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))

    def forward(self, x):
        x = self.norm(self.gelu(self.embed(x) + self.position[: x.shape[1]]))
        x = x + self.down(self.gelu(self.up(self.norm(x)))) + self.bias
        return self.head(self.gelu(self.norm(x)).mean(1))

    def expected(self, x):
        def norm(x):
            return F.layer_norm(x, (8,), 1 + self.g, self.bias)

        def gelu(x):
            return F.gelu(x, approximate="tanh")

        x0 = norm(gelu(self.embed(x) + self.position[: x.shape[1]]))
        x1 = x0 + self.down(gelu(self.up(norm(x0))))
        return self.head(gelu(norm(x1 + self.bias)).mean(1)), [("", x0, x1)]


class GlobalSkip(nn.Module):
    """Super-resolution: a skip over all blocks is the one step; a second head is added to nothing."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(Plain(), Plain(), nn.Conv2d(8, 8, 3, padding=1))
        self.tail, self.other = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        x = self.head(x)
        res = self.body(x)
        res += x
        return F.pixel_shuffle(self.tail(res), 2), [self.other(res)]

    def expected(self, x):
        x0 = self.head(x)
        r = self.body[2](x0 + self.body[0].branch(x0) + self.body[1].branch(x0 + self.body[0].branch(x0)))
        x1 = x0 + r
        return (F.pixel_shuffle(self.tail(x1), 2), [self.other(x1)]), [("", x0, x1)]


class ThreeInputs(nn.Module):
    """An image, a vector that scales the branch's channels, and times."""

    def __init__(self):
        super().__init__()
        self.stem, self.of_vector, self.of_time = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 8), nn.Linear(1, 8)
        self.one, self.two, self.head = convolutions(), convolutions(), nn.Linear(8, 5)

    def forward(self, image, vector, time):
        scale, shift = self.of_vector(vector)[:, :, None, None], self.of_time(time[:, None])[:, :, None, None]
        x = self.stem(image) + shift
        x = x + scale * self.one(x)
        x = x + self.two(x + shift)
        return self.head(x.mean((2, 3)))

    def expected(self, image, vector, time):
        scale, shift = self.of_vector(vector)[..., None, None], self.of_time(time.view(-1, 1))[..., None, None]
        a = self.stem(image) + shift
        b = a + self.one(a) * scale
        c = b + self.two(b + shift)
        return self.head(c.mean((2, 3))), [("", a, b), ("", b, c)]


class Twins(nn.Module):
    """Two inputs through the same blocks; each call of a block is a step."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), Plain(), nn.Linear(16, 5)

    def forward(self, left, right):
        left, right = [self.block(self.stem(x)).mean((2, 3)) for x in (left, right)]
        return self.head(torch.cat([left, right], 1))

    def expected(self, left, right):
        steps, means = [], []
        for x in (left, right):
            x0 = self.stem(x)
            x1 = x0 + self.block.branch(x0)
            steps.append(("block", x0, x1))
            means.append(x1.mean((2, 3)))
        return self.head(torch.cat(means, 1)), steps


class Unet(nn.Module):
    """Concatenates over the whole, and adds within its blocks, some of which project."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.bottom = nn.Conv2d(3, 8, 3, padding=1), Plain(), Plain()
        self.down, self.up, self.right = nn.Conv2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 2, 2), convolutions(16, 8)
        self.shortcut, self.out = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skip = self.left(self.stem(x))
        x = torch.cat([self.up(self.bottom(self.down(skip))), skip], 1)
        return self.out(self.right(x) + self.shortcut(x))

    def expected(self, x):
        a = self.stem(x)
        b = a + self.left.branch(a)
        c = self.down(b)
        d = c + self.bottom.branch(c)
        e = torch.cat((self.up(d), b), 1)
        f = self.shortcut(e)
        g = f + self.right(e)
        return self.out(g), [("left", a, b), ("bottom", c, d), ("", f, g)]


class Frames(nn.Module):
    """Frames of a video folded into the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, padding=1), Plain(), nn.Linear(8, 5)

    def forward(self, video):
        x = self.block(self.stem(video.flatten(0, 1)))
        return self.head(x.mean((2, 3)).unflatten(0, video.shape[:2]).mean(1))

    def expected(self, video):
        x0 = self.stem(video.flatten(0, 1))
        x1 = x0 + self.block.branch(x0)
        return self.head(x1.mean((2, 3)).view(*video.shape[:2], 8).mean(1)), [("block", x0, x1)]


class FlatList(nn.Module):
    """Pairs of layers in a list, added where they are called; the last pair shares its MLP with the first."""

    def __init__(self):
        super().__init__()
        shared = mlp()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.layers = nn.ModuleList(nn.ModuleList([mlp(), shared]) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for one, two in self.layers:
            x = one(x) + x
            x = two(x) + x
        return self.head(x[:, 0])

    def expected(self, x):
        x, steps = self.embed(x), []
        for layer in (self.layers[0][0], self.layers[0][1], self.layers[1][0], self.layers[0][1]):
            steps.append(("", x, x + layer(x)))
            x = steps[-1][2]
        return self.head(x[:, 0]), steps
