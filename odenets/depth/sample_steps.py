"""A step size per sample: in a trained network each sample takes long steps where its error allows it.

A sample that stands before block m takes one step with the weights of that block whose size is the sum of those of k
blocks, and goes on behind block m + k; k is chosen by the error of the sample's own steps, as a solver chooses a step
size. With ``k = 1`` everywhere that is the network itself. Steps never cross the end of a flow, so that the total time
of every sample is that of the network.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from odenets.depth.samples_apart import check_evaluating, check_not_exported
from odenets.depth.walking import NORMS, Control, ErrorEstimate, FlowWalk, Norm, PredictionChange
from odenets.errors import check_count, check_number
from odenets.flow import Flow
from odenets.inputs import arguments, inputs_of
from odenets.measures import StepFunction
from odenets.modes import evaluating, inputs_for
from odenets.network import Network
from odenets.recording import Records, named_measures
from odenets.regrouping import OTHERS
from solvers.controllers import I, SampleController
from solvers.validation import check_state

__all__ = ["SampleSteps", "Walk"]


class Walk(NamedTuple):
    """What :meth:`SampleSteps.walk` finds.

    >>> import odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver="bs23", depth=8).eval()
    >>> walk = SampleSteps(flow, tolerance=1e-3).walk(torch.randn(5, 2))
    >>> walk.output.shape, walk.evaluations.shape, walk.taken.sum(0).tolist()
    (torch.Size([5, 2]), torch.Size([5]), [8, 8, 8, 8, 8])

    Attributes:
        output: of the network, ``(B, ...)``.
        evaluations: field evaluations of each sample, those of rejected steps too, ``(B,)``.
        taken: the number of blocks that the step from each block spans, 0 where a sample takes none, ``(blocks, B)``.
        rejected: attempts from each block that were rejected, ``(blocks, B)``.
        records: measures of the steps, ``(blocks, B)`` by name, 0 where a sample takes none.
    """

    output: Tensor
    evaluations: Tensor
    taken: Tensor
    rejected: Tensor
    records: Records


class SampleSteps(nn.Module):
    """A trained network in which every sample takes steps of its own size, for inference.

    Samples that stand before one block and try the same number of blocks are computed together, and the outcome of each
    is that of the sample alone, to rounding. A rejected step keeps its first stage. Steps of one block are taken
    whatever their error, and so a tolerance of 0 is the network itself.

    Batch norms and dropout must be in eval mode; statistics stay those of the full depth, which states of longer steps
    need not have. Gradients pass through the steps that are taken, not through the choice of their sizes. The tolerance
    is part of the ``state_dict``, and of a file of weights.

    Args:
        network: a network, or a flow, of discrete blocks; shared, not copied.
        tolerance: largest error of a step of several blocks; infinite takes steps as long as the controller lets grow.
        norm: of the error over the features: "rms", the root mean square; "raw", the 2-norm; "relative", the root mean
            square over that of the state; "prediction", of a classifier, how much the error changes the probabilities
            that the network without its further blocks finds behind the step, half the sum over the classes, from 0 to
            1: two calls of the head for every step, which are no evaluations; or a function of the error and the state
            behind the step, both ``(B, *S)``, to ``(B,)``.
        error: "next": the velocity at the end of a step is the first stage of the step that follows, with the weights
            of the block there, or of the last one at the end of a flow, so that an accepted step elsewhere evaluates
            nothing for it; of a method whose last stage that is, as bs23's, its embedded error, and
            ``h / 2 (p_next - p_first)`` of any other. "preceding": ``h / 2 (p_first - p_preceding)`` of the first
            stages of a step and of the one before it, which chooses the size before the step is taken, so that none is
            rejected. "embedded": that of the stages of the step alone, which all have the weights of one block; or the
            name of an embedded output of the method, with which the solution is compared, such as "midpoint" for bs23,
            which needs no closing stage. Euler's method has the first two; two steps beside one of the double size,
            which would cost it an evaluation more, are not offered.
        controller: chooses sizes, in units of time, by errors; of these the largest number of blocks that is not longer
            is tried, one at least.
        first: blocks of a sample's first step, or attempt.
        aligned: steps over 1, 2, 4, ... blocks alone, from blocks whose number is a multiple of it, as the block time
            steps of many-body codes: those at which a network trained by :class:`ElasticDepth` has been. A larger
            ``first`` lets them begin.

    Attributes:
        evaluations: of each sample in the last pass, ``(B,)``, rejected steps counted; None before the first.

    Raises:
        TypeError: no network of flows, a neural ODE in it, or a controller that serves no samples.
        ValueError: a tolerance below 0, an unknown norm or error, a first step that no flow has, a network that reads
            out an ensemble.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="bs23", depth=8, total_time=1.0).eval()
    >>> x = torch.rand(5, 1, 8, 8)
    >>> quick = SampleSteps(network, tolerance=1.0)
    >>> quick(x).shape, bool((quick.evaluations < network.evaluations).all())
    (torch.Size([5, 10]), True)

    >>> torch.allclose(SampleSteps(network, tolerance=0.0)(x), network(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        network: Network | Flow,
        tolerance: float,
        *,
        norm: str | Norm = "rms",
        error: str = "next",
        controller: SampleController | None = None,
        first: int = 1,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        flows = _flows(network)
        if not callable(norm) and norm not in (*NORMS, "prediction"):
            names = ", ".join(map(repr, (*NORMS, "prediction")))
            raise ValueError(f"norm must be one of {names} or a function, got {norm!r}")
        if norm == "prediction" and isinstance(network, Flow):
            raise ValueError("norm 'prediction' needs a network with a head, got a flow")
        check_count("first", first, 1)
        if first > (longest := max(flow.depth for flow in flows)):
            raise ValueError(f"first must be at most {longest}, the blocks of the longest flow, got {first}")
        if aligned and first & (first - 1):
            raise ValueError(f"first must be 1, 2, 4, ... blocks for aligned steps, got {first}")
        controller = I() if controller is None else controller
        if not isinstance(controller, SampleController):
            raise TypeError(f"controller must have a method each, for many samples at once, got {controller!r:.80}")
        self.estimates = [ErrorEstimate.of(flow.tableau, error) for flow in flows]
        self.network, self.norm, self.error = network, norm, error
        self.controller, self.first, self.aligned = controller, first, aligned
        self.tolerance = tolerance
        self.training = network.training
        self.evaluations: Tensor | None = None

    @property
    def tolerance(self) -> float:
        """Largest error of a step of several blocks."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, value: float) -> None:
        value = float(check_number("tolerance", value))
        if not value >= 0:
            raise ValueError(f"tolerance must not be negative, got {value}")
        self._tolerance = value

    @property
    def depth(self) -> int:
        """Number of blocks of all flows, the rows of :attr:`Walk.taken`."""
        return self.network.depth

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """The output for inputs ``x``, ``(B, ...)``; ``evaluations`` are then those of this pass.

        The velocity fields take ``args`` besides, as in :meth:`walk`.

        Raises:
            TypeError, ValueError: as there.
        """
        return self.walk(x, *args).output

    def walk(self, x: Tensor, *args: Any, **measures: StepFunction) -> Walk:
        """The output, and what every sample did on the way.

        Args:
            x: inputs, ``(B, ...)``.
            args: what the velocity fields take besides; of tensors with a row for each sample those of the samples.
            measures: functions ``Step -> (B,)`` by name, of the steps that are taken; their closing stages count.

        Returns:
            The walk.

        Raises:
            TypeError, ValueError: x is no batch of inputs, or a batch norm or a dropout is in training mode.
            RuntimeError: in an export, for which :meth:`Network.at_depth` makes a network of fewer steps.
        """
        return self._walk(x, args, None, measures)

    def follow(self, x: Tensor, taken: Tensor, *args: Any) -> Walk:
        """The output where every sample takes steps as told, such as those of another sample.

        Args:
            x: inputs, ``(B, ...)``.
            taken: the number of blocks of the step from each block, as of :class:`Walk`, ``(blocks, B)``; what stands
                where no step begins is not read.
            args: as in :meth:`walk`.

        Returns:
            The walk, whose evaluations are those of the steps alone.

        Raises:
            TypeError, ValueError: as :meth:`walk`; steps of no block, or beyond the end of a flow.
        """
        if not isinstance(taken, Tensor) or taken.is_floating_point() or taken.shape != (self.depth, len(x)):
            shape = tuple(taken.shape) if isinstance(taken, Tensor) else type(taken).__name__
            raise ValueError(f"taken must hold whole numbers, shape {(self.depth, len(x))}, got {shape}")
        return self._walk(x, args, taken.cpu().numpy(), {})

    def calibrate(self, batches: Iterable[Any], evaluations: float, *, rounds: int = 24) -> float:
        """Take the tolerance at which a sample needs so many evaluations at most in the mean, by bisection.

        That holds of these inputs; others may need more or less in the mean.

        Args:
            batches: a validation set, batches of inputs ``(B, ...)`` or of pairs ``(inputs, labels)``, whose labels are
                not read. What the fields take besides is in a pair, ``((x, c), labels)``.
            evaluations: the mean number over the samples that is allowed.
            rounds: passes over the inputs.

        Returns:
            The tolerance, which the module has from then on.

        Raises:
            ValueError: no batch, fewer evaluations than steps without any tolerance take, or more than all blocks take.
        """
        wanted = check_number("evaluations", evaluations)
        inputs = [arguments(inputs_for(self.network, one)) for one in inputs_of(batches, "batches")]
        full = self._mean_evaluations(inputs, 0.0)
        if wanted > max(full, self.network.evaluations):
            raise ValueError(f"evaluations must be at most {full:.4g}, what all blocks take, got {wanted}")
        if full <= wanted:
            self.tolerance = 0.0
            return 0.0
        if (least := self._mean_evaluations(inputs, math.inf)) > wanted:
            raise ValueError(
                f"evaluations must be at least {least:.4g}, what samples take without a tolerance, got {wanted}: "
                f"all blocks take {full:.4g}; a larger first= begins with longer steps"
            )
        low, high, exponent = -math.inf, math.inf, -2.0  # of the tolerance, as powers of ten
        for _ in range(rounds):
            if self._mean_evaluations(inputs, 10.0**exponent) <= wanted:
                high = exponent
            else:
                low = exponent
            exponent = (low + high) / 2 if math.isfinite(low + high) else exponent + (1 if high == math.inf else -1)
        self.tolerance = 10.0**high
        return self.tolerance

    @torch.no_grad()
    def _mean_evaluations(self, inputs: Sequence[tuple[Any, ...]], tolerance: float) -> float:
        before, self.tolerance = self.tolerance, tolerance
        try:
            with evaluating(self):
                counts = torch.cat([self.walk(*one).evaluations for one in inputs])
        finally:
            self.tolerance = before
        return counts.double().mean().item()

    def _walk(
        self, x: Tensor, args: tuple[Any, ...], told: np.ndarray | None, measures: dict[str, StepFunction]
    ) -> Walk:
        check_not_exported("SampleSteps", "network.at_depth(blocks) has fewer steps for all samples")
        measures, network = named_measures(measures), self.network
        check_evaluating(network, "before one block")
        if isinstance(network, Flow):
            check_state(x)
        state = network.encode(x) if isinstance(network, Network) else x
        control = Control(len(state), self.controller, self.tolerance, NORMS["rms"])
        walks: list[FlowWalk] = []
        for layer in network.layers if isinstance(network, Network) else [network]:
            if not isinstance(layer, Flow):
                state = layer(state)
                continue
            walk = FlowWalk(layer, state, args, measures)
            if told is None:
                control.norm = self._norm_behind(len(walks))
                if not walks:
                    control.size[:] = math.fsum(layer.h[: self.first if self.tolerance else 1])
                walk.by_error(control, self.estimates[len(walks)], self.aligned)
            else:
                start = sum(len(each.taken) for each in walks)
                walk.follow(_checked(told[start : start + layer.depth], start))
            walks.append(walk)
            state = walk.x
        output = network.head(state) if isinstance(network, Network) else state
        self.evaluations = torch.from_numpy(sum(walk.evaluations for walk in walks)).to(state.device)
        taken, rejected = (
            torch.from_numpy(np.concatenate([getattr(walk, name) for walk in walks])).to(state.device)
            for name in ("taken", "rejected")
        )
        values = {name: torch.cat([walk.measured[name] for walk in walks]) for name in measures}
        starts = np.cumsum([0, *(len(walk.taken) for walk in walks[:-1])]).tolist()
        return Walk(output, self.evaluations, taken, rejected, Records(values, starts, network.names))

    def _norm_behind(self, flow: int) -> Norm:
        """The norm of errors in a flow, by its number."""
        if not isinstance(self.norm, str):
            return self.norm
        if self.norm != "prediction":
            return NORMS[self.norm]
        network = self.network
        assert isinstance(network, Network)  # which has a head
        return PredictionChange([*list(network.transitions)[flow:], network.head])

    def get_extra_state(self) -> Tensor:
        """The tolerance and what it is of, as a checksum, so that they travel with ``state_dict``."""
        return torch.tensor([self.tolerance, zlib.crc32(self._measured.encode())], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the tolerance of a ``state_dict``, the ``state`` that :meth:`get_extra_state` returns.

        Raises:
            ValueError: it is of another norm or error, or of other runs of blocks.
        """
        tolerance, measured = state.tolist()
        if measured != zlib.crc32(self._measured.encode()):
            raise ValueError(
                f"norm, error, first and aligned must be those of the saved tolerance {tolerance:g}, got "
                f"{self._measured}"
            )
        self.tolerance = tolerance

    def extra_repr(self) -> str:
        """The tolerance and what it is of, as ``print`` shows them."""
        return f"tolerance={self.tolerance:g}, {self._measured}"

    @property
    def _measured(self) -> str:
        """What the tolerance is of."""
        norm = self.norm if isinstance(self.norm, str) else getattr(self.norm, "__qualname__", type(self.norm).__name__)
        return f"norm={norm}, error={self.error}, first={self.first}" + ", aligned" * self.aligned


def _flows(network: Any) -> list[Flow]:
    """The flows of a network.

    Raises:
        TypeError: it is none of flows.
        ValueError: it reads out an ensemble.
    """
    if not isinstance(network, Network | Flow):
        raise TypeError(f"network must be an odenets.Network or a Flow, got {type(network).__name__}: {OTHERS}")
    flows = [network] if isinstance(network, Flow) else network.flows
    for i, flow in enumerate(flows):
        if not isinstance(flow, Flow):
            raise TypeError(
                f"flow {i} is a {type(flow).__name__}, which has no blocks: NeuralODE(field, control='sample') has "
                "steps for each sample"
            )
    if isinstance(network, Network) and network.readout != "solution":
        raise ValueError(f"network must read out 'solution', got {network.readout!r}")
    return flows


def _checked(taken: np.ndarray, start: int) -> np.ndarray:
    """The steps of a flow whose first block has this number, which end where it ends."""
    at = np.zeros(taken.shape[1], dtype=np.int64)
    for m, row in enumerate(taken):
        here = at == m
        if wrong := sorted({*row[here & ((row < 1) | (m + row > len(taken)))].tolist()}):
            raise ValueError(
                f"taken must hold from 1 to {len(taken) - m} blocks for steps from block {start + m}, got {wrong[0]}"
            )
        at[here] = m + row[here]
    return taken
