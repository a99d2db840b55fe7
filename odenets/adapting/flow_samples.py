"""Measures of the samples of a model on the steps of a flow in it, whose states may hold them in another way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from odenets.adapting.blocks import BlockSpec, Samples
from odenets.adapting.tokens import Tokens
from odenets.measures import StepFunction, integrand_of, needs_closing
from odenets.measures.marking import Measure, measure
from odenets.recording import check_values
from solvers import Step

__all__ = ["SampleMeasure"]


class SampleMeasure:
    """A measure of the samples, or tokens, of a model on the steps of a flow.

    Where a state of the flow is that of a sample, and nothing is padded, it is the measure itself. Otherwise it takes
    the states of each sample out of those of the flow, and keeps its values, for the flow records numbers of its own.

    Args:
        name: of the measure.
        function: the measure.
        block: the flow.
        samples: how many samples the model is given; None where that is not known.
        tokens: which tokens are measured.
    """

    def __init__(
        self, name: str, function: StepFunction, block: BlockSpec, samples: int | None, tokens: Tokens | None
    ) -> None:
        self.name, self.function, self.block, self.tokens = name, function, block, tokens
        self.samples = samples
        self.values: list[Tensor] = []

    @property
    def itself(self) -> bool:
        """Whether it is the measure itself."""
        return self.tokens is None and self.block.samples == Samples()

    def measure(self) -> StepFunction:
        """What the flow records. It asks for no reductions, for which states may be rounded in another way."""
        if self.itself and isinstance(self.function, Measure):
            return replace(self.function, reductions=frozenset())
        if self.itself:
            return self.function
        marked = measure(closing=needs_closing(self.function))(self._of_step)
        try:
            integrand = integrand_of(self.name, self.function)
        except ValueError:
            return marked

        def of_velocity(v: Tensor) -> Tensor:
            values = self._joined([integrand(part) for part in self._split(v)])
            if len(values) != len(v):
                raise ValueError(
                    f"flow {self.block.name!r} integrates measures beside its {len(v)} states, of which {len(values)} "
                    "rows are to be measured: take gradient='direct' without an event"
                )
            return values

        assert isinstance(marked, Measure)
        return replace(marked, integrand=of_velocity)

    def values_of(self, recorded: Tensor) -> Tensor:
        """The rows, ``(steps, B)``, where the flow has ``recorded`` its own.

        Raises:
            ValueError: they are not of the samples of the model.
        """
        values = torch.stack(self.values) if self.values else recorded
        if self.tokens is None and self.samples is not None and values.shape[1] != self.samples:
            raise ValueError(
                f"flow {self.block.name!r} has {values.shape[1]} states for {self.samples} samples: let it move the "
                "states of a sample as one, (B, ...), or name the blocks without it"
            )
        return values

    def _of_step(self, step: Step) -> Tensor:
        if isinstance(step.h, Tensor) and step.h.ndim:
            raise ValueError(
                f"flow {self.block.name!r} has steps of each state, which are not those of samples or tokens: take "
                "control='batch'"
            )
        x0, x1, stages = self._split(step.x0), self._split(step.x1), [self._split(p) for p in step.stages]
        values = []
        for i in range(len(x0)):
            part = Step(step.t, step.h, x0[i], x1[i], tuple([p[i] for p in stages]), step.tableau)
            values.append(check_values(self.name, self.function(part), part.x0))
        self.values.append(self._joined(values))
        return step.x1.real.new_zeros(len(step.x1))

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        x = self.block.samples(x, self.samples or len(x))
        return [x] if self.tokens is None else [part for part, *_ in self.tokens.split(self.block.name, x, x, None)]

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        return values[0] if self.tokens is None else self.tokens.join(values)
