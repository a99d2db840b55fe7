"""Modules: the parts of a network, each with a head of its own, so that each can be trained by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.flow import Flow
from odenets.measures import Measure
from odenets.modes import evaluating, inputs_for, keeping_state
from odenets.module_wise.heads import HEADS, Head, head_for, like
from odenets.module_wise.partition import At, blocks_of, cut
from odenets.module_wise.splitting import balanced, even
from odenets.network import Network
from odenets.recording import Records
from odenets.training.data import Batches
from odenets.training.objectives import logits_and_labels

__all__ = ["LocalLoss", "LocalModule", "ModuleWise", "module_wise"]

LocalLoss = Callable[[int, int, Tensor, Tensor], nn.Module]
"""Makes what a module minimizes besides, from its number, how many there are, its state and the images: a layer called
with ``(state, images, labels)`` that returns a scalar."""


class LocalModule(nn.Module):
    """Consecutive blocks with a head: ``F_k`` on ``T_k``.

    Attributes:
        part: the blocks, with ``record``.
        head: maps the state after them to logits.
        local_loss: a term of its loss besides, with weights of its own, or None.
    """

    def __init__(self, part: nn.Module, head: nn.Module, local_loss: nn.Module | None = None) -> None:
        super().__init__()
        self.part, self.head, self.local_loss = part, head, local_loss

    @property
    def depth(self) -> int:
        """Steps of its blocks."""
        return cast(int, self.part.depth)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and state for the state before."""
        state = self.part(x)
        return self.head(state), state

    def record(self, x: Tensor, /, **measures: Measure) -> tuple[Tensor, Records]:
        """The logits, and per measure ``(blocks, B)``."""
        output, _, records = self.look(x, measures)
        return output, records

    def look(self, x: Tensor, measures: dict[str, Measure]) -> tuple[Tensor, Tensor, Records]:
        """Logits, state and records."""
        state, records = cast(Network, self.part).record(x, **measures)
        return self.head(state), state, records


class ModuleWise(nn.Module):
    """K modules one after another; :func:`split_into_modules` makes it from a network, whose weights it shares.

    Attributes:
        parts: the modules.
        ends: after how many blocks of the network each ends.
    """

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

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Logits after ``depth`` modules, the last if not given, ``(B, classes)``.

        Raises:
            ValueError: no such depth.
        """
        depth = self.K if depth is None else depth
        if not 1 <= depth <= self.K:
            raise ValueError(f"depth must be between 1 and the number of modules, {self.K}, got {depth}")
        *before, last = self.modules_in_order[:depth]
        for module in before:
            x = module.part(x)
        return last(x)[0]

    def record(self, x: Tensor, /, **measures: Measure) -> tuple[Tensor, Records]:
        """Logits after the last module, and per measure ``(blocks, B)``; ``records.starts`` are the modules' rows."""
        parts = []
        for module in self.modules_in_order:
            x, records = cast(Network, module.part).record(x, **measures)
            parts.append((records, module.depth))
        return self.modules_in_order[-1].head(x), Records.join(parts)

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """Logits after each module, one after the other, in one pass."""
        for module in self.modules_in_order:
            output, x = module(x)
            yield output

    def run_all(self, x: Tensor) -> None:
        """Call every module and head once, so that :func:`odenets.recalibrate` sets the statistics of all."""
        for _ in self.outputs(x):
            pass

    @torch.no_grad()
    def predict(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Labels after ``depth`` modules, ``(B,)``, in eval mode: an early exit, which the later modules cost nothing.

        Raises:
            ValueError: no such depth.
        """
        with keeping_state(self), evaluating(self):
            return self(inputs_for(self, x), depth).argmax(1)

    @torch.no_grad()
    def accuracies(self, batches: Batches) -> list[float]:
        """Accuracy after each module, in eval mode, on the samples as they are, neither cropped nor mirrored.

        Raises:
            TypeError, ValueError: a head does not return logits.
        """
        data, right = batches.data, []
        with keeping_state(self), evaluating(self):
            for x, y in batches.in_order():
                x = inputs_for(self, x)
                logits = (logits_and_labels(output, y.to(x.device)) for output in self.outputs(x))
                right.append(torch.stack([(output.argmax(1) == y).sum() for output, y in logits]))
        return [n / len(data) for n in torch.stack(right).sum(0).tolist()]

    def best(self, validation: Batches) -> int:
        """The depth of the most accurate module, the first of equals."""
        found = self.accuracies(validation)
        return found.index(max(found)) + 1

    def extra_repr(self) -> str:
        return f"K={self.K}, ends={list(self.ends)}"


def split_into_modules(
    network: Flow | Network | AdaptedModel,
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
    >>> [output.shape for output in modules.outputs(torch.rand(5, 1, 8, 8))]
    [torch.Size([5, 10]), torch.Size([5, 10])]
    """
    if not isinstance(network, Flow | Network | AdaptedModel):
        raise TypeError(f"network must be a Flow, a Network or an adapted model, got {type(network).__name__}")
    if not isinstance(x, Tensor) or len(x) < 2:
        raise ValueError("x must be a batch of at least two inputs, which batch norms need")
    if balance not in ("blocks", "memory") or last_head not in ("own", "auxiliary"):
        raise ValueError(
            "balance must be 'blocks' or 'memory' and last_head 'own' or 'auxiliary', "
            f"got {balance!r} and {last_head!r}"
        )
    x = inputs_for(network, x)
    with torch.no_grad(), keeping_state(network), evaluating(network):
        output = network(x)  # a flow without a field makes it here
    ends = _ends(network, split, balance, x, at)
    parts, own = cut(network, ends, at)
    keeps = last_head == "own" and not isinstance(network, Flow)
    if classes is None:
        classes = _classes(network, output)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) != len(parts) - keeps:
        but = " but the last, which keeps the network's" if keeps else ""
        raise ValueError(f"head must hold one for each module{but}: {len(parts) - keeps}, got {len(head)}")
    modules, state = [], x
    for k, part in enumerate(parts):
        with torch.no_grad(), keeping_state(part), evaluating(part):
            state = part(state)
        with x.device:  # where new layers are made
            made = own if keeps and k == len(parts) - 1 else _head(head, k, state, classes)
            extra = None if local_loss is None else like(local_loss(k, len(parts), state, x), state)
        _check_head(made, state, classes, k)
        modules.append(LocalModule(part, made, extra))
    result = ModuleWise(modules, ends)
    for module in set(result.modules()) - set(network.modules()) - set(_given(head)):
        module.training = network.training
    return result


def _classes(network: Flow | Network | AdaptedModel, output: Any) -> int:
    """Number of classes of the network's own output."""
    if isinstance(network, Flow) or not isinstance(output, Tensor) or output.ndim != 2:
        got = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
        raise ValueError(f"classes must be given: the network's output {got}")
    return int(output.shape[1])


def _given(head: object) -> Iterator[nn.Module]:
    """The modules that heads consist of which are not made here."""
    if isinstance(head, nn.Module):
        yield from head.modules()
    elif isinstance(head, Sequence) and not isinstance(head, str):
        for one in head:
            yield from _given(one)


def _ends(
    network: Flow | Network | AdaptedModel, split: int | Sequence[int], balance: str, x: Tensor, at: At
) -> list[int]:
    blocks = blocks_of(network)
    if isinstance(split, int):
        return even(blocks, split) if balance == "blocks" else balanced(network, split, x, at)
    ends = list(split)
    return ends if ends and ends[-1] == blocks else [*ends, blocks]


def _head(head: str | Head | nn.Module | Sequence[nn.Module], k: int, state: Tensor, classes: int) -> nn.Module:
    if isinstance(head, nn.Module):
        return head
    if isinstance(head, Sequence) and not isinstance(head, str):
        return head[k]
    if callable(head):
        return like(head(state, classes), state)
    if head == "auto":
        return head_for(state, classes)
    if head not in HEADS:
        raise ValueError(f"head must be 'auto', {', '.join(map(repr, HEADS))}, a module or a function, got {head!r}")
    return HEADS[head](state, classes)


def _check_head(head: nn.Module, state: Tensor, classes: int, k: int) -> None:
    try:
        with torch.no_grad(), keeping_state(head), evaluating(head):
            output = head(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the head of module {k + 1} does not fit states {tuple(state.shape)} of {state.dtype}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the head of module {k + 1} must return logits, a tensor {(len(state), classes)}, got "
            f"{type(output).__name__}"
        )
    if output.shape != (len(state), classes):
        raise ValueError(
            f"the head of module {k + 1} must return {(len(state), classes)} for states {tuple(state.shape)}, got "
            f"{tuple(output.shape)}"
        )
