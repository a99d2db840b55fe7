"""Features of the path that an input takes through a network [K24, eq. 34]."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets import measures
from odenets.detection.features.base import Features
from odenets.detection.isolation import to_network
from odenets.errors import check_count
from odenets.inputs import call
from odenets.measures import StepFunction, measure
from odenets.recording import Recorder, is_recorder
from solvers import Step
from solvers.reductions import mean_square, mean_square_and_cosine

__all__ = ["KINDS", "Trajectory"]

KINDS = ("residue", "cosine", "embedding", "action", "stages", "error")


class Trajectory(Features):
    """Features of each block of the path that an input takes; by default those of [K24, equation 34].

    - "residue" and "cosine": the mean square of the residue ``<r^2>`` and its cosine with the vector of ones, first all
      mean squares and then all cosines: the features of [K24].
    - "embedding": the same two of the state after the block instead.
    - "action": the kinetic action of the block.
    - "stages": the same two of each stage of a Runge-Kutta block.
    - "error": root mean square of the embedded error.

    Args:
        kinds: of the above; "residue" and "cosine" if none is given.
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
        check_count("vectors", vectors, 0)
        self.kinds, self.vectors = kinds, vectors

    def measures(self, network: nn.Module) -> dict[str, StepFunction]:
        """What the ``network`` records, by name.

        Raises:
            ValueError: stages of a method that has one.
        """
        stages = _stages(network)
        if "stages" in self.kinds and stages == 1:
            raise ValueError("kinds must not hold 'stages' where a block has one: it is the residue")
        by_kind: dict[str, dict[str, StepFunction]] = {
            "residue": {"residue": measures.residue},
            "cosine": {"cosine": measures.cosine},
            "embedding": {"embedding": _square, "embedding cosine": _cosine},
            "action": {"action": measures.action},
            "stages": {
                f"stage {i + 1}{name}": one.bind(stage=i)
                for name, one in (("", _square), (" cosine", _cosine))
                for i in range(stages)
            },
            "error": {"error": measures.error},
        }
        waves = {f"cosine {k}": _wave_cosine.bind(k=k) for k in range(1, self.vectors + 1)}
        return {name: measure for kind in self.kinds for name, measure in by_kind[kind].items()} | waves

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """Features of a batch ``x`` by a ``network``, ``(B, F)``, float32 or wider.

        x is a tensor, or a mapping of what the network takes by keyword, such as token ids and their mask.
        Of each measure all blocks, one measure after the other.

        Raises:
            TypeError: the network does not record its steps.
            ValueError: its steps have no such measures.
        """
        return self.output_and_features(network, x)[1]

    def output_and_features(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the ``network`` and the features of a batch ``x``, in one pass.

        Raises:
            TypeError: the network does not record its steps.
            ValueError: it records tokens, not samples.
        """
        if not is_recorder(network):
            raise TypeError(f"network must record its steps, got {type(network).__name__}: pass odenets.adapt(network)")
        output, records = call(network.record, to_network(network, x), **self.measures(network))
        if getattr(records, "tokens", None) is not None:  # a recorder of the user's own may return a dictionary
            raise ValueError('features are of samples, and the network records tokens: adapt(model, per="sample")')
        return output, torch.cat([values.T for values in records.values()], 1)

    def names(self, network: nn.Module, depth: int | None = None) -> list[str]:
        """Of the features, in their order; the blocks of the ``network``, ``depth`` of them, count from 1."""
        blocks = range(1, (depth or cast(Recorder, network).depth) + 1)
        return [f"{name} {block}" for name in self.measures(network) for block in blocks]

    def __repr__(self) -> str:
        more = f", vectors={self.vectors}" if self.vectors else ""
        return f"Trajectory({', '.join(map(repr, self.kinds))}{more})"


def _stages(network: nn.Module) -> int:
    """Stages of each block that every block has; 1 where a network has blocks of no Runge-Kutta method."""
    flows: Any = getattr(network, "flows", [network])
    return min((flow.tableau.interior for flow in flows if hasattr(flow, "tableau")), default=1)


@measure(closing=False)
def _square(step: Step, stage: int | None = None) -> Tensor:
    return mean_square(step.x1 if stage is None else step.stages[stage])


@measure(closing=False)
def _cosine(step: Step, stage: int | None = None) -> Tensor:
    return mean_square_and_cosine(step.x1 if stage is None else step.stages[stage])[1]


@measure(closing=False)
def _wave_cosine(step: Step, k: int) -> Tensor:
    """Cosine of the residue with the k-th wave."""
    r = measures.wide_residue(step).flatten(1)
    wave = (_wave if torch.compiler.is_compiling() else _cached_wave)(k, r.shape[1]).to(r)
    square = r.square().sum(1)
    rest = square == 0
    along = (r * wave).sum(1)  # no product of matrices, which autocast narrows
    return torch.where(rest, 0, along) / torch.where(rest, 1, square).sqrt()


@lru_cache(maxsize=64)
def _cached_wave(k: int, size: int) -> Tensor:
    with torch.inference_mode(False):  # it also serves passes with gradients
        return _wave(k, size)


def _wave(k: int, size: int) -> Tensor:
    """``cos(pi k (j + 1/2) / d)`` of unit length, orthogonal to the ones and to the waves of other k (DCT-II)."""
    wave = torch.cos(math.pi * k / size * (torch.arange(size, dtype=torch.float64) + 0.5))
    return cast(Tensor, wave / wave.norm())
