"""Early exit: samples leave a network behind the module whose head is sure of them, and the others go on.

:func:`odenets.module_wise.split_into_modules` cuts any network into modules with heads, an adapted model too;
:func:`~odenets.depth.fit_heads` fits heads of a trained network that stays as it is, and :class:`EarlyExit` computes
only the samples that have not left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from odenets.analysis import count_macs
from odenets.depth.exit_heads import Modules, in_order
from odenets.depth.samples_apart import check_evaluating, check_not_exported
from odenets.errors import check_number
from odenets.inputs import has_rows, inputs_of, is_by_keyword, rows
from odenets.modes import evaluating, inputs_for, keeping_state
from odenets.outputs import logits_in
from odenets.training.notes import BatchNotes

__all__ = ["EarlyExit", "Exits"]

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": lambda logits: logits.softmax(1).amax(1),
    "entropy": lambda logits: torch.special.entr(logits.softmax(1)).sum(1).neg(),
}
"""Of logits ``(n, classes)``: how sure they are, ``(n,)``; of the entropy its negative."""


class Exits(NamedTuple):
    """What :class:`EarlyExit` returns.

    Attributes:
        logits: of the head behind which each sample leaves, ``(B, classes)``.
        exit: the number of its module, from 1 on as modules are counted, ``(B,)``: ``costs[exit - 1]`` is its cost.
        cost: of what is computed for it, ``(B,)``.

    >>> exits = Exits(torch.zeros(2, 10), torch.tensor([1, 3]), torch.tensor([2.0, 6.0]))
    >>> exits.cost.mean().item()
    4.0
    """

    logits: Tensor
    exit: Tensor
    cost: Tensor


class EarlyExit(nn.Module):
    """A network in modules, each with a head, which each sample leaves behind the first head that is sure of it.

    A batch goes through module after module; those samples go on that have not left, and behind the last module all
    leave. Batch norms and dropout must be in eval mode. Threshold and costs are part of the ``state_dict``, and so of
    a file of weights.

    Args:
        modules: as :func:`odenets.module_wise.split_into_modules` makes them of a flow, a network or an adapted model,
            with heads that return logits ``(B, classes)``; shared, not copied.
        threshold: of the confidence, at which samples leave; or of the entropy, at most which they leave. By default
            none leaves before the last module.
        by: "confidence", the largest probability, or "entropy", that of the probabilities, in nats.
        costs: of a sample that leaves behind each module, rising; the number of steps up to there if not given. What
            :meth:`macs` counts is one.

    Raises:
        TypeError: what is no such modules, or a threshold that is no number.
        ValueError: an unknown score, a threshold that is NaN, or costs of another number of modules, or that fall.

    >>> import odenets
    >>> from odenets.depth import fit_heads, pooled_head
    >>> from odenets.module_wise import split_into_modules
    >>> network, x = odenets.models.small_network(depth=6).eval(), torch.rand(20, 1, 8, 8)
    >>> modules = split_into_modules(network, 3, x, head=pooled_head)
    >>> fit_heads(modules, [(x, torch.arange(20) % 10)])
    2
    >>> early = EarlyExit(modules, threshold=0.2)
    >>> logits, exit, cost = early(x)
    >>> logits.shape, sorted(set(cost.tolist()) | {2.0, 4.0, 6.0})
    (torch.Size([20, 10]), [2.0, 4.0, 6.0])
    """

    def __init__(
        self, modules: Modules, threshold: float | None = None, *, by: str = "confidence",
        costs: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.parts = in_order(modules)
        if by not in SCORES:
            raise ValueError(f"by must be {' or '.join(map(repr, SCORES))}, got {by!r}")
        self.network, self.by = cast(nn.Module, modules), by
        self.training = self.network.training
        self.threshold = threshold
        self.costs = costs

    @property
    def threshold(self) -> float:
        """The confidence from which, or the entropy up to which, samples leave."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        value = (-math.inf if self.by == "entropy" else math.inf) if value is None else check_number("threshold", value)
        if math.isnan(value):
            raise ValueError("threshold must be a number, got NaN")
        if self.by == "confidence" and 1 < value < math.inf:
            raise ValueError(f"threshold must be a confidence, at most 1, or infinity, where none leaves, got {value}")
        self._threshold = float(value)

    @property
    def costs(self) -> tuple[float, ...]:
        """Of a sample that leaves behind each module."""
        if self._costs is not None:
            return self._costs
        depths = [part.depth for part in self.parts]
        return tuple(float(sum(depths[: k + 1])) for k in range(len(depths)))

    @costs.setter
    def costs(self, values: Sequence[float] | None) -> None:
        costs = None if values is None else tuple(float(check_number("costs", value)) for value in values)
        if costs is not None and len(costs) != len(self.parts):
            raise ValueError(f"costs must hold one for each of {len(self.parts)} modules, got {len(costs)}")
        if costs is not None and list(costs) != sorted(costs):
            raise ValueError(f"costs must not fall from module to module, got {costs}")
        self._costs = costs

    def forward(self, x: Any, *args: Any) -> Exits:
        """The logits, where each sample leaves, and what it costs.

        Args:
            x: inputs ``(B, ...)``, or a mapping of an adapted model's inputs by keyword.
            args: what the modules take besides; of tensors with a row for each sample those of the samples are taken.

        Returns:
            The exits.

        Raises:
            ValueError: a batch norm or a dropout is in training mode, heads that return no logits, or states whose
                first dimension is not that of the samples.
            RuntimeError: in an export.
        """
        check_not_exported("EarlyExit", "export its parts, each a module with its head, and compare their outputs")
        check_evaluating(self.network, "behind one module")
        if is_by_keyword(x):
            x, *args = self._arguments(x)  # type: ignore[assignment]  # a list
        samples = len(x)
        state, left = x, torch.arange(samples, device=x.device)
        exits = torch.full((samples,), len(self.parts), device=x.device)
        logits: Tensor | None = None
        for k, part in enumerate(self.parts, 1):
            output, state = part(state, *args)
            found = _logits(output, k, len(left))
            logits = found.new_empty(samples, found.shape[1]) if logits is None else logits
            if logits.shape[1] != found.shape[1]:
                raise ValueError(f"heads must return as many logits each, got {logits.shape[1]} and {found.shape[1]}")
            leaves = self._is_sure(found) if k < len(self.parts) else torch.ones_like(left, dtype=torch.bool)
            logits = logits.index_copy(0, left[leaves], found[leaves])
            exits[left[leaves]] = k
            stays = ~leaves
            if not stays.any():
                break
            if not has_rows(state, len(left)):
                raise ValueError(
                    f"states behind module {k} must have a row for each of {len(left)} samples, got "
                    f"{tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__}"
                )
            args = tuple(rows([*args], stays, len(left)))
            state, left = state[stays], left[stays]
        assert logits is not None  # there is a module
        costs = torch.tensor(self.costs, device=x.device)
        return Exits(logits, exits, costs[exits - 1])

    def _arguments(self, inputs: Any) -> tuple[Any, ...]:
        return cast(Any, self.network).arguments(inputs)

    def _is_sure(self, logits: Tensor) -> Tensor:
        threshold = -self.threshold if self.by == "entropy" else self.threshold
        return SCORES[self.by](logits) >= threshold

    def calibrate(self, batches: Iterable[Any], cost: float) -> float:
        """Take the threshold at which a sample costs so much at most in the mean.

        That holds of these inputs; others may cost more or less in the mean. At the cost of the last exit none leaves
        before it.

        Args:
            batches: a validation set, batches of inputs, tensors ``(B, ...)`` or mappings, or of pairs
                ``(inputs, labels)``, whose labels are not read. Several inputs are in a pair, ``((x, c), labels)``.
            cost: the mean over the samples that is allowed, in the unit of :attr:`costs`.

        Returns:
            The threshold, which the module has from then on.

        Raises:
            ValueError: no batch, or a cost below that of the first exit, or above that of the last.
            TypeError: a cost that is no number, or one tensor in place of batches.
        """
        cost, costs = check_number("cost", cost), torch.tensor(self.costs, dtype=torch.float64, device="cpu")
        if not costs[0] <= cost <= costs[-1]:
            side = "least that of the first" if cost < costs[0] else "most that of the last"
            raise ValueError(f"cost must be at {side} exit, {costs[0 if cost < costs[0] else -1]:g}, got {cost}")
        found, notes = list[Tensor](), BatchNotes("batches")
        with torch.no_grad(), keeping_state(self), evaluating(self):
            for inputs in inputs_of(batches, "batches"):
                with notes.next(inputs):
                    outputs = _outputs(self.parts, self._arguments(inputs_for(self.network, inputs)))
                    scores = [SCORES[self.by](_logits(output, k, None)) for k, (output, _) in enumerate(outputs, 1)]
                    found.append(torch.stack(scores).cpu().double())
        scores = torch.cat(found, 1)
        scores[-1] = math.inf  # all leave behind the last module
        candidates = torch.cat([scores[:-1].flatten(), scores.new_tensor([math.inf])]).unique()
        low, high = 0, len(candidates)  # costs rise with the threshold: the last candidate that is allowed
        while high - low > 1:
            middle = (low + high) // 2
            if costs[(scores >= candidates[middle]).int().argmax(0)].mean() <= cost + 1e-12 * abs(cost):  # to rounding
                low = middle
            else:
                high = middle
        # between two scores, so that rounding, which depends on the size of a batch, lets the same samples leave
        threshold = (candidates[low] + candidates[low - 1]) / 2 if low else candidates[low] - 1e-6
        self.threshold = float(threshold) * (-1 if self.by == "entropy" else 1)
        return self.threshold

    def macs(self, x: Any) -> tuple[float, ...]:
        """Multiply-accumulate operations for a sample that leaves behind each module, heads up to there included.

        Args:
            x: a batch of inputs, as :meth:`forward` takes it, or a tuple ``(x, *args)``.

        Returns:
            One number per module.
        """
        counts: list[float] = []
        with torch.no_grad(), keeping_state(self), evaluating(self):
            state, *args = self._arguments(inputs_for(self.network, x))
            samples = len(state)
            for part in self.parts:
                counts.append(sum(counts[-1:]) + count_macs(part, (state, *args)) / samples)
                state = part(state, *args)[1]
        return tuple(counts)

    def get_extra_state(self) -> Tensor:
        """The score, the threshold, and the costs if they are given, so that they travel with ``state_dict``."""
        values = [[*SCORES].index(self.by), self.threshold, *(self._costs or ())]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take threshold and costs of a ``state_dict``, the ``state`` that :meth:`get_extra_state` returns.

        Raises:
            ValueError: they are of another score, or of another number of modules.
        """
        score, threshold, *costs = state.tolist()
        if (by := [*SCORES][int(score)]) != self.by:
            raise ValueError(f"by must be that of the saved threshold, {by!r}, got {self.by!r}")
        self.threshold, self.costs = threshold, costs or None

    def extra_repr(self) -> str:
        """When samples leave, as ``print`` shows it."""
        return f"by={self.by}, threshold={self.threshold:g}, exits={len(self.parts)}"


def _outputs(parts: Sequence[Any], inputs: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    state, *args = inputs
    for part in parts:
        output, state = part(state, *args)
        yield output, state


def _logits(output: Any, k: int, samples: int | None) -> Tensor:
    """The logits of a head's output."""
    found = logits_in(output)
    if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] < 2 or len(found) != (samples or len(found)):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the head of module {k} must return logits (B, classes), got {got}")
    return found
