"""A field with its parameters as arguments: what a graph and its gradient call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only

from solvers.field_calls import Field, velocity
from solvers.packing import Packing
from solvers.validation import real_dtype

__all__ = ["GraphField"]

ANEW = "which is done anew where the gradient of a graph calls it again: field.eval(), or graph=False"


class GraphField:
    """Calls a field ``v(t, x, *args)`` of one packed state, with its own parameters or with others in their places.

    Args:
        field: what is called.
        owner: the module whose parameters it reads; None for a function without.
        packing: of the state.

    Attributes:
        parameters: those of the owner that require gradients, each once.
        others: its other parameters and its buffers.
    """

    def __init__(self, field: Callable[..., Any], owner: nn.Module | None, packing: Packing) -> None:
        self.field, self.packing = field, packing
        self.parameters: list[Tensor] = []
        self.others: list[Tensor] = []
        self._places: list[tuple[nn.Module, list[tuple[str, int]]]] = []
        self.modules = [] if owner is None else _modules(owner)
        numbers: dict[int, int] = {}
        for module in self.modules:
            here = []
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    if id(parameter) not in numbers:
                        numbers[id(parameter)] = len(self.parameters)
                        self.parameters.append(parameter)
                    here.append((name, numbers[id(parameter)]))
                elif parameter is not None:
                    self.others.append(parameter)
            self.others += [buffer for buffer in module._buffers.values() if buffer is not None]
            if here:
                self._places.append((module, here))

    def velocity(self, args: Sequence[Any], parameters: Sequence[Tensor] | None = None) -> Field:
        """The velocity ``v(t, x)`` for ``args``, with ``parameters`` in the place of its own, or with its own."""

        def call(t: Any, x: Tensor) -> Tensor:
            t = t.to(real_dtype(x))
            if parameters is None:
                return self._call(t, x, args)
            return self._with(0, parameters, t, x, args)

        return call

    def _with(self, k: int, parameters: Sequence[Tensor], t: Any, x: Tensor, args: Sequence[Any]) -> Tensor:
        """A call with the parameters of one module after the other exchanged.

        The compiler knows such an exchange of the parameters that a module holds itself, and not of its parts'.
        """
        if k == len(self._places):
            return self._call(t, x, args)
        module, here = self._places[k]
        with _reparametrize_module(module, {name: parameters[i] for name, i in here}):
            return self._with(k + 1, parameters, t, x, args)

    def _call(self, t: Any, x: Tensor, args: Sequence[Any]) -> Tensor:
        packing = self.packing
        if packing.single:
            return self.field(t, x, *args)
        return packing.pack(self.field(t, packing.unpack(x), *args), "field")

    def kinds(self) -> tuple[Any, ...]:
        """What a compiler takes for constants of a field: classes and modes of its modules, and hooks by number."""
        hooks = (hook for m in self.modules for hook in (*m._forward_hooks, *m._forward_pre_hooks))
        return (
            *((type(m), m.training) for m in self.modules),
            *hooks,
            *_global_forward_hooks,
            *_global_forward_pre_hooks,
        )

    def check_reads(self, t: Tensor, x: Tensor, args: Sequence[Any]) -> None:
        """That a call reads no tensor that gets a gradient beside its arguments and these parameters, by one call.

        Raises:
            ValueError, TypeError: it does, or it returns what is no velocity.
        """
        plain = tree_map_only(Tensor, Tensor.detach, tuple(args))
        if velocity(self.velocity(plain, [p.detach() for p in self.parameters]), t, x.detach()).requires_grad:
            raise ValueError(
                "field reads a tensor that requires a gradient and is no parameter of the module that it is: make it "
                "one, let args hold it, or graph=False; what it differentiates inside is for torch.func.grad"
            )

    def probe(self, t: Tensor, x: Tensor, args: Sequence[Any]) -> None:
        """:meth:`check_reads`, and that a call draws no random numbers and changes nothing.

        Raises:
            ValueError, TypeError: it does, which a graph would not do each time.
        """
        buffers = [buffer for module in self.modules for buffer in module._buffers.values() if buffer is not None]
        versions, numbers, state = [buffer._version for buffer in buffers], self._numbers(), _random(x)
        self.check_reads(t, x, args)
        if not all(map(torch.equal, state, _random(x))):
            raise ValueError(
                "field draws random numbers, which are drawn anew where the gradient of a graph calls it again: hand "
                "them over in args, field.eval() for a dropout, or graph=False"
            )
        if versions != [buffer._version for buffer in buffers]:
            raise ValueError(f"field changes its buffers, as a batch norm in training mode does, {ANEW}")
        if changed := [name for name, value in self._numbers().items() if numbers.get(name) != value]:
            raise ValueError(
                f"field changes its number {changed[0][1]!r}, which a graph holds as a constant: calls are counted in "
                "solution.stats.evaluations; or graph=False"
            )

    def _numbers(self) -> dict[tuple[int, str], Any]:
        """Numbers that modules hold."""
        return {
            (i, name): value for i, module in enumerate(self.modules) for name, value in vars(module).items()
            if isinstance(value, (int, float))
        }  # fmt: skip

    def check(self) -> None:
        """That a call does the same each time.

        Raises:
            ValueError: batch norm in training mode, or dropout.
        """
        for module in self.modules:
            if not module.training:
                continue
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ValueError(
                    f"field holds a batch norm in training mode, {ANEW}; norm='group' or 'layer' have no statistics"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise ValueError(f"field holds a dropout in training mode, {ANEW}")


def _modules(owner: nn.Module) -> list[nn.Module]:
    """``owner.modules()``, which takes as long as a step of a small field."""
    found, left = {}, [owner]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [part for part in module._modules.values() if part is not None]
    return list(found.values())


def _random(x: Tensor) -> list[Tensor]:
    """The states of the generators that a field of x may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]
