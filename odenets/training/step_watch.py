"""Steps that are noticed: whether an optimizer has moved a network since the last loss was taken of it.

A step is a backward pass of a loss, and after it a change of weights. Optimizers of torch say that they have stepped,
by the hooks that torch has for all of them: fused ones leave no other trace, and one that evaluates its loss many times
in a step (LBFGS) steps once. Weights that are changed in another way are noticed by their versions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getfile
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from odenets.modes import keeping_modes

__all__ = ["StepWatch"]


class StepWatch:
    """Whether weights have moved, and the batch of the last loss. A copy of it has seen nothing yet."""

    def __init__(self) -> None:
        self._versions: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()
        self._modes_of_losses: set[bool] = set()
        """Whether the losses of which there was a backward pass were of a network in training mode."""
        self._skipped: list[Tensor | None] = []
        """Of each step of an optimizer since then what says that its kernel has skipped it."""
        self._hooked = False
        self._last: tuple[ref[Tensor], ref[nn.Module], ref[nn.Module], Any, list[bool]] | None = None
        _WATCHES.add(self)

    def __reduce__(self) -> tuple[type[StepWatch], tuple[()]]:
        return StepWatch, ()

    def look(self, network: nn.Module) -> None:
        """Remember the weights as they are before the forward pass of a loss."""
        self._versions[network] = _version(network)

    def expect(self, loss: Tensor, network: nn.Module, wrapper: nn.Module, batch: Any) -> None:
        """Wait for the backward pass of a loss, with the network in what wraps it.

        Args:
            batch: what :meth:`last` is to return, None where nobody will ask for it.
        """
        if self._last is not None and self._last[0]() is loss:
            return
        if self._versions.get(network, (0, 0))[0] != (now := _version(network))[0]:  # made by its first input
            self._versions[network] = now
        modes = [] if batch is None else [module.training for module in network.modules()]
        self._last = ref(loss), ref(wrapper), ref(network), batch, modes
        me, training = ref(self), network.training

        def backward(gradient: Tensor) -> None:
            if (watch := me()) is not None:
                watch._modes_of_losses.add(training)

        loss.register_hook(backward)

    def stepped(self, by_version: bool = True) -> bool:
        """Whether a step was taken after the backward pass of a loss.

        Args:
            by_version: whether a change of versions counts, where no optimizer's step was ever seen; the weights must
                then be those that :meth:`look` has seen, which FSDP exchanges from forward to backward pass.

        Raises:
            RuntimeError: the losses were of a network in eval mode.
        """
        if not self._modes_of_losses:
            return False
        if self._skipped:  # of a fused optimizer under GradScaler, whose kernel has decided
            taken = any(skipped is None or not skipped.item() for skipped in self._skipped)
            self._skipped.clear()
        elif self._hooked or not by_version or _within_step():
            return False
        else:
            taken = any(_version(network) != version for network, version in self._versions.items())
        if taken and True not in self._modes_of_losses:
            self.reset()
            raise RuntimeError(
                "the network was trained in eval mode, in which an objective changes nothing: call network.train(), "
                "and then eval() of the parts that are to be frozen"
            )
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
        self._modes_of_losses.clear()
        self._skipped.clear()
        self._versions.clear()
        self._last = None

    def end_of_step(self, stepped: Optimizer) -> None:
        """Called when an optimizer has stepped, whatever it holds."""
        if not self._modes_of_losses:
            return
        held = {p for group in stepped.param_groups for p in group["params"]}
        if any(p in held for network in self._versions for p in network.parameters()):
            self._skipped.append(getattr(stepped, "found_inf", None))
            self._hooked = True


class _Watches:
    """All that watch; torch is asked to tell of steps when the first begins to."""

    def __init__(self) -> None:
        self._members: WeakSet[StepWatch] | None = None

    def add(self, watch: StepWatch) -> None:
        if self._members is None:
            self._members = WeakSet()
            register_optimizer_step_post_hook(self._end_of_step)
        self._members.add(watch)

    def _end_of_step(self, stepped: Optimizer, *arguments: Any) -> None:
        for watch in [*(self._members or ())]:
            watch.end_of_step(stepped)


_WATCHES = _Watches()
_OPTIMIZER = getfile(Optimizer)
"""Where torch wraps the ``step`` of all optimizers."""


def _within_step() -> bool:
    """Whether this is called by the closure of an optimizer's step."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER:
        frame = frame.f_back
    return frame is not None


def _gone() -> None:
    """A reference to what is no more."""


def _version(network: nn.Module) -> tuple[int, int]:
    """How many weights there are that train, and how often they were changed in place."""
    versions = [p._version for p in network.parameters() if p.requires_grad and not nn.parameter.is_lazy(p)]
    return len(versions), sum(versions)
