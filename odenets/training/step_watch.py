"""Steps that are noticed: whether an optimizer has stepped since the last loss was taken of a network.

A step is a backward pass of a loss, and after it the step of an optimizer of torch that holds weights of the network.
Torch has a hook for all of them: fused ones count, and one that takes many losses in a step (LBFGS) counts once. Steps
that are written by hand, or of an optimizer of copies, are not seen: there is a warning then.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import getfile
from traceback import walk_stack
from typing import Any
from weakref import WeakSet, WeakValueDictionary, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from odenets.modes import keeping_modes

__all__ = ["StepWatch"]


class StepWatch:
    """Whether an optimizer has stepped, and the batch of the last loss. A copy of it has seen nothing yet."""

    def __init__(self) -> None:
        self._networks: WeakSet[nn.Module] = WeakSet()
        self._passes: Counter[bool] = Counter()
        """Backward passes since the last step, by whether the network was in training mode."""
        self._skipped: list[Tensor | None] = []
        """Of each step of an optimizer since then what says that its kernel has skipped it."""
        self._last: tuple[ref[Tensor], ref[nn.Module], ref[nn.Module], Any, list[bool]] | None = None
        self._still: tuple[ref[Tensor], int, Tensor] | None = None
        self._counted = self._warned = False

    def __reduce__(self) -> tuple[type[StepWatch], tuple[()]]:
        return StepWatch, ()

    def expect(self, loss: Tensor, network: nn.Module, wrapper: nn.Module, batch: Any) -> None:
        """Wait for the backward pass of a loss, with the network in what wraps it.

        Args:
            batch: what :meth:`last` is to return, None where nobody will ask for it.
        """
        if self._last is not None and self._last[0]() is loss:
            return
        _listen()
        if self._passes[True] and network.training and not self._warned:
            self._check_still(network)
        modes = [] if batch is None else [module.training for module in network.modules()]
        self._last = ref(loss), ref(wrapper), ref(network), batch, modes
        self._networks.add(network)
        me, training = ref(self), network.training

        def backward(gradient: Tensor) -> None:
            if (watch := me()) is not None:
                watch._passes[training] += 1
                _WAITING[id(watch)] = watch

        loss.register_hook(backward)

    def stepped(self) -> bool:
        """Whether an optimizer has stepped after the backward pass of a loss.

        Raises:
            RuntimeError: the losses were of a network in eval mode.
        """
        taken = any(skipped is None or not skipped.item() for skipped in self._skipped)
        if taken and not self._passes[True]:
            self.reset()
            raise RuntimeError(
                "the network was trained in eval mode, in which an objective changes nothing: call network.train(), "
                "and then eval() of the parts that are to be frozen"
            )
        if not taken:
            self._skipped.clear()
        return taken

    @contextmanager
    def last(self) -> Iterator[tuple[nn.Module | None, Any]]:
        """The network and the batch of the last loss, for a while in the modes that they had then."""
        _, wrapper, network, batch, modes = self._last or (None, _gone, _gone, None, [])
        outer, inner = wrapper(), network()
        with keeping_modes(*[] if inner is None else [inner]):
            for module, training in zip([] if inner is None else inner.modules(), modes, strict=False):
                module.training = training
            yield inner if outer is None else outer, batch

    def reset(self) -> None:
        """The step is counted, or there is none to count."""
        self._counted |= bool(self._skipped)
        self._passes.clear()
        self._skipped.clear()
        self._networks.clear()
        self._last = self._still = None
        _WAITING.pop(id(self), None)

    def end_of_step(self, stepped: Optimizer, held: set[Tensor]) -> None:
        """Called when an optimizer has stepped that holds these, whatever they are of."""
        for network in self._networks:
            if any(p in held for p in network.parameters()):
                # with losses in eval mode, as of an attack, the step of a network in training mode is another loss'
                if self._passes[True] or not network.training:
                    self._skipped.append(getattr(stepped, "found_inf", None))
                return

    def _check_still(self, network: nn.Module) -> None:
        """Warn where a weight moves without a step, from the second loss in a row that has a gradient to the third.

        Two in a row may be of one step, in weights that are moved for the second (SAM). The device is waited for after
        2, 4, 8, ... passes only, and where steps were counted before, only if something points to another one.
        """
        if self._still is None:
            weights = [p for p in network.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]
            weight = max(reversed(weights), key=lambda p: p.grad is not None, default=None)
            self._still = weight if weight is None else (ref(weight), weight._version, _values(weight).clone())
            return
        weight, version, before = self._still[0](), *self._still[1:]
        if weight is None or self._passes[True] & (self._passes[True] - 1) or _in_step():
            return
        if self._counted and weight._version == version and weight.grad is not None:
            return
        now = _values(weight)
        if now.shape == before.shape and bool(((now != before) & now.isfinite()).any()):
            self._warned = True
            warnings.warn(
                "weights have moved, but no optimizer of torch that holds them has stepped: an objective does not see "
                "steps that are written by hand, call objective.after_step(network, (x, y)) after each",
                stacklevel=2,
            )


_WAITING: WeakValueDictionary[int, StepWatch] = WeakValueDictionary()
"""Those that have seen a backward pass, by their id: the steps of other optimizers cost nothing where there is none."""
_OPTIMIZER = getfile(Optimizer)
"""Where torch wraps the ``step`` of all optimizers."""


@cache
def _listen() -> None:
    """Have torch tell of the steps of all optimizers."""
    register_optimizer_step_post_hook(_end_of_step)


def _end_of_step(stepped: Optimizer, *arguments: Any) -> None:
    if _WAITING:
        held = {p for group in stepped.param_groups for p in group["params"]}
        for waiting in _WAITING.valuerefs():
            if (watch := waiting()) is not None:
                watch.end_of_step(stepped, held)


def _in_step() -> bool:
    """Whether this is called by the closure of an optimizer's step."""
    return any(frame.f_code.co_filename == _OPTIMIZER for frame, _ in walk_stack(None))


def _values(weight: Tensor) -> Tensor:
    """What a weight holds, on this process where it is sharded."""
    weight = weight.detach()
    return weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[operator]  # a DTensor


def _gone() -> None:
    """A reference to what is no more."""
