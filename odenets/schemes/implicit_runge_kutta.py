"""RKCNN-I: diagonally implicit Runge-Kutta steps whose coefficients each block learns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from odenets.schemes.scheme import Learned, Memory, Scheme, Velocity
from solvers import ButcherTableau, RootFinder, Step, get_tableau, rk_step
from solvers.coefficients import ImplicitCoefficients
from solvers.learned import CONDITIONS, nearest_weights
from solvers.validation import real_dtype

__all__ = ["ImplicitWeights", "LearnedImplicitRungeKutta"]


class ImplicitWeights(Learned):
    """The coefficients of a block: those of a method at first.

    Diagonal entries are ``a_ii exp(d_i)`` with a learned d, so that they stay positive; those below change freely; b is
    the nearest to free weights that satisfies the conditions of the order, as in :class:`solvers.LearnedTableau`.

    Args:
        start: the method.
        order: that is kept.

    Attributes:
        change_a: of the entries below the diagonal, row by row, ``(stages (stages - 1) / 2,)``.
        change_diagonal: logarithm of the ratio to the first ones, ``(stages,)``; not read where a stage is explicit.
        change_b: of the free weights, ``(stages,)``, or None where b follows from a.
    """

    def __init__(self, start: ButcherTableau, order: int) -> None:
        super().__init__()
        n = len(start.c)
        rows = [[*row, *[0.0] * (n - len(row))] for row in start.a]
        self.name, self.order, self._start = start.name, order, torch.tensor([*rows, start.b], dtype=torch.float64)
        self.change_a = nn.Parameter(torch.zeros(n * (n - 1) // 2)) if n > 1 else None
        self.change_diagonal = nn.Parameter(torch.zeros(n))
        self.change_b = nn.Parameter(torch.zeros(n)) if n > CONDITIONS[order] else None

    def reset_parameters(self) -> None:
        """Take the first coefficients again."""
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()

    def coefficients(self, x: Tensor, roots: RootFinder) -> ImplicitCoefficients:
        """Those of this moment, in the precision and on the device of a state ``x``; gradients flow to the parameters.

        Raises:
            ValueError: no weights b satisfy the conditions.
        """
        *rows, free = self._start.to(self.change_diagonal.device)
        a, n = torch.stack(rows), len(free)
        a = a.tril(-1) + torch.diag(a.diagonal() * self.change_diagonal.double().exp())
        if self.change_a is not None:
            below = torch.tril_indices(n, n, -1, device=a.device)
            a = a.index_put((below[0], below[1]), self.change_a.double(), accumulate=True)
        c = a.sum(1)
        b = nearest_weights(
            free if self.change_b is None else free + self.change_b.double(), a, c, self.order, f"learned {self.name}"
        )
        a, b, c = (one.to(x.device, real_dtype(x)) for one in (a, b, c))
        explicit = (self._start[:-1].diagonal() == 0).tolist()
        of_rows = tuple(row[: i + 1 - explicit[i]] for i, row in enumerate(a.unbind()))
        return ImplicitCoefficients(f"learned {self.name}", self.order, c.unbind(), of_rows, b, roots)

    def get_extra_state(self) -> Tensor:
        """The order and the first coefficients, so that they travel with ``state_dict``, float64."""
        return torch.cat([torch.tensor([self.order], dtype=torch.float64), self._start.flatten()])

    def set_extra_state(self, state: Tensor) -> None:
        """Compare those of a ``state_dict``.

        Raises:
            ValueError: they are another method's.
        """
        own = self.get_extra_state()
        if state.shape != own.shape or not torch.equal(state.double().cpu(), own):
            raise ValueError(f"the state is of coefficients that begin with another method than {self.name}: take that")

    def extra_repr(self) -> str:
        """The method, as ``print`` shows it."""
        return f"{self.name!r}, order={self.order}"


@dataclass(frozen=True)
class LearnedImplicitRungeKutta(Scheme):
    """RKCNN-I: a diagonally implicit Runge-Kutta method for each block, whose coefficients train with its field.

    ``p_i = v(t + c_i h, x + h sum_{j <= i} a_ij p_j)`` and ``x1 = x + h sum_i b_i p_i``, where a and b are learned,
    a_ii > 0, and the nodes c are the sums of the rows of a. Stages are roots, found as those of an implicit method;
    gradients are those of the implicit function, also to the coefficients. The order of the start is kept, up to 2, and
    1 with a single stage; not 3, of which methods as kvaerno5 satisfy two conditions by one. Batch norms in training
    mode are refused.
    Reference: Zhu, Chang, Fu. Convolutional neural networks combined with Runge-Kutta methods. arXiv:1802.08831, whose
    stages depend on each other without the diagonal's restriction and are approximated by convolutions.

    Args:
        start: the implicit method that each block begins with, its name or tableau: "trapezoid", "implicit_midpoint",
            "implicit_euler", "kvaerno5".
        roots: how stages are found; by default those of the start.

    Raises:
        TypeError, ValueError: a start that is no implicit method, or roots of another kind.

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=LearnedImplicitRungeKutta(), depth=3)
    >>> plain = flow.of([odenets.Block([block.fields[0]], block.h) for block in flow.blocks], solver="trapezoid")
    >>> x = torch.randn(4, 2)
    >>> torch.allclose(flow(x), plain(x), atol=1e-5)
    True
    """

    name: str = field(init=False, repr=False, default="rkcnn_implicit")
    roots: RootFinder = field(default_factory=RootFinder)
    start: str | ButcherTableau = "trapezoid"
    iterates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        begin = get_tableau(self.start)
        if not isinstance(begin, ButcherTableau) or type(begin) is not ButcherTableau or not begin.implicit:
            name = getattr(begin, "name", type(begin).__name__)
            raise ValueError(
                f"start must be a diagonally implicit method, as trapezoid, implicit_midpoint or kvaerno5, got {name}; "
                "explicit ones begin a LearnedRungeKutta"
            )
        if not isinstance(self.roots, RootFinder):
            raise TypeError(f"roots must be a RootFinder, RootFinder('anderson'), got {type(self.roots).__name__}")
        order = min(begin.order, begin.stages, 2)
        self.adopt(ButcherTableau(self.name, order, begin.c, begin.a, begin.b))
        super().__post_init__()
        object.__setattr__(self, "implicit", False)  # a flow hands it all that it hands a scheme
        object.__setattr__(self, "fsal", False)

    @property
    def uses(self) -> tuple[int, ...]:
        """One field, with the same statistics at all stages, one of whose Jacobians serves them."""
        return (1,)

    @property
    def calls(self) -> int:
        """Field calls of a step at least, one for each stage."""
        return self.stages

    def solved_by(self, roots: RootFinder) -> LearnedImplicitRungeKutta:
        """The same with its stages found by others.

        Raises:
            TypeError: roots is no :class:`~solvers.RootFinder`.
        """
        return replace(self, roots=roots)

    def learned(self, m: int, depth: int) -> nn.Module:
        """The coefficients of a block."""
        return ImplicitWeights(get_tableau(self.start), self.order)

    def take(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None = None,
        reductions: Collection[str] = ()
    ) -> Step:  # fmt: skip
        """The Runge-Kutta step with the block's coefficients of this moment.

        Raises:
            NewtonError: a stage is not found.
        """
        method: Any = learned.coefficients(x, self.roots)
        return rk_step(fields[0], t, x, h, method, reductions=reductions)
