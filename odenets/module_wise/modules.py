"""Modules: the parts of a network, each with a head of its own, so that each can be trained by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.adapting.cutting.parts import CutPart
from odenets.flow import Flow
from odenets.inputs import arguments, is_by_keyword
from odenets.measures import StepFunction
from odenets.modes import evaluating, keeping_state
from odenets.module_wise.evaluation import evaluate_modules
from odenets.module_wise.partition import Part, inputs_on
from odenets.outputs import logits_in
from odenets.recording import Joined, Records, record
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.objectives import CrossEntropy, Task
from odenets.training.sources import Collate, Source
from solvers import Step

__all__ = ["LocalLoss", "LocalModule", "ModuleWise"]

LocalLoss = Callable[[int, int, Tensor, Tensor], nn.Module]
"""Makes what a module minimizes besides, from its number, how many there are, its state and the images: a layer called
with ``(state, images, targets)`` that returns a scalar."""


class LocalModule(Joined):
    """Consecutive blocks with a head: ``F_k`` on ``T_k``. Records and steps are those of its blocks.

    :func:`~odenets.module_wise.split_into_modules` makes them.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> first, last = split_into_modules(network, 2, torch.rand(2, 1, 8, 8)).modules_in_order
    >>> logits, state = first(torch.rand(5, 1, 8, 8))
    >>> last(state)[0].shape, first.depth
    (torch.Size([5, 10]), 2)

    Attributes:
        part: the blocks, with what comes before the first of them.
        head: maps the state after them, ``(B, *S)``, to logits ``(B, classes)``, or what else the network returns.
        local_loss: a term of its loss besides, with weights of its own, called with ``(state, images, targets)``; or
            None.
    """

    part: Part | AdaptedModel

    def __init__(self, part: Part | AdaptedModel, head: nn.Module, local_loss: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.head, self.local_loss = part, head, local_loss

    @property
    def recorders(self) -> list[Part | AdaptedModel]:
        """The part, whose steps are recorded."""
        return [self.part]

    def forward(self, x: Tensor, /, *args: Any) -> tuple[Any, Tensor]:
        """The head's output and the state after the blocks, for the state ``x`` before them, ``(B, *S)``.

        ``args`` go to the velocity fields.
        """
        state = self.part(x, *args)
        return self.output(state, args), state

    def output(self, state: Tensor, args: tuple[Any, ...] = ()) -> Any:
        """The head's output for the ``state`` after the blocks; an adapted model's own head may take ``args``."""
        return self.head(state, *args) if getattr(self.head, "conditioned", False) else self.head(state)

    def forward_with_records(
        self, x: Tensor, measures: Mapping[str, StepFunction], args: tuple[Any, ...] = ()
    ) -> tuple[Any, Tensor, Records]:
        """The head's output, the state, and what is recorded.

        Args:
            x: the state before the module, ``(B, *S)``; of the first one the inputs.
            measures: functions ``Step -> (B,)`` by name.
            args: what the velocity fields get besides.

        Returns:
            What the head makes, the state after the blocks, and per measure ``(blocks, B)``.
        """
        state, records = record(self.part, (x, *args), measures)
        return self.output(state, args), state, records

    def record(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[Any, Records]:
        """The head's output for the state ``x`` before, and for each of the ``measures`` ``(blocks, B)``.

        ``args`` go to the velocity fields.
        """
        output, _, records = self.forward_with_records(x, measures, args)
        return output, records

    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> Iterable[Step]:
        """Every step for the state ``x`` before, and ``args`` of the velocity fields; with the ``closing`` stages."""
        return self.part.steps(x, *args, closing=closing)


class ModuleWise(Joined):
    """K modules one after another, each with a head; a classifier after each of them.

    :func:`~odenets.module_wise.split_into_modules` makes it from a network, whose weights it shares, and
    :func:`~odenets.module_wise.fit_modules` trains it.

    Attributes:
        parts: the modules.
        ends: after how many blocks of the network each ends.
        trained_by: what trains it; :func:`odenets.training.fit` would train its last head alone.
    """

    trained_by = "odenets.module_wise.fit_modules"

    def __init__(self, parts: Sequence[LocalModule], ends: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.ends = tuple(ends)

    def __len__(self) -> int:
        """Number of modules."""
        return self.K

    def __iter__(self) -> Iterator[LocalModule]:
        """The modules, first to last."""
        return iter(self.modules_in_order)

    @property
    def K(self) -> int:
        """Number of modules."""
        return len(self.parts)

    @property
    def modules_in_order(self) -> list[LocalModule]:
        """The modules, first to last."""
        return [cast(LocalModule, part) for part in self.parts]

    @property
    def recorders(self) -> list[LocalModule]:
        """The modules, whose steps are recorded."""
        return self.modules_in_order

    @property
    def module_names(self) -> list[str]:
        """Of the modules, as records name them, from 1 on."""
        return [f"module {k}" for k in range(1, self.K + 1)]

    @property
    def flows(self) -> list[Flow]:
        """The flows of all modules, first to last; none where the network is an adapted model."""
        return [flow for module in self.modules_in_order for flow in getattr(module.part, "flows", ())]

    def arguments(self, inputs: Any) -> tuple[Any, ...]:
        """The arguments ``(x, *args)`` for the inputs of a batch: x, that tuple, or a mapping of an adapted model's.

        Args:
            inputs: of a batch, as :meth:`forward` or the adapted model takes them.

        Returns:
            The arguments by position.

        Raises:
            TypeError: a mapping of other inputs than those with which the network was cut.
        """
        part = self.modules_in_order[0].part
        if is_by_keyword(inputs) and isinstance(part, AdaptedModel):
            return cast(CutPart, part.model).inputs.in_order(inputs)
        return arguments(inputs)

    def forward(self, x: Tensor, /, *args: Any, module: int | None = None) -> Any:
        """The output after a module, from 1 on, the last if not given; those behind it are not called.

        Args:
            x: inputs, ``(B, *S)``.
            args: what every module gets besides: velocity fields ``v(t, x, *args)``, or an adapted model.
            module: number of the module, from 1 on.

        Returns:
            What its head makes, such as logits ``(B, classes)``.

        Raises:
            ValueError: no such module.
        """
        module = self.K if module is None else module
        if not 1 <= module <= self.K:
            raise ValueError(f"module must be between 1 and the number of modules, {self.K}, got {module}")
        *before, last = self.modules_in_order[:module]
        for local in before:
            x = local.part(x, *args)
        return last(x, *args)[0]

    def record(self, x: Tensor, /, *args: Any, **measures: StepFunction) -> tuple[Any, Records]:
        """The output after the last module, and what is measured on the steps of all.

        Args:
            x: inputs, ``(B, *S)``.
            args: what the velocity fields of every module get besides.
            measures: functions ``Step -> (B,)`` by name.

        Returns:
            The output, and per measure ``(blocks, B)``, where ``records.starts`` are the modules' first rows, and
            ``records.blocks`` name the module before its block.
        """
        parts = []
        for module in self.modules_in_order:
            x, records = module.part.record(x, *args, **measures)
            parts.append(records)
        return self.modules_in_order[-1].output(x, tuple(args)), Records.join(parts, self.module_names)

    def steps(self, x: Tensor, *args: Any, closing: bool = True) -> Iterator[Step]:
        """Every step of every module for inputs ``x``, and ``args`` of the velocity fields; with ``closing`` stages."""
        parts = [module.part for module in self.modules_in_order]
        if flows := [part for part in parts if isinstance(part, Part)]:
            yield from Part([piece for part in flows for piece in part.layers]).steps(x, *args, closing=closing)
        for part in parts:
            if isinstance(part, AdaptedModel):
                x, steps = part.output_and_steps(x, *args)
                yield from steps

    def outputs(self, x: Tensor, /, *args: Any) -> Iterator[Any]:
        """The output after each module for inputs ``x``, with ``args`` of the fields, one by one, in one pass."""
        for module in self.modules_in_order:
            output, x = module(x, *args)
            yield output

    def run_all(self, x: Tensor, /, *args: Any) -> None:
        """Call every module and head with ``x`` and ``args`` once, so that :func:`odenets.recalibrate` reaches all."""
        for _ in self.outputs(x, *args):
            pass

    @torch.no_grad()
    def predict(self, x: Tensor, /, *args: Any, module: int | None = None) -> Tensor:
        """Labels in eval mode, by any module: an early exit, which the later modules cost nothing.

        Args:
            x: inputs, ``(B, *S)``, taken to the network's device and dtype.
            args: what the velocity fields of every module get besides.
            module: number of the module, from 1 on; the last if not given.

        Returns:
            The most likely classes, ``(B,)`` int64.

        Raises:
            ValueError: no such module.
        """
        with keeping_state(self), evaluating(self):
            return cast(Tensor, logits_in(self(*inputs_on(self, (x, *args)), module=module))).argmax(1)

    def evaluate(
        self, batches: Iterable[Any], *, metric: MetricFunction | None = None, collate: Collate | None = None
    ) -> list[float]:
        """A metric after each module, in eval mode, of :class:`~odenets.training.Batches` on the samples as they are.

        Args:
            batches: any iterable of batches ``(inputs, targets)``.
            metric, collate: as in :func:`odenets.training.evaluate`; the accuracy if not given.

        Returns:
            A number per module.

        Raises:
            TypeError, ValueError: a head does not return logits, where the metric is the accuracy, or a metric that
                returns no number, or batches that are none.
        """
        source = Source.of(batches, collate)
        source.move_to(self)
        nothing = Task(lambda output, y: torch.zeros(()))
        values = evaluate_modules(
            self, source, Metric.of(metric, CrossEntropy()), dict.fromkeys(range(self.K), nothing)
        )
        return [cast(float, values[k].metric) for k in range(self.K)]

    def accuracies(self, batches: Iterable[Any], *, collate: Collate | None = None) -> list[float]:
        """The accuracy after each module, on ``batches`` of which ``collate`` makes pairs, see :meth:`evaluate`."""
        return self.evaluate(batches, collate=collate)

    def best(self, validation: Iterable[Any]) -> int:
        """The number of the module that is most accurate on ``validation`` batches, from 1 on; the first of equals."""
        accuracies = self.accuracies(validation)
        return accuracies.index(max(accuracies)) + 1

    def extra_repr(self) -> str:
        """The number of modules, and where they end."""
        return f"K={self.K}, ends={list(self.ends)}"
