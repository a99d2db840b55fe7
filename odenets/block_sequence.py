"""The blocks of a flow: how they are made, how long their steps are, how many there are, and how they are cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from odenets.blocks import (
    ELSEWHERE,
    Block,
    FieldSource,
    StageFields,
    block_list,
    check_blocks,
    check_sharing,
    fields_per_block,
    make_blocks,
    step_sizes,
)
from odenets.errors import refuse
from odenets.lazy import LazyParameters, make_field, refuse_state
from odenets.normalization import StageBatchNorm
from odenets.records import numbered
from odenets.schemes.names import method_of
from odenets.schemes.scheme import Scheme
from solvers import ButcherTableau, LearnedTableau

__all__ = ["BlockSequence"]


class BlockSequence(nn.Module):
    """Blocks one after another, each a step with a size of its own; a :class:`~odenets.Flow` takes the steps.

    Arguments and errors are those of a flow.
    """

    def __init__(
        self,
        field: FieldSource | tuple[Block, ...] | None = None,
        *,
        solver: str | ButcherTableau | LearnedTableau = "bs23",
        depth: int = 1,
        h: float | Sequence[float] | None = None,
        total_time: float | None = None,
        stage_fields: StageFields = "tied",
        shared: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse("Flow", unknown, ELSEWHERE)
        self.tableau = method_of(solver)
        scheme = self.tableau if isinstance(self.tableau, Scheme) else None
        if scheme is None and self.tableau.structure:
            raise ValueError(
                f"solver must take any field, {self.tableau.name} takes those of a structure: use NeuralODE(field, "
                f"solver={self.tableau.name!r}, steps=n), or one of euler, midpoint, heun, bs23, rk4"
            )
        check_sharing(stage_fields, shared)
        if scheme is not None and stage_fields != "tied":
            raise ValueError(
                f"stage_fields must be 'tied' with {scheme.name}, which says itself what fields a block has"
            )
        self._sizes = step_sizes(h, total_time, depth)
        self.stage_fields: StageFields = stage_fields
        self.shared = shared
        self.input_shape: tuple[int, ...] | None = None
        self.takes_closing = False  # whether passes take all closing stages, as while statistics are recomputed
        self.warned = False  # of statistics that several stages share
        self.start = 0.0  # the time of its first state; that of a part of a flow lies later
        self.before: float | None = None  # the step size before a part to which the memory of a scheme is handed
        self.passes_memory = False  # whether it returns that of its last step behind the state, for a part after it
        self.blocks = nn.ModuleList()
        if field is None:
            count = fields_per_block(self.tableau, stage_fields) + (scheme is not None and scheme.learns)
            count *= 1 if shared else depth
            self.field_of_first_input = LazyParameters(count)
            self.register_load_state_dict_pre_hook(refuse_state)
        elif isinstance(field, tuple):
            self.blocks.extend(block_list(field))
            check_blocks(field, self.tableau, stage_fields)
        else:
            self.blocks.extend(self._make_blocks(field))

    @classmethod
    def of(cls, blocks: Sequence[Block], h: Sequence[float] | None = None, start: float = 0.0, **settings: Any) -> Self:
        """A flow of blocks as they are.

        Args:
            blocks: in order; not copied.
            h: step size of each; the blocks' own if not given.
            start: time of the first state.
            settings: the other arguments of the class: solver, stage_fields, shared.

        Returns:
            The flow.

        Raises:
            ValueError: another h than the blocks have, unless one block is shared; as the class besides.
            TypeError: no blocks.

        >>> import odenets
        >>> blocks = [odenets.Block([odenets.MLPField(2)], h) for h in (0.25, 0.75)]
        >>> odenets.Flow.of(blocks, solver="heun").h
        (0.25, 0.75)
        """
        h = [block.h for block in block_list(blocks)] if h is None else h
        flow = cls(tuple(blocks), depth=len(h), h=h, **settings)
        if flow.h != flow._sizes:
            raise ValueError(f"h must be each block's own, {flow.h}, unless one block is shared, got {flow._sizes}")
        flow.start = start
        return flow

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._sizes) if self.shared else len(self.blocks) or len(self._sizes)

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each block, in units of time."""
        return self._sizes if self.shared else tuple([cast(Block, block).h for block in self.blocks]) or self._sizes

    @property
    def names(self) -> tuple[str, ...]:
        """The module of each step's block, as records name it; with the number of the call where all share one."""
        names = [f"blocks.{0 if self.shared else m}" for m in range(self.depth)]
        return tuple(numbered(names) if self.shared else names)

    @property
    def total_time(self) -> float:
        """The time that all steps take together, ``T = sum_m h_m``."""
        return math.fsum(self.h)

    @property
    def evaluations(self) -> int:
        """Field evaluations of one forward pass."""
        return self.evaluations_per_pass()

    def evaluations_per_pass(self, *, closing: bool = False, readout: str = "solution") -> int:
        """Field evaluations of one pass.

        Args:
            closing: whether all blocks take their closing stages, as for a measure of the error.
            readout: "solution", or "ensemble", for which the last block takes them.

        Returns:
            The number.
        """
        interior, stages = self.tableau.interior, self.tableau.stages
        if isinstance(self.tableau, Scheme):
            return self.depth * self.tableau.calls
        if closing and self.tableau.fsal and self.passes_on:
            return self.depth * (stages - 1) + 1
        last = stages if closing or readout == "ensemble" else interior
        return (self.depth - 1) * (stages if closing else interior) + last

    @property
    def one_step(self) -> bool:
        """Whether each step reads the state before it and nothing else of the steps before."""
        return not (isinstance(self.tableau, Scheme) and self.tableau.memory)

    def check_one_step(self, name: str, remedy: str) -> None:
        """That each step reads nothing but the state before it, for what takes steps one by one.

        Args:
            name: of the argument that the flow is in, for the message.
            remedy: what it takes instead.

        Raises:
            ValueError: a :class:`~odenets.ReversibleFlow`, or a scheme with a memory.
        """
        if not self.one_step:
            kind = f"a {type(self).__name__} of {self.tableau.name}"
            raise ValueError(f"{name} must not hold {kind}, whose steps read more than the state before them: {remedy}")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the class besides blocks and step sizes, as :meth:`of` takes them."""
        return {"solver": self.tableau, "stage_fields": self.stage_fields, "shared": self.shared}

    @property
    def passes_on(self) -> bool:
        """Whether a closing stage is the first stage of the next step; not where each has statistics of its own."""
        return self.stage_fields == "chained" or (self.shared and not self._stage_statistics)

    @property
    def _stage_statistics(self) -> bool:
        """Whether its stages have batch norm statistics of their own."""
        return any(isinstance(module, StageBatchNorm) and module.stages > 1 for module in self.modules())

    @property
    def closing_apart(self) -> bool:
        """Whether its closing stages, which forward passes do not take, have batch norm statistics of their own."""
        if self.stage_fields == "chained" or self.tableau.interior == self.tableau.stages:
            return False
        return self.stage_fields == "untied" or self._stage_statistics

    def materialize(self, x: Tensor) -> None:
        """Make the field from the first input ``x``, if none was given; remember the shape of its samples.

        Raises:
            ValueError: there is no default field for such states, see :func:`odenets.fields.field_for`.
        """
        if "field_of_first_input" in self._modules:
            make: Any = torch.compiler.disable(make_field) if torch.compiler.is_compiling() else make_field
            make(self, self.tableau.fields_see(x) if isinstance(self.tableau, Scheme) else x, self._make_blocks)
        self.input_shape = self.input_shape or tuple(x.shape[1:])

    def resize(self, sizes: Sequence[float], whole: nn.Module | None = None) -> None:
        """Give the flow one block per step size; new ones are copies of its last.

        Args:
            sizes: the step size of each.
            whole: the network that the flow is a part of: what blocks share with its other parts, copies share too.

        Raises:
            ValueError: another depth for a shared flow, or for one that has no field yet.
        """
        if self.shared and len(sizes) != self.depth:
            raise ValueError(f"a shared flow keeps its depth {self.depth}, got {len(sizes)}")
        if not len(self.blocks) and len(sizes) != self.depth:
            raise ValueError("the flow has no field yet: call it once before it gets another depth")
        self._sizes = tuple(map(float, sizes))
        if self.shared or not len(self.blocks):
            return
        blocks = [cast(Block, block) for block in self.blocks[: len(sizes)]]
        blocks += [blocks[-1].copy_within(whole or self) for _ in range(len(sizes) - len(blocks))]
        for block, size in zip(blocks, self._sizes, strict=True):
            block.h = size
        self.replace_blocks(blocks)

    def replace_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Take other ``blocks`` in this order; the modes of the flow and of the blocks stay.

        Raises:
            TypeError: there are none, or one is no :class:`~odenets.Block`.
        """
        blocks = block_list(blocks)
        del self.blocks[:]
        self.blocks.extend(blocks)

    def part(self, first: int, last: int) -> Self:
        """The blocks from ``first`` to before ``last`` as a flow of its own, which shares them and keeps their times.

        Where a scheme has a memory, it travels from part to part behind the state, in dimension 1.

        Raises:
            ValueError: no such blocks, no field yet, or blocks that share fields.
            TypeError: a class with settings of its own, which a part would lack.
        """
        if not 0 <= first < last <= self.depth:
            raise ValueError(f"a flow of {self.depth} blocks has no part from {first} to {last}")
        together = self.shared or self.stage_fields == "chained"
        if together and (first, last) != (0, self.depth):
            raise ValueError("a shared or chained flow has no parts: its blocks share fields")
        if not len(self.blocks):
            raise ValueError("the flow has no field yet: call it once before it is cut")
        if (kind := type(self)).__init__ is not BlockSequence.__init__:
            raise TypeError(f"{kind.__name__} has settings of its own, which a part would lack: let it define part")
        part = self.of(
            [cast(Block, block) for block in self.blocks[first:last]],
            self.h[first:last],
            start=self.start + math.fsum(self.h[:first]),
            **self.settings,
        )
        if not self.one_step:
            part.before = self.h[first - 1] if first else self.before
            part.passes_memory = last < self.depth or self.passes_memory
        part.training, part.blocks.training, part.input_shape = self.training, self.blocks.training, self.input_shape
        return part

    def _make_blocks(self, source: FieldSource) -> list[Block]:
        return make_blocks(source, self._sizes[:1] if self.shared else self._sizes, self.tableau, self.stage_fields)

    def get_extra_state(self) -> Tensor:
        """The step sizes, so that they travel with ``state_dict``, ``(depth,)`` float64."""
        return torch.tensor(self.h, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the step sizes of a ``state_dict``, the ``state`` that :meth:`get_extra_state` returns.

        Raises:
            ValueError: it is of another depth.
        """
        sizes = state.tolist()
        if len(sizes) != self.depth:
            raise ValueError(
                f"the state holds {len(sizes)} blocks and this flow has {self.depth}: "
                "call odenets.depth.resize_as(network, state_dict) first, or save and load with odenets.save_weights "
                "and odenets.load_weights"
            )
        self.resize(sizes)

    def extra_repr(self) -> str:
        """The method and the arguments of the flow, as ``print`` shows them."""
        blocks = f"depth={self.depth}, stage_fields={self.stage_fields}"
        return f"solver={self.tableau.name}, {blocks}, total_time={self.total_time:g}"
