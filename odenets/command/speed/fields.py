"""Three fields, small, wide, convolutional, and their bare calls."""

import torch
from torch import Tensor, nn

__all__ = ["FIELDS", "Field", "calls", "make"]

FIELDS = ("a: MLP 2-64-2, batch 256", "b: MLP 64-128-64, batch 256", "c: conv 32 x 14 x 14, batch 32")


class Field(nn.Module):
    """A network of the state alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Velocity at ``x``."""
        return self.network(x)


def make(name: str, device: str | torch.device = "cpu") -> tuple[Field, Tensor]:
    """A field, with the seed's weights, and a first state."""
    torch.manual_seed(0)
    if name == FIELDS[0]:
        network, shape = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2)), (256, 2)
    elif name == FIELDS[1]:
        network, shape = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), (256, 64)
    else:
        layers = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)
        network, shape = nn.Sequential(*layers), (32, 32, 14, 14)
    return Field(network).to(device), torch.randn(shape, device=device)


def calls(field: Field, x: Tensor, n: int) -> Tensor:
    """The floor: n field calls, each on the last one's velocity."""
    for _ in range(n):
        x = field(0.0, x)
    return x
