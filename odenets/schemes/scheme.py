"""Scheme: how a block of a flow comes by its residue, where that is no Runge-Kutta step of one field."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from solvers import ButcherTableau, RootFinder, Step, combine, finish_step
from solvers.field_calls import check_unchanged, countable, counting, velocity, versions_of
from solvers.tableaus import Embedded, Row

__all__ = ["Calls", "Learned", "Memory", "Scheme", "Velocity"]

Velocity = Callable[[float | Tensor, Tensor], Tensor]
"""A velocity ``v(t, x)``, of a time and a state ``(B, *S)``."""


_RESERVED = {one.name for one in fields(ButcherTableau)} | {
    "calls", "draws", "inside_calls", "learned", "learns", "memory", "outputs", "residue", "structure", "take", "uses",
}  # fmt: skip
"""Names that a scheme has for something else than an option."""


class Memory(NamedTuple):
    """What a step hands on to the next one.

    >>> Memory(torch.zeros(4, 2), 0.5).h
    0.5

    Attributes:
        value: the velocity that it hands on, ``(B, *S)``.
        h: its step size.
        versions: torch's count of writes into the value, or None where it does not count.
    """

    value: Tensor
    h: float
    versions: list[int] | None = None


class Calls:
    """The calls of fields within a step: what each returns has the shape of its input and is not written into."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.versions: list[int] | None = []

    def __call__(self, field: Velocity, t: float | Tensor, x: Tensor, stage: int) -> Tensor:
        """The velocity at ``x`` ``(B, *S)``."""
        p = velocity(field, t, x, stage)
        version = versions_of([p])
        self.values.append(p)
        self.versions = None if version is None or self.versions is None else [*self.versions, *version]
        return p

    def check(self, memory: Memory | None) -> None:
        """That nothing was written into what the fields have returned, in this step and in the one before.

        Raises:
            ValueError: a field has.
        """
        check_unchanged(self.values, self.versions)
        if memory is not None:
            check_unchanged([memory.value], memory.versions)


class Learned(nn.Module):
    """What a block of a scheme learns or draws besides its fields, which is no field."""


@dataclass(frozen=True)
class Scheme(ButcherTableau):
    """A rule for the residue of a block, ``x1 = x0 + h r``: what a :class:`~odenets.Flow` takes as its solver.

    A subclass defines :meth:`residue`, and may say that a block has several fields, how often a step evaluates each
    (:attr:`uses`), what a block learns besides (:meth:`learned`), whether a step reads the one before it
    (:attr:`memory`), calls its fields until an iteration ends (``iterates``, which batch norms in training mode do
    not bear), or has an end that h does not change (not :attr:`follows_time`, so that no other depth stands for it). To
    what measures steps, the residue is the one stage of the step: the action is ``h <r^2>``, and there is no embedded
    error. Its own attributes are the arguments of the class; it has the same value as another with the same ones.

    >>> import odenets
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Damped(Scheme):
    ...     rate: float = 0.1
    ...
    ...     def residue(self, fields, learned, t, x, h, memory):
    ...         return fields[0](t, x) - self.rate * x
    >>> odenets.Flow(odenets.MLPField(2), solver=Damped(0.5), depth=3)(torch.ones(4, 2)).shape
    torch.Size([4, 2])
    """

    name: str = field(init=False, repr=False, default="")
    order: int = field(init=False, repr=False, default=1)
    c: Row = field(init=False, repr=False, default=(0.0,))
    a: tuple[Row, ...] = field(init=False, repr=False, default=((),))
    b: Row = field(init=False, repr=False, default=(1.0,))
    embedded: tuple[tuple[str, Embedded], ...] = field(init=False, repr=False, default=())
    low: str | None = field(init=False, repr=False, default=None)
    dense: tuple[Row, ...] | None = field(init=False, repr=False, default=None)
    roots: RootFinder = field(init=False, repr=False, default_factory=RootFinder)
    implicit: bool = field(init=False, repr=False, default=False)
    explicit: bool = field(init=False, repr=False, default=False)
    fsal: bool = field(init=False, repr=False, default=False)
    error_weights: Row | None = field(init=False, repr=False, default=None)
    stages: int = field(init=False, repr=False, default=0)
    interior: int = field(init=False, repr=False, default=0)
    structure: ClassVar[str] = "blocks"
    memory: ClassVar[bool] = False
    iterates: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            raise TypeError(
                f"{cls.__name__} must have its options as fields of a frozen dataclass, by which it is compared and "
                "saved, and no __init__: @dataclass(frozen=True), and weight: float = 0.5 in the class"
            )
        for key, kind in vars(cls).get("__annotations__", {}).items():
            default = vars(cls).get(key)
            own = "ClassVar" in str(kind) or (isinstance(default, Field) and (not default.init or key == "roots"))
            if key in _RESERVED and not own:
                raise TypeError(
                    f"{cls.__name__} must name its option {key!r} otherwise: every scheme has a {key} of its own"
                )

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or type(self).__name__)
        super().__post_init__()

    def adopt(self, tableau: ButcherTableau) -> None:
        """Take the stages of a ``tableau``, their weights and its embedded outputs, before the scheme is complete."""
        for key in ("order", "c", "a", "b", "embedded", "low"):
            object.__setattr__(self, key, getattr(tableau, key))

    @property
    def uses(self) -> tuple[int, ...]:
        """How often a step evaluates each field of a block; statistics of batch norms are apart for each time."""
        return (1,)

    @property
    def calls(self) -> int:
        """Field calls of a step."""
        return sum(self.uses)

    @property
    def follows_time(self) -> bool:
        """Whether the end of a block depends on h, so that another depth may stand for it."""
        return True

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers in training mode, so that it is another one each time."""
        return False

    @property
    def learns(self) -> bool:
        """Whether a block has something besides its fields, which is then behind them in ``block.fields``."""
        return type(self).learned is not Scheme.learned

    def learned(self, m: int, depth: int) -> nn.Module | None:
        """What block ``m`` of ``depth`` learns or draws besides its fields, made for each, or None."""
        return None

    def of_channels(self, channels: int) -> Scheme:
        """The scheme for images of so many ``channels``, where what its blocks learn depends on that; else itself."""
        return self

    def of_share(self, begin: float, end: float) -> Scheme:
        """The scheme for the blocks from one share of a network's to another, ``begin`` to ``end``; else itself."""
        return self

    @property
    def settings(self) -> str:
        """Those that decide what a network of the same weights computes, which files of weights hold."""
        return repr(self)

    def fields_see(self, x: Tensor) -> Tensor:
        """Of a state ``x`` ``(B, *S)`` what the fields get, by which a flow without a field makes one."""
        return x

    def residue(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None
    ) -> Tensor:
        """The residue ``r`` of a block.

        Args:
            fields: the velocities, each field as often as a step evaluates it.
            learned: what :meth:`learned` made for the block.
            t: time at the start of the step.
            x: state there, ``(B, *S)``.
            h: step size.
            memory: of the step before, where the scheme has a memory; None at the first step.

        Returns:
            The residue, ``(B, *S)``.

        Raises:
            NotImplementedError: a scheme that does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define residue(fields, learned, t, x, h, memory)")

    def take(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None,
        reductions: Collection[str] = ()
    ) -> Step:  # fmt: skip
        """One step from ``x`` at ``t``.

        Args:
            fields, learned, t, x, h, memory: as in :meth:`residue`.
            reductions: as in :func:`solvers.rk_step`.

        Returns:
            The step.

        Raises:
            TypeError, ValueError: as of a step of :func:`solvers.rk_step`.
        """
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with counting():
                x = countable(x)
                memory = memory and memory._replace(value=countable(memory.value))
                return self.take(fields, learned, t, x, h, memory, reductions)
        stages, tableau = self.stages_of(fields, learned, t, x, h, memory)
        if not reductions:
            return Step(t, h, x, combine(x, stages, tableau.b, h), stages, tableau)
        x1, computed = finish_step(
            x, stages, tableau, h, action="action" in reductions, residue="residue" in reductions
        )
        assert x1 is not None
        return Step(t, h, x, x1, stages, tableau, computed)

    def stages_of(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None
    ) -> tuple[tuple[Tensor, ...], ButcherTableau]:
        """The stages of a step, and the tableau that weighs them: its residue, and the scheme itself.

        Args:
            fields, learned, t, x, h, memory: as in :meth:`residue`.

        Returns:
            The stages, each ``(B, *S)``, and the tableau.

        Raises:
            ValueError: a residue that is not like x, or other calls of the fields than :attr:`uses` says.
        """
        calls = Calls()
        r = self.residue([partial(calls, v, stage=i) for i, v in enumerate(fields)], learned, t, x, h, memory)
        calls.check(memory)
        if len(calls.values) != self.calls and not self.draws:
            raise ValueError(
                f"{self.name} says by its uses {self.uses} that a step calls its fields {self.calls} times, and called "
                f"them {len(calls.values)} times"
            )
        if not isinstance(r, Tensor) or r.shape != x.shape or r.dtype != x.dtype or r.device != x.device:
            got = f"{tuple(r.shape)}, {r.dtype}, {r.device}" if isinstance(r, Tensor) else type(r).__name__
            raise ValueError(
                f"the residue of {self.name} must have the shape, dtype and device of x, {tuple(x.shape)}, {x.dtype}, "
                f"{x.device}, got {got}"
            )
        return (r,), self

    def forwarding(self, name: str) -> ButcherTableau:
        """None: a scheme carries on what it is.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"full_passes carry the embedded output {name!r} on, which blocks of {self.name} do not: take "
            "flow.outputs(x), those of the last block"
        )

    def hands_on(self, step: Step) -> Memory | None:
        """What the next step reads of a ``step``, where the scheme has a memory."""
        if not self.memory:
            return None
        value = step.stages[0]
        return Memory(value, float(step.h), versions_of([value]))
