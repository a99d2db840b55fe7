"""Networks around blocks of one style. Each says by hand what it computes and which steps its author would count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]  # x0 and x1 of each step of a block
Steps = list[tuple[str, Tensor, Tensor]]  # and the module in which it lies


def images(batch: int, size: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, size, size),)


def tokens(batch: int, size: int) -> tuple[Any, ...]:
    return (torch.randn(batch, size, 8),)


@dataclass(frozen=True)
class Style:
    """A network, what it is called with, and what it permits.

    Attributes:
        make: the network, which has ``expected(*inputs)``: its output and steps, computed by hand.
        inputs: of a batch size and a side or length.
        sizes: it takes another side or length than 8.
        steady: passes in training take the steps that passes in eval mode take.
        batch_dim: where samples are counted in its states.
        dtype: of its weights and floating inputs.
    """

    make: Callable[[], Any]
    inputs: Callable[[int, int], tuple[Any, ...]] = images
    sizes: bool = True
    steady: bool = True
    batch_dim: int = 0
    dtype: torch.dtype = torch.float32

    def network(self) -> Any:
        torch.manual_seed(3)
        network = self.make()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim < 2:  # norms, gates, and biases that begin at 0
                    parameter.add_(torch.rand_like(parameter), alpha=0.5)
            for name, buffer in network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer))
        return network if self.dtype == torch.float32 else network.to(self.dtype)

    def batch(self, batch: int = 2, size: int = 8) -> tuple[Any, ...]:
        torch.manual_seed(batch + size)
        inputs = self.inputs(batch, size)
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)

    def of_samples(self, state: Tensor, samples: int) -> Tensor:
        """``(B, *S)``."""
        state = state.movedim(self.batch_dim, 0)
        return state if len(state) == samples else state.unflatten(0, (samples, -1))

    def mean_square(self, x0: Tensor, x1: Tensor, samples: int) -> Tensor:
        return self.of_samples(x1 - x0, samples).square().flatten(1).mean(1)


class Around(nn.Module):
    """A first layer, blocks, and a linear layer on the means of the last state."""

    def __init__(self, first: nn.Module, blocks: Sequence[nn.Module], width: int, over: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.blocks, self.head, self.over = first, nn.ModuleList(blocks), nn.Linear(width, 5), over

    def forward(self, x, *conditions):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *conditions)
        return self.head(x.mean(self.over))

    def expected(self, x, *conditions):
        state, steps = self.first(x), []
        for i, block in enumerate(self.blocks):
            state, pairs = block.by_hand(state, *conditions)
            steps += [(f"blocks.{i}", x0, x1) for x0, x1 in pairs]
        return self.head(state.mean(self.over)), steps


def of_images(*blocks: Callable[[], nn.Module], width: int = 8) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Conv2d(3, 8, 3, padding=1), [make() for make in blocks], width, (2, 3))


def of_tokens(*blocks: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Linear(8, 8), [make() for make in blocks], 8, (1,))


class Residual(nn.Module):
    """A block whose author adds ``branch(x)`` in his own way, and whose state is simply ``x + branch(x)`` after it."""

    def __init__(self, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = convolutions() if branch is None else branch

    def by_hand(self, x, *conditions):
        total = x + self.branch(x)
        return total, [(x, total)]


def convolutions(i: int = 8, o: int = 8, stride: int = 1) -> nn.Sequential:
    """Nothing in it keeps its input for gradients, so that this may be changed in place."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.Conv2d(o, o, 1))


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
