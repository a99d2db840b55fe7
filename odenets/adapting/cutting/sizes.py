"""The sizes of tensors for which an exported graph holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import sympy

__all__ = ["Sizes"]

Shape = tuple[Any, ...]  # of numbers, and expressions of sympy


class Sizes:
    """What sizes the inputs of a graph may have.

    Args:
        values: of the inputs at the export, with sizes that are symbols where others may come.
        names: of the inputs, for errors; where only some are checked, those are the first.
        largest: of symbols.
        conditions: on symbols, under which the forward pass takes the way of the graph.

    >>> sizes = Sizes([torch.zeros(2, 3)], ["x"], {}, [])
    >>> sizes.check([torch.zeros(2, 3)])
    """

    def __init__(
        self,
        values: Iterable[Any],
        names: Sequence[str],
        largest: Mapping[sympy.Symbol, int],
        conditions: Sequence[sympy.Basic],
    ) -> None:
        self.shapes = [_shape(value) for value in values]
        self.names, self.largest, self.conditions = list(names), dict(largest), list(conditions)
        self.seen: set[tuple[Any, ...]] = set()

    def check(self, values: Sequence[Any]) -> None:
        """That the graph holds for these ``values``.

        Raises:
            ValueError: it was made for other sizes.
        """
        if torch.compiler.is_compiling():
            return
        shapes = tuple(tuple(value.shape) if isinstance(value, Tensor) else () for value in values)
        if shapes in self.seen:
            return
        sizes: dict[sympy.Symbol, int] = {}
        for name, shape, expected in zip(self.names, shapes, self.shapes, strict=False):
            if expected is None:
                continue
            if len(shape) != len(expected):
                raise ValueError(f"{name} must have {len(expected)} dimensions, as at the cut, got {shape}")
            for size, one in zip(shape, expected, strict=True):
                known = sizes.setdefault(one, size) if getattr(one, "is_Symbol", False) else one
                if isinstance(known, int) and known != size:
                    raise ValueError(
                        f"{name} must have the size {known} where it has {size}, got {shape}: the network is cut for "
                        f"shapes {self}; cut it again with an example of this shape"
                    )
        for symbol, size in sizes.items():
            if size > self.largest.get(symbol, size):
                raise ValueError(f"a size of {size} is more than the {self.largest[symbol]} that the model takes")
        if min((size for shape in shapes for size in shape), default=2) > 1:  # conditions are of more than one
            self._check_conditions(sizes)
        self.seen.add(shapes)

    def _check_conditions(self, sizes: Mapping[sympy.Symbol, int]) -> None:
        for one in self.conditions:
            if one.free_symbols <= set(sizes) and not one.subs([*sizes.items()]):
                got = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
                raise ValueError(
                    f"the model takes another way for these sizes than at the cut, where {one} was so, got {got} for "
                    f"shapes {self}: cut it again with an example of this shape"
                )

    def __str__(self) -> str:
        shapes = zip(self.names, self.shapes, strict=True)
        return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in shapes if shape is not None)


def _shape(value: Any) -> Shape | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
