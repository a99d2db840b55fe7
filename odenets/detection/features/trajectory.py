"""What a detector sees of an input: numbers read off its trajectory through the network (eq. 34)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Self, cast

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.adapting import AdaptedModel
from odenets.detection.isolation import keeping_random_states, to_network
from odenets.flow import Flow
from odenets.measures import Measure, interior
from odenets.modes import device_of, evaluating
from odenets.network import Network
from solvers import Step
from solvers.reductions import mean_square, mean_square_and_cosine

__all__ = ["KINDS", "Features", "Recording", "Trajectory", "check_images", "flows_of", "in_batches"]

Recording = Network | Flow | AdaptedModel
"""What has ``record``."""

KINDS = ("residue", "cosine", "embedding", "action", "stages", "error")


class Features:
    """What makes features of images; those that need statistics of training images take them in :meth:`fit`."""

    def fit(self, network: Recording, x: Tensor, y: Tensor) -> Self:
        """Take statistics of the images ``(N, C, H, W)`` that the network was trained on, with their labels.

        Nothing is taken by features that need none.
        """
        return self

    def __call__(self, network: Recording, x: Tensor) -> Tensor:
        """Features of a batch, ``(B, F)``, float32 or wider; gradients pass where the features are differentiable."""
        raise NotImplementedError

    def look(self, network: Recording, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output and the features of a batch, in one pass where that can be."""
        return network(to_network(network, x)), self(network, x)


class Trajectory(Features):
    """Features of the path that an input takes, per block: of eq. 34 unless told otherwise.

    - "residue" and "cosine": the mean square of the residue ``<r^2>`` and its cosine with the vector of ones, first all
      mean squares and then all cosines: the features of the thesis.
    - "embedding": the same two of the state after the block instead.
    - "action": the kinetic action of the block.
    - "stages": the same two of each stage of a Runge-Kutta block.
    - "error": root mean square of the embedded error.

    Args:
        kinds: of :data:`KINDS`.
        vectors: cosines with so many further fixed vectors, orthogonal to the ones and to each other: the cosines
            ``cos(pi k (j + 1/2) / d)`` over the features j of a state, k = 1, 2, ...

    Raises:
        ValueError: an unknown kind, none, or a negative number of vectors.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=3)
    >>> x = torch.rand(5, 1, 8, 8)
    >>> Trajectory()(network, x).shape, Trajectory("stages", "error")(network, x).shape
    (torch.Size([5, 6]), torch.Size([5, 21]))
    """

    def __init__(self, *kinds: str, vectors: int = 0) -> None:
        kinds = kinds or ("residue", "cosine")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
        if vectors < 0:
            raise ValueError(f"vectors must not be negative, got {vectors}")
        self.kinds, self.vectors = kinds, vectors

    def measures(self, network: Recording) -> dict[str, Measure]:
        """What the network is to record.

        Raises:
            ValueError: stages of a method that has one.
        """
        stages = min((flow.tableau.interior for flow in flows_of(network)), default=1)
        if "stages" in self.kinds and stages == 1:
            raise ValueError("kinds must not hold 'stages' where a block has one: it is the residue")
        found: dict[str, Measure] = {}
        for kind in self.kinds:
            found |= {
                "residue": {"residue": measures.residue},
                "cosine": {"cosine": measures.cosine},
                "embedding": {"embedding": _state_square, "embedding cosine": _state_cosine},
                "action": {"action": measures.action},
                "stages": {
                    f"stage {i + 1}{what}": interior(partial(measure, i))
                    for what, measure in (("", _stage_square), (" cosine", _stage_cosine))
                    for i in range(stages)
                },
                "error": {"error": measures.error},
            }[kind]
        return found | {f"cosine {k}": interior(partial(_wave_cosine, k)) for k in range(1, self.vectors + 1)}

    def __call__(self, network: Recording, x: Tensor) -> Tensor:
        """Features of a batch, ``(B, F)``, float32 or wider: of each measure all blocks, one measure after the other.

        Raises:
            TypeError: the network does not record its steps.
            ValueError: its steps have no such measures.
        """
        return self.look(network, x)[1]

    def look(self, network: Recording, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's output and the features of a batch, in one pass.

        Raises:
            TypeError, ValueError: as above.
        """
        if not isinstance(network, Recording):
            raise TypeError(f"network must record its steps, got {type(network).__name__}: pass odenets.adapt(network)")
        output, records = network.record(to_network(network, x), **self.measures(network))
        return output, torch.cat([values.T for values in records.values()], 1)

    def names(self, network: Recording, depth: int | None = None) -> list[str]:
        """Of the features, in their order; blocks count from 1."""
        return [f"{name} {m + 1}" for name in self.measures(network) for m in range(depth or network.depth)]

    def __repr__(self) -> str:
        more = f", vectors={self.vectors}" if self.vectors else ""
        return f"Trajectory({', '.join(map(repr, self.kinds))}{more})"


@torch.no_grad()
def in_batches(call: Callable[[Tensor], Tensor], network: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """``call`` of all inputs, a batch at a time, in eval mode and on the network's device, ``(N, ...)`` on the CPU.

    Args:
        call: function of a batch.
        network: the modes of its modules are restored, and so are the random states, from which it may draw.
        x: inputs, ``(N, ...)``.
        batch_size: of a batch.

    Raises:
        ValueError: no inputs, or batch_size below 1.
    """
    if len(x) == 0 or batch_size < 1:
        raise ValueError(f"x must hold inputs and batch_size be at least 1, got {len(x)} and {batch_size}")
    device = device_of(network, x.device)
    with evaluating(network), keeping_random_states(device):
        return torch.cat([call(part.to(device)).cpu() for part in x.split(batch_size)])


def check_images(x: Tensor, name: str = "images") -> Tensor:
    """Images ``(N, C, H, W)``, pixels in [0, 1].

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        remedy = ": divide bytes by 255" if kind == torch.uint8 else ""
        raise TypeError(f"{name} must be a floating tensor (N, C, H, W) of pixels in [0, 1], got {kind}{remedy}")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"{name} must be a batch (N, C, H, W), not empty, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must have pixels in [0, 1], got [{low:.3g}, {high:.3g}]: normalize inside the network "
            "(models.Normalize), and divide what is in [0, 255] by 255"
        )
    return x


def flows_of(network: Recording) -> Iterable[Flow]:
    """The flows of a network; none of an adapted one."""
    if isinstance(network, Flow):
        return [network]
    return network.flows if isinstance(network, Network) else []


@interior
def _state_square(step: Step) -> Tensor:
    return mean_square(step.x1)


@interior
def _state_cosine(step: Step) -> Tensor:
    return mean_square_and_cosine(step.x1)[1]


def _stage_square(i: int, step: Step) -> Tensor:
    return mean_square(step.stages[i])


def _stage_cosine(i: int, step: Step) -> Tensor:
    return mean_square_and_cosine(step.stages[i])[1]


def _wave_cosine(k: int, step: Step) -> Tensor:
    """Cosine of the residue with the k-th wave."""
    r = step.residue.flatten(1)
    r = r.to(torch.promote_types(r.dtype, torch.float32))
    wave = _wave(k, r.shape[1]).to(r)
    norm = torch.where(moved := r.square().sum(1) > 0, r.square().sum(1), 1).sqrt()
    return torch.where(moved, (r @ wave) / norm, 0)


@lru_cache(maxsize=64)
def _wave(k: int, size: int) -> Tensor:
    """``cos(pi k (j + 1/2) / d)`` of unit length, orthogonal to the ones and to the waves of other k (DCT-II)."""
    with torch.inference_mode(False):  # kept: gradients may be asked for later
        wave = torch.cos(math.pi * k / size * (torch.arange(size, dtype=torch.float64) + 0.5))
        return cast(Tensor, wave / wave.norm())
