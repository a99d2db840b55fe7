"""The program of a model as a graph: the operations of one pass, and the borders of modules that results pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from odenets.adapting.program.places import Place, Site

__all__ = ["Call", "FailedPass", "Node", "Passage", "Program", "Run"]


@dataclass(eq=False, repr=False)
class Node:
    """The result of an operation.

    Attributes:
        index: the time at which it is computed.
        op: the name of the operator, "add", without its namespace and overload; "input", "parameter", "constant".
        inputs: what it is computed from.
        shape: of the tensor.
        fixed: whether it depends on no input of the model.
        learned: whether it is fixed and depends on a parameter.
        same: whether its elements are those of its first input, in the same order.
        call: the call of the module in which it is computed.
        site: where in Python it is computed.
        users: what is computed from it.
        returned: whether it is part of the output.
    """

    index: int
    op: str
    inputs: tuple[Node, ...] = ()
    shape: tuple[int, ...] = ()
    floating: bool = True
    fixed: bool = False
    learned: bool = False
    same: bool = False
    call: Call | None = None
    site: Site | None = None
    users: list[Node] = field(default_factory=list)
    returned: bool = False

    def __repr__(self) -> str:
        return f"<{self.op} {self.shape} at {self.index}>"

    @property
    def value(self) -> Node:
        """What has the same elements and was computed first."""
        node = self
        while node.same:
            node = node.inputs[0]
        return node


@dataclass(eq=False)
class Call:
    """A call of a module: its name, the call in which it happens, and whether it is the run of a recorder."""

    name: str
    parent: Call | None
    recorder: bool = False

    @property
    def chain(self) -> tuple[Call, ...]:
        """The calls from the model's own to this one."""
        return (*(self.parent.chain if self.parent is not None else ()), self)


class Passage(NamedTuple):
    """A tensor that passes a place: when, and in which call of a module."""

    time: int
    place: Place
    node: Node
    call: Call


class FailedPass(Exception):
    """A model raises in a pass that is traced; its error is the cause."""


class Run(NamedTuple):
    """A run of a module that records its own steps: when it ended, the name of the module, the state that it takes."""

    time: int
    name: str
    state: Node | None


@dataclass(repr=False)
class Program:
    """One pass of a model: its operations, what passes the borders of modules and its output."""

    nodes: list[Node]
    passages: list[Passage]
    output: Any
    rows: dict[Node, tuple[Tensor, ...]]  # of sums: mean squares, by which the rows of two passes are compared
    draws: list[str]  # where random numbers are drawn
    reads: list[str]  # where Python reads from data that depends on the inputs
    numbers: list[str]  # those of them where it reads more than yes or no
    decisions: (
        list[bool] | None
    )  # what functions say that is yes or no, in order; None where none depends on the inputs
    recorders: list[Run]  # of modules that record their own steps
