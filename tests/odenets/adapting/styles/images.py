"""Blocks of images: ways to add, shortcuts of all kinds, and what stands beside additions."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.odenets.adapting.styles.skeleton import Residual, convolutions


# -- ways to add ------------------------------------------------------------------------------------------------------
class BranchFirst(Residual):
    def forward(self, x):
        return torch.add(self.branch(x), x)


class InPlaceOnTheState(Residual):
    def forward(self, x):
        x += self.branch(x)
        return x


class InPlaceOnTheBranch(Residual):
    def forward(self, x):
        r = self.branch(x)
        r += x
        return r


class Method(Residual):
    def forward(self, x):
        return x.add_(self.branch(x))


class OfASum(Residual):
    def forward(self, x):
        return sum([x, self.branch(x)])


class OfAStack(Residual):
    def forward(self, x):
        return torch.stack([x, self.branch(x)]).sum(0)


class AnAdditionThatIsAModule(Residual):
    """As models are written that are to be quantized."""

    def __init__(self):
        super().__init__()
        self.skip_add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        return self.skip_add.add(x, self.branch(x))


class Wrapped(Residual):
    """``Residual(fn)``, as many repositories have it."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm2d(8), weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.SiLU())

    def forward(self, x, **kwargs):
        return self.branch(x, **kwargs) + x


class OfACopy(Residual):
    def forward(self, x):
        identity = x.clone()
        for layer in self.branch:
            x = layer(x)
        x = x.contiguous()
        x += identity
        return x


class LinearBranch(Residual):
    """A conditional position encoding."""

    def __init__(self):
        super().__init__(nn.Conv2d(8, 8, 3, padding=1, groups=8))

    def forward(self, x):
        return x + self.branch(x)


class Minus(Residual):
    def forward(self, x):
        return x - self.branch(x)

    def by_hand(self, x):
        x1 = x - self.branch(x)
        return x1, [(x, x1)]


# -- scaled branches --------------------------------------------------------------------------------------------------
class Alpha(Residual):
    def forward(self, x):
        return torch.add(x, self.branch(x), alpha=0.1)

    def by_hand(self, x):
        x1 = x + 0.1 * self.branch(x)
        return x1, [(x, x1)]


class Scaled(Alpha):
    def forward(self, x):
        return x + 0.1 * self.branch(x)


class Halved(Residual):
    """The sum is divided after the step, by a constant, which is no activation."""

    def forward(self, x):
        return (x + self.branch(x)) / math.sqrt(2)

    def by_hand(self, x):
        x1 = x + self.branch(x)
        return x1 / math.sqrt(2), [(x, x1)]


class ReZero(Residual):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.alpha * self.branch(x)

    def by_hand(self, x):
        x1 = x + self.branch(x) * self.alpha
        return x1, [(x, x1)]


class LayerScale(Residual):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x):
        return torch.addcmul(x, self.gamma[:, None, None], self.branch(x))

    def by_hand(self, x):
        x1 = x + self.branch(x) * self.gamma.view(1, 8, 1, 1)
        return x1, [(x, x1)]


class Gated(Residual):
    """A gate of the state itself."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        g = torch.sigmoid(self.gate(x))
        return x + g * self.branch(x)

    def by_hand(self, x):
        x1 = x + torch.sigmoid(self.gate(x)) * self.branch(x)
        return x1, [(x, x1)]


class Dropped(Residual):
    """Stochastic depth by a mask."""

    def forward(self, x):
        r = self.branch(x)
        if self.training:
            r = r * torch.empty(len(r), 1, 1, 1).bernoulli_(0.5) / 0.5
        return x + r

    def by_hand(self, x):
        scale = torch.empty(len(x), 1, 1, 1).bernoulli_(0.5) * 2 if self.training else 1
        x1 = x + scale * self.branch(x)
        return x1, [(x, x1)]


class Skipped(Residual):
    """Stochastic depth by an ``if``: in training the step is not always taken."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + self.branch(x)

    def by_hand(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x, []
        return super().by_hand(x)


class Shaken(Residual):
    """Two branches of random weights in training."""

    def __init__(self):
        super().__init__()
        self.other = convolutions()

    def forward(self, x):
        a = torch.rand(len(x), 1, 1, 1) if self.training else 0.5
        return x + a * self.branch(x) + (1 - a) * self.other(x)

    def by_hand(self, x):
        a = torch.rand(len(x), 1, 1, 1) if self.training else 0.5
        x1 = x + a * self.branch(x) + (1 - a) * self.other(x)
        return x1, [(x, x1)]


# -- activations ------------------------------------------------------------------------------------------------------
class ReluOfTheSum(Residual):
    def forward(self, x):
        return F.relu(x + self.branch(x))

    def by_hand(self, x):
        x1 = (x + self.branch(x)).clamp(min=0)
        return x1, [(x, x1)]


class PReluOfTheSum(Residual):
    def __init__(self):
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x):
        out = self.branch(x)
        out += x
        return self.act(out)

    def by_hand(self, x):
        total = x + self.branch(x)
        x1 = torch.where(total > 0, total, self.act.weight * total)
        return x1, [(x, x1)]


class TheSumIsReadTwice(Residual):
    """By a gate and by what it gates: no activation of the sum is the state after the step."""

    def forward(self, x):
        total = x + self.branch(x)
        return total * torch.sigmoid(total)

    def by_hand(self, x):
        x1 = x + self.branch(x)
        return x1 * x1.sigmoid(), [(x, x1)]


class NormOfTheSum(Residual):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.norm(x + self.branch(x)))

    def by_hand(self, x):
        x1 = x + self.branch(x)
        return self.norm(x1).clamp(min=0), [(x, x1)]


class InputChangedInPlace(nn.Module):
    """What is added is the state after the first activation, for this works in place."""

    def __init__(self):
        super().__init__()
        self.act, self.conv, self.norm = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.norm(self.conv(self.act(x)))

    def by_hand(self, x):
        x0 = x.relu()
        x1 = x0 + self.norm(self.conv(x0))
        return x1, [(x0, x1)]


# -- shortcuts --------------------------------------------------------------------------------------------------------
class PreActivation(nn.Module):
    """A shortcut module only where the shape changes."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        if stride != 1 or i != o:
            self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        kept = self.shortcut(y) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + kept

    def by_hand(self, x):
        y = self.bn1(x).relu()
        x0 = self._modules["shortcut"](y) if "shortcut" in self._modules else x
        x1 = x0 + self.conv2(self.bn2(self.conv1(y)).relu())
        return x1, [(x0, x1)]


class OptionA(nn.Module):
    """Every other pixel, and channels of zeros."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))

    def forward(self, x):
        return F.relu(self.branch(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))

    def by_hand(self, x):
        x0 = torch.zeros(len(x), 16, *self.branch(x).shape[2:], dtype=x.dtype)
        x0[:, 4:12] = x[..., ::2, ::2]
        x1 = (x0 + self.branch(x)).relu()
        return x1, [(x0, x1)]


class Pyramid(nn.Module):
    """Means of 2 x 2 pixels, and channels of zeros by a concatenation."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))

    def forward(self, x):
        out, shortcut = self.branch(x), F.avg_pool2d(x, 2)
        zeros = torch.zeros(len(out), out.shape[1] - shortcut.shape[1], *out.shape[2:], dtype=out.dtype)
        return out + torch.cat((shortcut, zeros), 1)

    def by_hand(self, x):
        x0 = F.pad(x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)), (0, 0, 0, 0, 0, 8))
        x1 = x0 + self.branch(x)
        return x1, [(x0, x1)]


class ResNetD(nn.Module):
    """A shortcut of three layers, and none but the empty Sequential where the shape stays."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        changes = [nn.AvgPool2d(2), nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o)]
        self.skip, self.relu = nn.Sequential(*changes * (stride > 1)), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.skip(x)
        return self.relu(out)

    def by_hand(self, x):
        r = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        x0 = x
        for layer in self.skip:
            x0 = layer(x0)
        x1 = (x0 + r).relu()
        return x1, [(x0, x1)]
