"""A part of a network that was cut: two graphs of the same parameters, and the inputs that they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from odenets.adapting.cutting.sizes import Sizes
from odenets.adapting.masking import Masking, Tokens

__all__ = ["CutPart", "Exports", "Inputs", "PartMasking"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model, by the names of its arguments; the first is what parts are given states for.

    Attributes:
        names: of those that are given, in order.
        args, kwargs: an example, or nothing.
    """

    names: tuple[str, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Inputs:
        """The inputs of a ``model``, by an ``example``: a tensor, a tuple of positional ones, or a mapping.

        Raises:
            TypeError: the model does not take them, or the first is no tensor.
        """
        args = () if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
        kwargs = dict(example) if isinstance(example, Mapping) else {}
        inputs = cls((*_positional(model, len(args)), *kwargs), args, kwargs)
        if not isinstance(first := next(iter(inputs.example), None), Tensor):
            raise TypeError(f"the first input of a model that is cut must be a tensor, got {type(first).__name__}")
        return inputs

    @property
    def example(self) -> tuple[Any, ...]:
        """The inputs at the cut, in order."""
        return (*self.args, *self.kwargs.values())

    @property
    def without_example(self) -> Inputs:
        """Their names alone."""
        return Inputs(self.names)

    def values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The state, and what is given besides by position or by name, in order.

        Raises:
            TypeError: others are given than at the cut.
        """
        rest = self.names[1:]
        given = dict(zip(rest, args[1:], strict=False)) | dict(kwargs)
        if not args or len(args) + len(kwargs) != len(self.names) or set(given) != set(rest):
            got = ", ".join(filter(None, [f"{len(args) - 1} by position" if args[1:] else "", *kwargs])) or "nothing"
            raise TypeError(
                f"a part takes a state and what the model was cut with besides {self.names[0]}: "
                f"{', '.join(rest) or 'nothing'}; got {got}. Cut the network with an example of what it is called with"
            )
        return [args[0], *(given[name] for name in rest)]

    def in_order(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Inputs by name in the order in which parts take them.

        Raises:
            TypeError: others than at the cut.
        """
        if set(inputs) != set(self.names):
            raise TypeError(
                f"inputs must be those with which the network was cut, {', '.join(self.names)}, got {', '.join(inputs)}"
            )
        return tuple(inputs[name] for name in self.names)


def _positional(model: nn.Module, number: int) -> list[str]:
    """The names of the first arguments of a model."""
    names: list[str] = []
    for one in inspect.signature(model.forward).parameters.values():
        if one.kind is one.VAR_POSITIONAL:
            names += [f"{one.name}[{i}]" for i in range(number - len(names))]
        elif one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            names.append(one.name)
    if len(names) < number:
        raise TypeError(f"{type(model).__name__} takes {len(names)} inputs by position, got {number}")
    return names[:number]


@dataclass(frozen=True)
class Exports:
    """What holds for graphs that torch.export has made, beyond what they compute.

    Attributes:
        example: the structure of the inputs; and those that are no tensors, by their number, which the graphs hold.
        output: how the output of the last part is made of its tensors; None for the others.
        sizes: of the inputs of each graph, by mode.
        modes: of each module of the part in each of the two graphs, which hold what it computes in that mode.
    """

    example: TreeSpec
    constants: Mapping[int, Any]
    output: TreeSpec | None
    sizes: Mapping[bool, Sizes]
    modes: Mapping[bool, Sequence[tuple[str, nn.Module, bool]]]

    def leaves(self, values: list[Any], training: bool) -> list[Any]:
        """What a graph is called with, checked.

        Raises:
            TypeError, ValueError: the graph is of other inputs.
        """
        leaves, structure = tree_flatten(values)
        if len(values) > 1:
            if structure != self.example:
                raise TypeError(f"inputs must be nested as they were at the cut, {self.example}, got {structure}")
            for i, value in self.constants.items():
                if leaves[i] is not value and leaves[i] != value:
                    raise ValueError(f"the network is cut for {value!r} among its inputs, got {leaves[i]!r}")
        self.sizes[training].check(leaves)
        for name, module, mode in self.modes[training]:
            if module.training != mode:
                raise ValueError(
                    f"{name!r} is in {_mode(module.training)} mode within a part in {_mode(training)} mode, and was in "
                    f"{_mode(mode)} mode when the network was cut: freeze it before, and cut the network again"
                )
        return leaves


def _mode(training: bool) -> str:
    return "training" if training else "eval"


class CutPart(nn.Module):
    """What is computed between two states: by one graph in training mode, and by another in eval mode.

    Args:
        in_training, in_eval: graphs of the same parameters, called with the inputs, or the leaves of them.
        inputs: of the model.
        exports: of graphs that torch.export has made.
    """

    def __init__(
        self, in_training: fx.GraphModule, in_eval: fx.GraphModule, inputs: Inputs, exports: Exports | None = None
    ) -> None:
        super().__init__()
        self.in_training, self.in_eval = in_training, in_eval
        self.inputs, self.exports = inputs.without_example, exports
        self.dtype = next((p.dtype for p in self.parameters()), None)
        placeholders = [[*one.graph.find_nodes(op="placeholder")] for one in (in_training, in_eval)]
        self.number = len(placeholders[0])
        self.conditioned = any(node.users for nodes in placeholders for node in nodes[1:])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next state, or the output, from the state, and what the model is given besides, in its order or by name.

        Raises:
            TypeError, ValueError: other inputs than the graphs have.
        """
        graph = self.in_training if self.training else self.in_eval
        if not args and (first := self.inputs.names[0]) in kwargs:
            args = (kwargs.pop(first),)
        values = [*args] if len(args) == 1 and not (kwargs or self.conditioned) else self.inputs.values(args, kwargs)
        if self.exports is not None:
            self._check_dtype()
            values = self.exports.leaves(values, self.training)
        output = graph(*values, *[None] * (self.number - len(values)))
        if self.exports is None or self.exports.output is None:
            return output
        return tree_unflatten([*output], self.exports.output)

    def get_submodule(self, target: str) -> nn.Module:
        """The module of that name in the part, or in the model, the ``target``."""
        for name in (target, f"in_training.{target}", f"in_training.model.{target}"):
            with suppress(AttributeError):
                return super().get_submodule(name)
        raise AttributeError(f"the part has no module {target!r}")

    def _check_dtype(self) -> None:
        if torch.compiler.is_compiling():
            return
        p = next(self.parameters(), None)
        if p is not None and p.dtype != self.dtype:
            raise ValueError(f"the network was cut in {self.dtype}, and is in {p.dtype} now: cut it again")


@dataclass(frozen=True)
class PartMasking(Masking):
    """The masking of a model in a part of it, which is given by position what the model takes by name.

    Attributes:
        inputs: of the model.
        first: whether the part is given the first of them, and not a state.
    """

    inputs: Inputs = field(default=Inputs(()), compare=False)
    first: bool = False

    def tokens(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], samples: int | None
    ) -> Tokens | None:
        """As :meth:`Masking.tokens`, of the state and what is given besides, ``args``."""
        names = self.inputs.names
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        if not self.first:
            del named[names[0]]
        try:
            return super().tokens(model, (), named, samples)
        except KeyError as error:
            raise ValueError(
                f"mask reads the input {error}, which a part of the network does not get: it gets a state, and "
                f"{', '.join(named) or 'nothing'}"
            ) from error
