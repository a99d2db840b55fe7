"""Where the states of a network pass: one specification for each of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from odenets.adapting.program.places import Place
from odenets.flow import Flow
from odenets.network import Chain
from odenets.neural_ode import NeuralODE

__all__ = ["BlockSpec", "Samples", "flow_spec", "records_itself"]


@dataclass(frozen=True)
class Samples:
    """How the samples lie in a state.

    Attributes:
        axis: the axis along which they lie.
        rows: how many rows of the state each sample of the example has there, as the frames of a video or the tokens of
            a text; where it is more than one, other inputs may have other numbers of them.
        apart: whether the rows of a sample lie a whole batch apart, and not one after another.

    >>> import torch
    >>> Samples(axis=1)(torch.zeros(7, 2, 3), 2).shape
    torch.Size([2, 7, 3])
    """

    axis: int = 0
    rows: int = 1
    apart: bool = False

    def fits(self, rows: int, samples: int) -> bool:
        """Whether so many ``rows`` along the axis can be those of so many ``samples``."""
        return rows == samples if self.rows == 1 else rows % samples == 0

    def __call__(self, state: Tensor, samples: int) -> Tensor:
        """A ``state`` as ``(samples, *S)``; itself where it is that."""
        if self.axis:
            state = state.movedim(self.axis, 0)
        if self.rows == 1:
            return state
        if self.apart:
            return state.reshape(-1, samples, *state.shape[1:]).transpose(0, 1)
        return state.reshape(samples, -1, *state.shape[1:])


@dataclass(frozen=True)
class BlockSpec:
    """Where the states of one step pass.

    Attributes:
        name: the name of the step, "layer1.0" or "blocks.0 mlp".
        block: the dotted name of the block of which it is a step; the two steps of a transformer's block have one.
        kind: the kind of block.
        start: where x0 passes; None where the step begins as the one before it ends.
        ends: where x1 passes, at the first of these that comes.
        projection: the name of the module whose output is x0, where that is a projection; "" for one in no module.
        branch: where what the block adds before its last activation passes, or None.
        samples: how the samples lie in its states.
        recorder: whether it is a module that records its own steps, several of them.

    >>> from torch import nn
    >>> from odenets.adapting import find_blocks
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> find_blocks(model, ["0"])[0].ends
    (Place(of='0', side='output', path=()),)
    """

    name: str
    block: str
    kind: str
    start: Place | None
    ends: tuple[Place, ...]
    projection: str | None = None
    branch: Place | None = None
    samples: Samples = Samples()
    recorder: bool = False


def records_itself(module: nn.Module) -> bool:
    """Whether a ``module`` is a flow, a neural ODE or a network of them, whose steps are its own.

    >>> import odenets
    >>> records_itself(odenets.Flow()), records_itself(nn.Linear(2, 2))
    (True, False)
    """
    return isinstance(module, Flow | NeuralODE | Chain)


def flow_spec(name: str) -> BlockSpec:
    """The specification of a module that records its own steps, by its dotted ``name``.

    >>> flow_spec("encoder.flow").kind
    'flow'
    """
    shown = name.replace("._orig_mod", "")  # what torch.compile wraps
    start, end = Place(name, "input", (0,)), Place(name, "output")
    return BlockSpec(shown, name, "flow", start, (end,), recorder=True)
