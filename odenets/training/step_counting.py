"""Counting steps: what an objective does after each step of an optimizer, told of it or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from odenets.modes import keeping_state
from odenets.recording import unwrapped
from odenets.training.step_watch import StepWatch

__all__ = ["StepCounter", "after_step", "eagerly"]

Method = TypeVar("Method", bound=Callable[..., Any])


def eagerly(method: Method) -> Method:
    """Leave a method out of what is compiled around it: it counts, and what it calls may be compiled by itself.

    ``torch.compiler.disable`` as a decorator would load the compiler where nothing is compiled.
    """

    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*arguments, **options)
        return method(*arguments, **options)

    return cast(Method, call)


class StepCounter(nn.Module):
    """What acts after steps of an optimizer: :meth:`after_step` is called once for each.

    That is at once by who tells it of a step, or else before the next loss, or before its state is saved or copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self._watch = StepWatch()

    @property
    def needs_second_forward(self) -> bool:
        """Whether :meth:`after_step` will call the network after the coming step."""
        return False

    @property
    def counts_steps(self) -> bool:
        """Whether :meth:`after_step` does anything."""
        return type(self).after_step is not StepCounter.after_step

    @property
    def keeps_batch(self) -> bool:
        """Whether :meth:`after_step` will read the batch, which is then kept until the next loss; None comes if not."""
        return self.counts_steps

    def after_step(self, network: nn.Module, batch: Any) -> None:
        """Called after each step of the optimizer with the ``batch``, or with its last part where it came in parts.

        In a loop of one's own, ``objective(network, x, y)`` calls it for the step since the last loss, if one was: a
        backward pass, and after it the step of an optimizer of torch that holds weights of the network. After a step
        that is written by hand, or of an optimizer of copies, it is to be called, or there is a warning. ``fit`` and
        others that call :meth:`~odenets.training.Objective.loss` call it at once; a step that is told is not counted
        again.

        Where it calls the network, which :attr:`needs_second_forward` says, the network's buffers and random state are
        then put back: running statistics count a batch once.
        """

    def notice_step(self) -> None:
        """Call :meth:`after_step` for the step that was taken since the last loss, if one was."""
        if self._watch.stepped():
            with self._watch.last() as (network, batch):
                self._watch.reset()
                if network is not None:
                    after_step(self, network, batch)

    @property
    def is_counting(self) -> bool:
        """Whether steps can be noticed, as where there are gradients, and not in functions that torch.func maps."""
        mapped = torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]  # torch's own
        return torch.is_grad_enabled() and self.training and not mapped

    def expect_step(self, network: nn.Module, batch: Any, loss: Tensor) -> None:
        """That a ``loss`` of the ``network`` on a ``batch`` was taken, after whose backward pass a step is noticed."""
        if self.is_counting and isinstance(loss, Tensor) and loss.requires_grad:
            self._watch.expect(loss, unwrapped(network), network, batch if self.keeps_batch else None)

    def end_step(self) -> None:
        """That the step since the last loss is counted."""
        self._watch.reset()

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """As torch's, with its ``args`` and ``options``; a step that was taken since the last loss is counted.

        Raises:
            RuntimeError: several processes must look at the network for that, of which this is one.
        """
        self._notice_alone()
        return super().state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied, with the step counted that was taken since the last loss.

        A copy waits for the next backward pass: one between a backward pass and its step does not count that step.
        """
        self._notice_alone()
        return self.__dict__

    def _notice_alone(self) -> None:
        if self.needs_second_forward and _processes() > 1 and self._watch.stepped():
            raise RuntimeError(
                "what is saved or copied has the loss after the last step, which all processes take together: call "
                "objective.after_step(network, (x, y)) on each before"
            )
        self.notice_step()


def after_step(objective: StepCounter, network: nn.Module, batch: Any) -> None:
    """Tell an objective of a step; where it looks at the network again, that leaves no trace there."""
    with keeping_state(network) if objective.needs_second_forward else nullcontext():
        objective.after_step(network, batch)
    objective.end_step()


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
