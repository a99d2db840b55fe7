"""Blocks of a flow: one solver step each, with fields and a step size of its own; how a flow comes by them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from odenets.fields import VelocityField, reset_modules
from odenets.normalization import StageBatchNorm
from odenets.normalization.stage_batch_norm import at_stage, expand_stages
from odenets.schemes.scheme import Learned, Scheme, Velocity
from solvers import ButcherTableau, LearnedTableau, Step, rk_step
from solvers.validation import check_call, mismatch

__all__ = [
    "ELSEWHERE",
    "Block",
    "FieldSource",
    "StageFields",
    "Velocity",
    "block_list",
    "check_arguments",
    "check_blocks",
    "check_sharing",
    "fields_per_block",
    "make_blocks",
    "step_sizes",
    "take_step",
    "uses_of",
]

_BY_ERROR = "one of odenets.NeuralODE(field, tolerance=Tolerance(rtol=1e-3)), whose steps are chosen by their error"
_UNDONE = "odenets.ReversibleFlow(field, coupling=0.999), whose steps are undone"
_OF_FIELD = "one of the field, Flow(odenets.MLPField(features, hidden))"
ELSEWHERE = {
    "tolerance": _BY_ERROR, "controller": _BY_ERROR, "method": "solver", "steps": "depth", "layers": "depth", "dt": "h",
    "step_size": "h", "rtol": _BY_ERROR, "atol": _BY_ERROR, "adjoint": _BY_ERROR, "blocks": "depth",
    "num_blocks": "depth", "num_layers": "depth", "gradient": _UNDONE, "coupling": _UNDONE,
    "hidden": _OF_FIELD, "activation": _OF_FIELD, "norm": _OF_FIELD,
}  # fmt: skip
"""What has the place of arguments that a flow does not take."""

StageFields = Literal["tied", "chained", "untied"]
FieldSource = nn.Module | Callable[[], nn.Module]


class Block(nn.Module):
    """One solver step with its own fields and its own step size h; a :class:`~odenets.Flow` takes the step.

    Attributes:
        fields: one velocity field (tied), or one per stage; of a :class:`~odenets.schemes.Scheme` its fields,
            and behind them what the block learns besides.
        h: step size, in units of the flow's time.

    >>> import odenets
    >>> block = Block([odenets.MLPField(2)], h=0.5)
    >>> odenets.Flow.of([block, block.copy_within(block)], solver="heun").total_time
    1.0
    """

    def __init__(self, fields: Sequence[nn.Module], h: float) -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.h = h
        self._by_stage = any(isinstance(module, StageBatchNorm) for module in self.fields.modules())

    def velocities(
        self, method: ButcherTableau, stage_fields: StageFields, following: Block | None = None,
        args: Sequence[Any] = (),
    ) -> list[Velocity]:  # fmt: skip
        """One ``v(t, x)`` per stage, or of a scheme per use of a field, to which its further arguments are bound.

        Args:
            method: of the step.
            stage_fields: "tied", "chained" or "untied", as in :class:`~odenets.Flow`.
            following: the next block, whose first field is that of the last stage where this block has none for it.
            args: what the fields take besides.

        Returns:
            The velocities.
        """
        fields: list[Any] = list(self.fields)
        tied, uses = stage_fields == "tied", uses_of(method) if stage_fields == "tied" else ()
        if tied:
            fields, stages = [v for v, n in zip(fields, uses) for _ in range(n)], [i for n in uses for i in range(n)]  # noqa: B905 - torch 2.8's compiler takes strict=False for True
        else:
            if len(fields) < method.stages:
                fields.append((following or self).fields[0])
            stages = [0] * len(fields)
        if tied or args:  # which must not be taken for the stage
            fields = [
                partial(v, stage=i) if isinstance(v, VelocityField) else v for v, i in zip(fields, stages, strict=True)
            ]
        fields = [_conditioned(field, args) for field in fields] if args else fields
        return [at_stage(v, i) for v, i in zip(fields, stages, strict=True)] if self._by_stage else fields

    def copy_within(self, whole: nn.Module) -> Block:
        """A copy, which shares what the block shares with other parts of the ``whole`` that it is in."""
        elsewhere = _held(whole) - _held(self)
        return copy.deepcopy(self, {id(one): one for one in elsewhere})

    def extra_repr(self) -> str:
        """The step size, as ``print`` shows it."""
        return f"h={self.h:.12g}"


def _conditioned(field: Callable[..., Tensor], args: Sequence[Any]) -> Velocity:
    return lambda t, x, *injected: field(t, x, *injected, *args)


def check_arguments(field: Any, args: Sequence[Any] | None) -> None:
    """That a field takes t, x and these further arguments, or, where they are None, t and x at least.

    Raises:
        TypeError: it does not.
    """
    remedy = "; wrap a network without t in a module that drops it, and give what a field takes besides after x"
    if args:
        named = any(isinstance(one, str | bool) for one in args)
        remedy = "; readout, full_passes and check are keywords" if named else ""
    stage: dict[str, Any] = {"stage": 0} if isinstance(field, VelocityField) else {}
    check_call(field, args, remedy=remedy, **stage)


def take_step(
    block: Block, args: Sequence[Any], fields: Sequence[Velocity], t: Any, x: Tensor, h: float, method: Any,
    first: Any = None, *, closing: bool = True, reductions: Collection[str] = (),
) -> Step:  # fmt: skip
    """:func:`solvers.rk_step` with the fields of a block, or the step of a scheme; one that takes no args is named."""
    try:
        if isinstance(method, Scheme):
            learned = block.fields[len(method.uses)] if len(block.fields) > len(method.uses) else None
            return method.take(fields, learned, t, x, h, first, reductions)
        return rk_step(fields, t, x, h, method, first, closing=closing, reductions=reductions)
    except TypeError:
        check_arguments(block.fields[0], args)
        raise


def block_list(blocks: Iterable[nn.Module]) -> list[Block]:
    """The blocks as a list.

    Raises:
        TypeError: there are none, or one of them is something else.
    """
    blocks = list(blocks)
    other = next((block for block in blocks if not isinstance(block, Block)), None)
    if other is not None or not blocks:
        got = "none" if other is None else type(other).__name__
        raise TypeError(f"blocks must be at least one odenets.Block, Block([field], h), got {got}")
    return cast(list[Block], blocks)


def check_blocks(blocks: Iterable[Block], method: ButcherTableau, stage_fields: StageFields) -> None:
    """That blocks are of a method: as many fields as its steps evaluate, and what its blocks learn besides.

    Raises:
        ValueError: one is of another.
    """
    fields = fields_per_block(method, stage_fields)
    kind = type(method.learned(0, 1)) if isinstance(method, Scheme) and method.learns else type(None)
    no_field = Learned | LearnedTableau
    for m, block in enumerate(blocks):
        own, *more = [*block.fields][fields:] or [None]
        if (
            len(block.fields) < fields
            or more
            or type(own) is not kind
            or isinstance(block.fields[fields - 1], no_field)
        ):
            besides = "" if kind is type(None) else f" and a {kind.__name__}"
            got = ", ".join(type(one).__name__ for one in block.fields)
            raise ValueError(
                f"blocks of {method.name} must have {fields} field{'s' * (fields > 1)}{besides}, got block {m} of {got}"
                ": blocks go with the solver that they were made for"
            )


def _held(module: nn.Module) -> Counter[Any]:
    """How often a module holds each module and parameter."""
    every = *module.named_modules(remove_duplicate=False), *module.named_parameters(remove_duplicate=False)
    return Counter(one for _, one in every)


def check_sharing(stage_fields: StageFields, shared: bool) -> None:
    """Refuse another way to share fields than there is.

    Raises:
        ValueError: unknown stage fields, or some that are not tied in a shared block.
    """
    if stage_fields not in ("tied", "chained", "untied"):
        raise ValueError(f"stage_fields must be 'tied', 'chained' or 'untied', got {stage_fields!r}")
    if shared and stage_fields != "tied":
        raise ValueError("shared uses one field for all blocks: stage_fields must be 'tied'")


def step_sizes(h: float | Sequence[float] | None, total_time: float | None, depth: int) -> tuple[float, ...]:
    """One step size per block, as :class:`~odenets.Flow` says.

    Raises:
        ValueError: no block, not so many, not positive and finite, or both h and a total time.
        TypeError: no numbers.
    """
    if not isinstance(depth, Integral) or isinstance(depth, bool):
        raise TypeError(f"depth must be a whole number, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if h is not None and total_time is not None:
        raise ValueError("h and total_time exclude each other: total_time is the sum of all h")
    if h is None:
        h = (1.0 if total_time is None else total_time) / depth
    single = isinstance(h, Real) or getattr(h, "ndim", 1) == 0  # a tensor of one number is refused below
    sizes: list[Any] = [h] * depth if single else list(cast(Any, h))
    if not all(isinstance(size, Real) for size in sizes):
        raise TypeError(f"h must be a number, or one for each block, got {h!r:.80}")
    if len(sizes) != depth:
        raise ValueError(f"h must hold one step size per block, got {len(sizes)} for depth {depth}")
    for size in sizes:
        if not (math.isfinite(size) and size > 0):
            raise ValueError(f"h must be positive and finite, got {size}")
    return tuple(map(float, sizes))


def uses_of(method: ButcherTableau) -> tuple[int, ...]:
    """How often a step evaluates each field of a block that has tied ones."""
    return method.uses if isinstance(method, Scheme) else (method.stages,)


def fields_per_block(tableau: ButcherTableau, stage_fields: StageFields) -> int:
    """How many fields a block of a method has."""
    if stage_fields == "tied":
        return len(uses_of(tableau))
    return tableau.stages - (stage_fields == "chained" and tableau.fsal)


def make_blocks(
    source: FieldSource, sizes: Sequence[float], tableau: ButcherTableau, stage_fields: StageFields
) -> list[Block]:
    """One block per step size, with new fields.

    Raises:
        TypeError, ValueError: the source makes no modules, or one and the same at each call.
    """
    per_block = fields_per_block(tableau, stage_fields)
    fields = [_new_field(source, first=not i) for i in range(per_block * len(sizes))]
    if len(fields) > 1 and len(set(fields)) == 1:
        raise ValueError(
            f"field must make a new module at each call, got one and the same {len(fields)} times: take "
            "field=lambda: MyField(...), or shared=True for one field in all blocks"
        )
    if stage_fields == "tied":
        uses = uses_of(tableau) * len(sizes)
        fields = [_with_stages(field, max(n, 1)) for field, n in zip(fields, uses, strict=True)]
    blocks = [Block(fields[m * per_block : (m + 1) * per_block], size) for m, size in enumerate(sizes)]
    if isinstance(tableau, Scheme) and tableau.learns:
        for m, block in enumerate(blocks):
            like = next(block.parameters(), torch.empty(()))
            if (learned := tableau.learned(m, len(blocks))) is not None:
                block.fields.append(learned.to(like.device, like.dtype))
    return blocks


def _new_field(source: FieldSource, *, first: bool) -> nn.Module:
    """The given field itself the first time, then copies of it with parameters drawn anew."""
    if not isinstance(source, nn.Module):
        if not callable(source) or mismatch(source):
            function = callable(source) and not mismatch(source, 0.0, None)
            got = "a function of t and x" if function else type(source).__name__
            remedy = "odenets.NeuralODE takes it as it is; here, put it into the forward of a module"
            remedy = remedy if function else "for a field per block of one's own, Flow.of([Block([field], h), ...])"
            raise TypeError(
                f"field must be a module v(t, x), or a function without arguments that makes one, got {got}, "
                f"{source!r:.80}: {remedy}"
            )
        field = source()
        if not isinstance(field, nn.Module):
            raise TypeError(f"field must make a torch module, got {type(field).__name__}")
        check_arguments(field, None)
        return field
    if first:
        check_arguments(source, None)
        return source
    field = copy.deepcopy(source)
    getattr(field, "reset_parameters", partial(reset_modules, field))()
    return field


def _with_stages(field: nn.Module, stages: int) -> nn.Module:
    """The field, or a copy with the same parameters where its batch norms lack statistics of their own per stage."""
    norms = [module for module in field.modules() if isinstance(module, StageBatchNorm)]
    own = isinstance(field, VelocityField) and type(field).expand_stages is not VelocityField.expand_stages
    if not own and all(norm.stages == stages for norm in norms):
        return field
    field = copy.deepcopy(field, {id(p): p for p in field.parameters()})
    if isinstance(field, VelocityField):
        field.expand_stages(stages)
    else:
        expand_stages(field, stages)
    return field
