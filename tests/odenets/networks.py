"""What many tests build networks of."""

from torch import nn


class Unit(nn.Module):
    """A residual block whose parts have names of their own."""

    def __init__(self, channels, wider):
        super().__init__()
        self.widen = nn.Conv2d(channels, wider, 1) if wider != channels else None
        self.way = nn.Conv2d(channels, wider, 3, padding=1)

    def forward(self, x):
        return (x if self.widen is None else self.widen(x)) + self.way(x)


class Calling(nn.Module):
    """A model of these modules whose forward pass is a function of it and of its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


class Velocity(Calling):
    """The same as a velocity field."""

    def forward(self, t, x):
        return self.function(self, t, x)
