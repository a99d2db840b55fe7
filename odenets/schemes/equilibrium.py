"""Deep equilibrium: a block that ends where its field does, whatever the number of iterations that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from odenets.errors import check_number
from odenets.schemes.scheme import Memory, Scheme, Velocity
from solvers import ButcherTableau, RootFinder
from solvers.implicit import ImplicitSteps
from solvers.implicit.iteration import Measure
from solvers.implicit.linear import rows

__all__ = ["Equilibrium"]

_EULER = ButcherTableau("equilibrium", order=1, c=(1.0,), a=((1.0,),), b=(1.0,))


@dataclass(frozen=True)
class Equilibrium(Scheme):
    """Deep equilibrium: a block that ends at the root z of ``z = f(z, x0)``, a network of infinitely many tied layers.

    * injection "sum": ``z = x0 + h v(t + h, z)``, a step of the implicit Euler method, with h = 1 as published;
    * injection "argument": ``z = v(t + h, z, x0)``, of a field that takes the state at the start of the block behind
      its own, and further arguments behind that. The end does not depend on h, and so another depth is refused.

    It is where implicit Euler steps of ``z' = f(z, x0) - z`` lead as their size grows without bound, as its solution
    does where the equilibrium is stable. The root is looked for from x0 on, and no contraction is assumed; fields that
    are small at first, or a small h, are near one. Gradients are those of the implicit function, one linear system in
    each backward pass: memory does not depend on the iterations. There are no second derivatives.

    Batch norms in training mode are refused; dropout keeps a root from being found. Roots are found in float32 or
    float64, also under autocast, and not in a graph of ``torch.compile``.
    Reference: Bai, Kolter, Koltun. Deep equilibrium models. NeurIPS 2019, arXiv:1909.01377.

    Args:
        injection: how x0 enters, "sum" or "argument".
        roots: how the root is found, and in how many iterations at most: by default, of states of up to 200 features
            by matrices, else by Newton's method with Krylov's; ``RootFinder("anderson")`` takes fewer field calls
            where the field is near a contraction, as "fixed_point" does where it is one.
        tolerance: the error of the state that is left, estimated, as a share of it (of the norms of a sample); None
            iterates until rounding.

    Raises:
        TypeError, ValueError: another injection, roots of another kind, or a tolerance out of (0, 1).

    >>> import odenets, torch
    >>> flow = odenets.Flow(odenets.MLPField(2), solver=Equilibrium(), depth=1, h=1.0)
    >>> x = torch.randn(4, 2)
    >>> z = flow(x)
    >>> torch.allclose(z, x + flow.blocks[0].fields[0](0.0, z), atol=1e-5)
    True
    """

    name: str = field(init=False, repr=False, default="equilibrium")
    injection: str = "sum"
    roots: RootFinder = field(default_factory=RootFinder)
    tolerance: float | None = None
    iterates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.injection not in ("sum", "argument"):
            raise ValueError(f"injection must be 'sum' or 'argument', got {self.injection!r}")
        if not isinstance(self.roots, RootFinder):
            raise TypeError(f"roots must be a RootFinder, RootFinder('anderson'), got {type(self.roots).__name__}")
        if self.tolerance is not None and not 0 < check_number("tolerance", self.tolerance) < 1:
            raise ValueError(f"tolerance must be a share in (0, 1), or None, got {self.tolerance}")
        super().__post_init__()

    @property
    def follows_time(self) -> bool:
        """Whether the end of a block depends on h."""
        return self.injection == "sum"

    def solved_by(self, roots: RootFinder) -> Equilibrium:
        """The same with its root found by others.

        Raises:
            TypeError: roots is no :class:`~solvers.RootFinder`.
        """
        return replace(self, roots=roots)

    def stages_of(
        self, fields: Sequence[Velocity], learned: Any, t: float, x: Tensor, h: float, memory: Memory | None
    ) -> tuple[tuple[Tensor, ...], ButcherTableau]:
        """The way to the root over h.

        Raises:
            RuntimeError: no root is found.
        """
        v: Any = fields[0]
        if self.injection == "argument":
            v = lambda t, z: (fields[0](t, z, x) - x) / h  # type: ignore[call-arg]  # noqa: E731
        steps = _Steps(_EULER.solved_by(self.roots), self.tolerance)
        step = steps(v, t, x, h)
        if step.unsolved is not None:
            sample = int((step.unsolved >= 0).argmax())
            raise RuntimeError(
                f"no equilibrium is found (t = {t:.6g}, h = {h:.6g}, sample {sample}): |f(z) - z| / |z| is "
                f"{steps.iteration.residual:.2g} after {steps.calls} field calls. Take a smaller h, a field that is "
                "smaller at first, a penalty of its Jacobian, float64, a larger tolerance, or another "
                "Equilibrium(roots=RootFinder(...)) or more max_iterations; no field that draws at random (dropout in "
                "training mode) has one"
            )
        return step.stages, self


class _Steps(ImplicitSteps):
    """The implicit Euler step whose iteration ends by a share of the state."""

    def __init__(self, tableau: ButcherTableau, tolerance: float | None) -> None:
        super().__init__(tableau)
        self.tolerance = tolerance

    def _measure(self, x: Tensor, h: Any) -> Measure:
        if self.tolerance is None:
            return super()._measure(x, h)
        return _Share(h, max(self.tolerance, 10 * torch.finfo(x.dtype).eps))


class _Share(Measure):
    """The norm of a change over that of the state."""

    def sizes(self, change: Tensor, y: Tensor) -> np.ndarray:
        """Of each sample, ``(B,)``."""
        change = change * self.weight
        norms = [torch.linalg.vector_norm(rows(one), dim=1) for one in (change, y + change)]
        return (norms[0] / (norms[1] + torch.finfo(y.dtype).tiny)).cpu().numpy()
