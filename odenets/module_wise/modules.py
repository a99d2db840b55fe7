"""Modules: the parts of a network, each with a head of its own, so that each can be trained by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.errors import renamed
from odenets.flow import Flow
from odenets.measures import StepFunction
from odenets.modes import evaluating, keeping_state
from odenets.module_wise.evaluation import evaluate_modules
from odenets.module_wise.heads import Head, check_head, like, make_head, modules_of
from odenets.module_wise.partition import At, Cuttable, Part, balanced, blocks_of, cut, even, inputs_on
from odenets.recording import Joined, Records
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.objectives import CrossEntropy, Task
from odenets.training.sources import Collate, Source, arguments
from solvers import Step

__all__ = ["LocalLoss", "LocalModule", "ModuleWise", "split_into_modules"]

LocalLoss = Callable[[int, int, Tensor, Tensor], nn.Module]
"""Makes what a module minimizes besides, from its number, how many there are, its state and the images: a layer called
with ``(state, images, targets)`` that returns a scalar."""


class LocalModule(Joined):
    """Consecutive blocks with a head: ``F_k`` on ``T_k``. Records and steps are those of its blocks.

    :func:`split_into_modules` makes them.

    >>> import odenets
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
        return self.head(state), state

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
        state, records = self.part.record(x, *args, **measures)
        return self.head(state), state, records

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

    :func:`split_into_modules` makes it from a network, whose weights it shares, and :func:`fit_modules` trains it.

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

    def forward(self, x: Tensor, /, *args: Any, module: int | None = None) -> Any:
        """The output after a module, from 1 on, the last if not given; those behind it are not called.

        Args:
            x: inputs, ``(B, *S)``.
            args: what the velocity fields of every module get besides: ``v(t, x, *args)``.
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
        return self.modules_in_order[-1].head(x), Records.join(parts, self.module_names)

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
            return self(*inputs_on(self, (x, *args)), module=module).argmax(1)

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


@renamed(classes="outputs")
def split_into_modules(
    network: Cuttable,
    split: int | Sequence[int],
    x: Any,
    *,
    outputs: int | None = None,
    balance: Literal["blocks", "memory"] = "blocks",
    at: At = "end",
    head: str | Head | nn.Module | Sequence[nn.Module] = "auto",
    last_head: Literal["own", "auxiliary"] = "own",
    local_loss: LocalLoss | None = None,
) -> ModuleWise:
    """A network in K modules, each with a head, to be trained without a gradient that crosses from one to another.

    New layers follow the network: its device, dtype and mode. Shapes are found in eval mode, which leaves it as it was.

    Args:
        network: a flow, a network or an adapted model; its weights are shared, not copied.
        split: the number of modules K, or after how many blocks each ends, rising, the last with or without.
        x: a batch of inputs, of two samples or more, by which shapes are found; or a tuple ``(x, *args)`` with what
            conditions the fields.
        outputs: numbers that a head returns for a sample, the classes of a classifier or the size of a regression's
            targets; as many as the network itself if not given, which a flow needs to be told.
        balance: what is shared out equally among K modules: "blocks", or "memory": the bytes that the blocks keep for
            their backward pass, measured on ``x``, the encoder's and transitions' with them. Weights, gradients, the
            optimizer's state, heads and what a local loss keeps are not weighed.
        at: "end", a transition belongs to the module after it, or "start", to the one before.
        head: "conv", "token" or "linear" (:func:`conv_head` and so on); "auto" by the shape of the state; a function of
            a state and the number of outputs; one layer for all modules ("same classifier"); or a list of one for each,
            but for a last that keeps the network's.
        last_head: whether the last module keeps the network's "own" head or has an "auxiliary" one like the others.
        local_loss: makes what each module minimizes besides, such as :func:`infopro` or :func:`predsim`.

    Returns:
        The network in modules, in the mode of ``network``.

    Raises:
        TypeError, ValueError: as :func:`~odenets.module_wise.partition.cut` and the heads raise, K out of range, a head
            that does not return ``(B, outputs)``, or more or fewer heads than modules that need one.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> modules = split_into_modules(network, 2, torch.rand(2, 1, 8, 8))
    >>> [logits.shape for logits in modules.outputs(torch.rand(5, 1, 8, 8))]
    [torch.Size([5, 10]), torch.Size([5, 10])]
    """
    blocks = blocks_of(network)
    if not isinstance(first := arguments(x)[0], Tensor) or len(first) < 2:
        raise ValueError("x must be a batch of at least two inputs, which batch norms need")
    if isinstance(split, bool | str) or not isinstance(split, Integral | Sequence):
        raise TypeError(f"split must be a number of modules, or a list of their ends, got {split!r}")
    if balance not in ("blocks", "memory") or last_head not in ("own", "auxiliary"):
        words = "balance must be 'blocks' or 'memory' and last_head 'own' or 'auxiliary'"
        raise ValueError(f"{words}, got {balance!r} and {last_head!r}")
    inputs, has_head = inputs_on(network, x), not isinstance(network, Flow)
    images, *args = inputs
    with torch.no_grad(), keeping_state(network), evaluating(network):
        output = network(*inputs)  # a flow without a field makes it here
    if not isinstance(split, Sequence):
        ends = even(blocks, int(split)) if balance == "blocks" else balanced(network, int(split), inputs, at)
    else:
        ends = [*split] if split and split[-1] == blocks else [*split, blocks]
    parts, own = cut(network, ends, at)
    keeps = last_head == "own" and has_head
    if outputs is None:
        outputs = _outputs(output, has_head)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) != len(parts) - keeps:
        but = " but the last, which keeps the network's" if keeps else ""
        raise ValueError(f"head must hold one for each module{but}: {len(parts) - keeps}, got {len(head)}")
    modules, state = [], images
    for k, part in enumerate(parts):
        with torch.no_grad(), keeping_state(part), evaluating(part):
            state = part(state, *args)
        with images.device:  # where new layers are made
            layer = own if keeps and k == len(parts) - 1 else make_head(head, k, state, outputs)
            extra = None if local_loss is None else like(local_loss(k, len(parts), state, images), state)
        check_head(layer, state, outputs, k)
        modules.append(LocalModule(part, layer, extra))
    result = ModuleWise(modules, ends)
    for module in set(result.modules()) - set(network.modules()) - set(modules_of(head)):
        module.training = network.training
    return result


def _outputs(output: Any, has_head: bool) -> int:
    """Numbers that the network itself returns for a sample."""
    if not has_head or not isinstance(output, Tensor) or output.ndim != 2:
        got = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
        raise ValueError(f"outputs must be given: the network's output {got}")
    return int(output.shape[1])
