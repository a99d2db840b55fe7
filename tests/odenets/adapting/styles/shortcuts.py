"""Blocks of images with shortcuts that change the shape, by modules and by functions."""

import torch
from torch import nn
from torch.nn import functional as F


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


class Projecting(nn.Module):
    """A shortcut by functions, ``project``, beside the branch."""

    def __init__(self, *branch):
        super().__init__()
        self.branch, self.proj = nn.Sequential(*branch), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.project(x) + self.branch(x)

    def by_hand(self, x):
        x0 = self.projected(x)
        x1 = self.branch(x) + x0
        return x1, [(x0, x1)]


class Generator(Projecting):
    """Of a GAN: twice the side, by interpolation before the 1 x 1 convolution."""

    def __init__(self):
        super().__init__(nn.BatchNorm2d(8), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))

    def project(self, x):
        return self.proj(F.interpolate(x, scale_factor=2, mode="nearest"))

    def projected(self, x):
        return self.proj(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Discriminator(Projecting):
    """Of a GAN: means of the sum's two parts."""

    def __init__(self):
        super().__init__(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2))

    def project(self, x):
        return F.avg_pool2d(self.proj(x), 2)

    def projected(self, x):
        return self.proj(x).unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))


class PooledSkip(Projecting):
    """The largest of 2 x 2 pixels, as in MViT."""

    def __init__(self):
        super().__init__(nn.Conv2d(8, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 8, 1))

    def project(self, x):
        return F.max_pool2d(x, 2)

    def projected(self, x):
        return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))


class DoubledChannels(Projecting):
    """The state beside itself."""

    def __init__(self):
        super().__init__(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 1))

    def project(self, x):
        return torch.cat([x, x], dim=1)

    def projected(self, x):
        return x.repeat(1, 2, 1, 1)


class ChannelsLast(nn.Module):
    """Added where channels stand last, and put back: the state of the step is what is added."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x.permute(0, 3, 1, 2)

    def by_hand(self, x):
        x0 = x.movedim(1, -1)
        x1 = x0 + self.fc2(F.gelu(self.fc1(self.norm(x0))))
        return x1.movedim(-1, 1), [(x0, x1)]
