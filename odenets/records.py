"""Records: measures of every block and sample, the names of the blocks, and their numbers as arrays and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from odenets.errors import needs

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

__all__ = ["Records", "numbered"]

COLUMNS = ("block", "name", "flow", "sample")
SHOWN = 12  # rows of blocks that are printed


class Records(dict[str, Tensor]):
    """Measures by name, each ``(blocks, B)``.

    ``print(records)`` shows their means over the samples. Measures may be added, ``records["length"] = ...``.

    Attributes:
        starts: the row at which each flow begins.
        blocks: the name of each row, "blocks.0" of a flow, "flows.1 blocks.0" of a network, "step 0" of a neural ODE,
            "layer1.0" or "encoder.layers.encoder_layer_0 mlp" of an adapted model, "module 1 blocks.0" of modules.
        tokens: sample and position of each token, ``(N, 2)``, where measures are ``(blocks, N)``, of tokens; else None.
            It stays on the CPU, where it indexes tensors of any device.

    Args:
        values: measures by name.
        starts, blocks, tokens: the attributes; the rows are steps, "step 0" and so on, if not given.

    Raises:
        ValueError: tokens that are not ``(N, 2)``.

    >>> import odenets
    >>> from odenets import measures
    >>> flow = odenets.Flow(lambda: odenets.MLPField(2), depth=2)
    >>> _, records = flow.record(torch.randn(3, 2), action=measures.action)
    >>> records.blocks, records["action"].shape
    (('blocks.0', 'blocks.1'), torch.Size([2, 3]))
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        starts: Sequence[int] = (0,),
        blocks: Sequence[str] | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        super().__init__(values)
        if tokens is not None and (tokens.ndim != 2 or tokens.shape[1] != 2):
            raise ValueError(f"tokens must be samples and positions, shape (N, 2), got {tuple(tokens.shape)}")
        self.tokens = tokens
        self.starts: tuple[int, ...] = tuple(starts)
        if blocks is None:
            rows = len(next(iter(values.values()))) if values else 0
            blocks = [f"step {m}" for m in range(rows)]
        self.blocks: tuple[str, ...] = tuple(blocks)

    def __missing__(self, name: object) -> Tensor:
        """Refuse a name that was not recorded.

        Raises:
            KeyError: always.
        """
        raise KeyError(
            f"records hold {', '.join(map(repr, self)) or 'no measure'}, not {name!r}: record(x, name=measure)"
        )

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[str, ...], Tensor | None]:
        """What a plain dictionary of the measures lacks; ``Records(values, *layout)`` has all of it."""
        return self.starts, self.blocks, self.tokens

    @classmethod
    def join(cls, parts: Iterable[Records], names: Sequence[str] | None = None) -> Records:
        """The records of consecutive parts of a network as one, whose ``starts`` are the rows at which parts begin.

        Args:
            parts: the records of each, with the same measures.
            names: of the parts, each before those of its blocks unless it is empty; "part 0" and so on if not given,
                where there are several.

        Returns:
            The records of all blocks, ``(blocks of all parts, B)`` by name.

        Raises:
            ValueError: parts that were measured by different measures, or on other tokens, or another number of names.
        """
        parts = [*parts]
        measured = [set(records) for records in parts]
        if any(each != measured[0] for each in measured):
            raise ValueError(f"parts must have the same measures, got {' and '.join(map(str, map(sorted, measured)))}")
        tokens = parts[0].tokens
        if not all(_same(records.tokens, tokens) for records in parts):
            raise ValueError("parts must be measured on the same tokens, or all of them per sample")
        if names is None:
            names = [f"part {k}" if len(parts) > 1 else "" for k in range(len(parts))]
        starts: list[int] = []
        blocks: list[str] = []
        for records, part in zip(parts, names, strict=True):
            starts.append(len(blocks))
            blocks += [f"{part} {block}" if part else block for block in records.blocks]
        values = {name: torch.cat([records[name] for records in parts]) for name in parts[0]}
        return cls(values, starts, blocks, tokens)

    def map(self, function: Callable[[Tensor], Tensor]) -> Records:
        """A ``function`` of each measure, ``(blocks, B)`` to the same rows, as ``records.map(Tensor.detach)``."""
        return Records({name: function(value) for name, value in self.items()}, *self.layout)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """The measures as arrays ``(blocks, B)``, without gradients; of 16 bits they come in float32.

        Raises:
            ValueError: a measure that is not ``(blocks, B)`` as the others are.
        """
        narrow = torch.float16, torch.bfloat16
        arrays = {name: (v.float() if v.dtype in narrow else v).numpy(force=True) for name, v in self.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        for name, shape in shapes.items():
            if len(shape) != 2 or shape[0] != len(self.blocks) or shape != next(iter(shapes.values())):
                others = {n: s for n, s in shapes.items() if n != name}
                raise ValueError(
                    f"measure {name!r} must have shape (blocks, B) with the {len(self.blocks)} blocks that are named, "
                    f"got {shape}{f' beside {others}' if others else ''}"
                )
        return arrays

    def to_dataframe(self) -> DataFrame:
        """A tidy table, a row for each block and sample: its columns are block, name, flow, sample, and each measure.

        Of measures of tokens it has a row for each block and token, and a column more, token, its position.

        ``frame.groupby("block")`` keeps the order of the blocks, by their names they are sorted as words.

        Raises:
            ValueError: as :meth:`to_numpy`, or a measure with the name of another column.
            ModuleNotFoundError: pandas is not installed, ``pip install 'odenets[plot]'``.

        >>> action = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> records = Records({"action": action}, blocks=["layer1.0", "layer2.0"])
        >>> records.to_dataframe()
           block      name  flow  sample  action
        0      0  layer1.0     0       0     1.0
        1      0  layer1.0     0       1     2.0
        2      1  layer2.0     0       0     3.0
        3      1  layer2.0     0       1     4.0
        """
        with needs("plot"):
            import numpy as np
            import pandas as pd

        arrays = self.to_numpy()
        columns = COLUMNS if self.tokens is None else (*COLUMNS, "token")
        if taken := [name for name in arrays if name in columns]:
            raise ValueError(f"measures must not have the names of columns, {', '.join(columns)}, got {taken}")
        samples = next((array.shape[1] for array in arrays.values()), 0)
        rows = np.arange(len(self.blocks))
        flows = np.searchsorted(self.starts, rows, side="right") - 1
        of = np.arange(samples)[:, None] if self.tokens is None else self.tokens.numpy(force=True)[:samples]
        table = {
            "block": rows.repeat(samples),
            "name": np.array(self.blocks, dtype=object).repeat(samples),
            "flow": flows.repeat(samples),
        }
        table |= {name: np.tile(column, len(rows)) for name, column in zip(columns[3:], of.T, strict=True)}
        return pd.DataFrame(table | {name: array.reshape(-1) for name, array in arrays.items()})

    def __repr__(self) -> str:
        """The means over the samples, a row per block, of which the middle is left out where there are many."""
        count = len(self.blocks)
        try:
            arrays = self.to_numpy()
        except (ValueError, RuntimeError, NotImplementedError):  # other shapes, or no numbers, as on the meta device
            arrays = {}
        if not arrays:
            measured = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.items()) or "no measure"
            return f"Records of {count} blocks: {measured}"
        means = [torch.from_numpy(array).double().mean(1).tolist() for array in arrays.values()]
        rows = [(name, *(f"{mean:.4g}" for mean in row)) for name, *row in zip(self.blocks, *means, strict=True)]
        if count > SHOWN:
            rows[SHOWN // 2 : -SHOWN // 2] = [("...", *("" for _ in self))]
        rows = [("", *self), *rows]
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [
            f"{name:{first}}" + "".join(f"  {text:>{width}}" for text, width in zip(cells, widths, strict=True))
            for name, *cells in rows
        ]
        samples = len(next(iter(arrays.values()))[0]) if count else 0
        kind = "samples" if self.tokens is None else "tokens"
        title = f"Records of {count} blocks x {samples} {kind}, means over the {kind}:"
        return "\n".join([title, *map(str.rstrip, lines)])


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one.cpu(), other.cpu()))


def numbered(names: Iterable[str]) -> list[str]:
    """Names of which each is there once: those of modules that are called several times count the calls.

    >>> numbered(["layer", "last", "layer"])
    ['layer call 0', 'last', 'layer call 1']
    """
    names = [*names]
    if len(set(names)) == len(names):
        return names
    calls: dict[str, int] = {}
    unique = []
    for name in names:
        m = calls[name] = calls.get(name, -1) + 1
        unique.append(f"{name} call {m}" if names.count(name) > 1 else name)
    return unique
