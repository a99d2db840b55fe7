"""Modules: the parts of a network, each with a head of its own, so that each can be trained by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.flow import Flow
from odenets.measures import StepFunction
from odenets.modes import evaluating, inputs_for, keeping_state
from odenets.module_wise.heads import Head, check_head, like, make_head, modules_of
from odenets.module_wise.partition import At, Cuttable, Part, balanced, blocks_of, cut, even
from odenets.recording import Joined, Records
from odenets.training.data import Batches
from odenets.training.objectives import logits_and_labels
from solvers import Step

__all__ = ["LocalLoss", "LocalModule", "ModuleWise", "split_into_modules"]

LocalLoss = Callable[[int, int, Tensor, Tensor], nn.Module]
"""Makes what a module minimizes besides, from its number, how many there are, its state and the images: a layer called
with ``(state, images, labels)`` that returns a scalar."""


class LocalModule(Joined):
    """Consecutive blocks with a head: ``F_k`` on ``T_k``. Records and steps are those of its blocks.

    Attributes:
        part: the blocks.
        head: maps the state after them to logits.
        local_loss: a term of its loss besides, with weights of its own, or None.
    """

    part: Part | AdaptedModel

    def __init__(self, part: Part | AdaptedModel, head: nn.Module, local_loss: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.head, self.local_loss = part, head, local_loss

    @property
    def recorders(self) -> list[Part | AdaptedModel]:
        return [self.part]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and state for the state before."""
        state = self.part(x)
        return self.head(state), state

    def forward_with_records(self, x: Tensor, measures: dict[str, StepFunction]) -> tuple[Tensor, Tensor, Records]:
        """Logits and state, and per measure ``(blocks, B)``."""
        state, records = self.part.record(x, **measures)
        return self.head(state), state, records

    def record(self, x: Tensor, /, **measures: StepFunction) -> tuple[Tensor, Records]:
        """The logits, and per measure ``(blocks, B)``."""
        logits, _, records = self.forward_with_records(x, measures)
        return logits, records

    def steps(self, x: Tensor, *, closing: bool = True) -> Iterable[Step]:
        """Every step for the state before."""
        return self.part.steps(x, closing=closing)


class ModuleWise(Joined):
    """K modules one after another; :func:`split_into_modules` makes it from a network, whose weights it shares.

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
    def module_names(self) -> list[str]:
        """Of the modules, as records name them, from 1 on."""
        return [f"module {k}" for k in range(1, self.K + 1)]

    @property
    def recorders(self) -> list[LocalModule]:
        return self.modules_in_order

    def forward(self, x: Tensor, module: int | None = None) -> Tensor:
        """Logits after a module, from 1 on, the last if not given, ``(B, classes)``; those behind it are not called.

        Raises:
            ValueError: no such module.
        """
        module = self.K if module is None else module
        if not 1 <= module <= self.K:
            raise ValueError(f"module must be between 1 and the number of modules, {self.K}, got {module}")
        *before, last = self.modules_in_order[:module]
        for local in before:
            x = local.part(x)
        return last(x)[0]

    def record(self, x: Tensor, /, **measures: StepFunction) -> tuple[Tensor, Records]:
        """Logits after the last module, and per measure ``(blocks, B)``; ``records.starts`` are the modules' rows,
        and ``records.blocks`` name the module before its block.
        """
        parts = []
        for module in self.modules_in_order:
            x, records = module.part.record(x, **measures)
            parts.append((records, module.depth))
        return self.modules_in_order[-1].head(x), Records.join(parts, self.module_names)

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Logits after each module, one after the other, in one pass."""
        for module in self.modules_in_order:
            logits, x = module(x)
            yield logits

    def run_all(self, x: Tensor) -> None:
        """Call every module and head once, so that :func:`odenets.recalibrate` sets the statistics of all."""
        for _ in self.outputs(x):
            pass

    @torch.no_grad()
    def predict(self, x: Tensor, module: int | None = None) -> Tensor:
        """Labels after a module, ``(B,)``, in eval mode: an early exit, which the later modules cost nothing.

        Raises:
            ValueError: no such module.
        """
        with keeping_state(self), evaluating(self):
            return self(inputs_for(self, x), module).argmax(1)

    @torch.no_grad()
    def accuracies(self, batches: Batches) -> list[float]:
        """Accuracy after each module, in eval mode, on the samples as they are, neither cropped nor mirrored.

        Raises:
            TypeError, ValueError: a head does not return logits.
        """
        right = []
        with keeping_state(self), evaluating(self):
            for x, y in batches.in_order():
                x = inputs_for(self, x)
                pairs = (logits_and_labels(logits, y.to(x.device)) for logits in self.outputs(x))
                right.append(torch.stack([(logits.argmax(1) == y).sum() for logits, y in pairs]))
        return [n / len(batches.data) for n in torch.stack(right).sum(0).tolist()]

    def best(self, validation: Batches) -> int:
        """The number of the most accurate module, from 1 on, the first of equals."""
        accuracies = self.accuracies(validation)
        return accuracies.index(max(accuracies)) + 1

    def extra_repr(self) -> str:
        return f"K={self.K}, ends={list(self.ends)}"


def split_into_modules(
    network: Cuttable,
    split: int | Sequence[int],
    x: Tensor,
    *,
    classes: int | None = None,
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
        x: a batch of inputs, of two samples or more, by which shapes are found.
        classes: number of classes; that of the network's own output if not given.
        balance: what is shared out equally among K modules: "blocks", or the "memory" that their backward passes need,
            measured on ``x``.
        at: "end", a transition belongs to the module after it, or "start", to the one before.
        head: "conv", "token" or "linear"; "auto" by the shape of the state; a function of a state and the number of
            classes; one layer for all modules ("same classifier"); or a list of one for each, but for a last that keeps
            the network's.
        last_head: whether the last module keeps the network's own head or has an auxiliary one like the others.
        local_loss: makes what each module minimizes besides.

    Raises:
        TypeError, ValueError: as :func:`~odenets.module_wise.partition.cut` and the heads raise, K out of range, a head
            that does not return ``(B, classes)``, or more or fewer heads than modules that need one.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> modules = split_into_modules(network, 2, torch.rand(2, 1, 8, 8))
    >>> [logits.shape for logits in modules.outputs(torch.rand(5, 1, 8, 8))]
    [torch.Size([5, 10]), torch.Size([5, 10])]
    """
    blocks = blocks_of(network)
    if not isinstance(x, Tensor) or len(x) < 2:
        raise ValueError("x must be a batch of at least two inputs, which batch norms need")
    if balance not in ("blocks", "memory") or last_head not in ("own", "auxiliary"):
        raise ValueError(
            "balance must be 'blocks' or 'memory' and last_head 'own' or 'auxiliary', "
            f"got {balance!r} and {last_head!r}"
        )
    x, has_head = inputs_for(network, x), not isinstance(network, Flow)
    with torch.no_grad(), keeping_state(network), evaluating(network):
        output = network(x)  # a flow without a field makes it here
    if isinstance(split, int):
        ends = even(blocks, split) if balance == "blocks" else balanced(network, split, x, at)
    else:
        ends = [*split] if split and split[-1] == blocks else [*split, blocks]
    parts, own = cut(network, ends, at)
    keeps = last_head == "own" and has_head
    if classes is None:
        classes = _classes(output, has_head)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) != len(parts) - keeps:
        but = " but the last, which keeps the network's" if keeps else ""
        raise ValueError(f"head must hold one for each module{but}: {len(parts) - keeps}, got {len(head)}")
    modules, state = [], x
    for k, part in enumerate(parts):
        with torch.no_grad(), keeping_state(part), evaluating(part):
            state = part(state)
        with x.device:  # where new layers are made
            layer = own if keeps and k == len(parts) - 1 else make_head(head, k, state, classes)
            extra = None if local_loss is None else like(local_loss(k, len(parts), state, x), state)
        check_head(layer, state, classes, k)
        modules.append(LocalModule(part, layer, extra))
    result = ModuleWise(modules, ends)
    for module in set(result.modules()) - set(network.modules()) - set(modules_of(head)):
        module.training = network.training
    return result


def _classes(output: Any, has_head: bool) -> int:
    """Number of classes of the network's own output."""
    if not has_head or not isinstance(output, Tensor) or output.ndim != 2:
        got = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
        raise ValueError(f"classes must be given: the network's output {got}")
    return int(output.shape[1])
