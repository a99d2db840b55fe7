"""Blocks of images: ways to add, to scale what is added, and to go on with the sum."""

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
    """The step ends with the division, an elementwise function of the sum."""

    def forward(self, x):
        return (x + self.branch(x)) / math.sqrt(2)

    def by_hand(self, x):
        x1 = (x + self.branch(x)) / math.sqrt(2)
        return x1, [(x, x1)]


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
    """Stochastic depth by an ``if``: in training the block does not always move the state."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return x + self.branch(x)

    def by_hand(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x, [(x, x)]
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
