"""Penalties of steps: training by what the steps measure, such as the error that a solver estimates of them.

>>> import torch, odenets
>>> from odenets.least_action import ActionPenalty
>>> flow = odenets.NeuralODE(odenets.MLPField(2), solver="bs23")
>>> network = odenets.Network(nn.Linear(4, 2), flow, nn.Linear(2, 3))
>>> x, y = torch.randn(8, 4), torch.arange(8) % 3
>>> ErrorPenalty(1.0)(network, x, y).backward()  # cross-entropy and the embedded error
>>> JacobianPenalty(0.01)(network, x, y).backward()  # cross-entropy and the Jacobians of the steps
>>> both = ErrorPenalty(1.0, ActionPenalty(0.1))  # and the action
>>> loss = both(network, x, y)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from odenets.errors import check_count, refuse
from odenets.measures import Measure, StepFunction, error, jacobian, measure, step_size
from odenets.measures.derivatives import DISTRIBUTIONS
from odenets.recording import Records
from odenets.training.costs import WithCost, check_weight
from odenets.training.objectives import Batch, Objective
from solvers import Step

__all__ = ["ErrorPenalty", "JacobianPenalty", "Penalty"]


@measure(reduction="error")
def error_penalty(step: Step) -> Tensor:
    """Embedded error of a ``step``, root mean square over the features, times ``|h|``, ``(B,)``."""
    return error(step) * abs(step_size(step))


@measure(reduction="error")
def square_error_penalty(step: Step) -> Tensor:
    """Square of the embedded error of a ``step``, mean over the features, ``(B,)``."""
    return error(step).square()


@measure(closing=False, gradient=True)
def jacobian_penalty(step: Step, *, probes: int = 1, distribution: str = "rademacher") -> Tensor:
    """Estimate of ``|dr/dx0|_F^2 / D`` of a ``step`` times ``|h|``, with :func:`~odenets.measures.jacobian`, ``(B,)``.

    ``probes`` and ``distribution`` are those of it.
    """
    return jacobian(step, probes=probes, distribution=distribution) * abs(step_size(step))


@dataclass(frozen=True)
class Total:
    """What a measure of that name costs: the mean over the samples of its sum over the steps."""

    name: str

    def __call__(self, records: Mapping[str, Tensor]) -> Tensor:
        return records[self.name].sum(0).mean()


class _Weighed(WithCost):
    """``L + weight * C``, where C is the total of a measure."""

    def __init__(self, weight: float, name: str, measure: StepFunction, task: Objective | None) -> None:
        super().__init__(task, name, measure, Total(name))
        self.weight, self.name = weight, name

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The task's loss of ``network``, ``batch``, ``output`` and ``records``, and the weighted cost, a scalar."""
        self.check_records(records)
        loss, cost = self.parts(network, batch, output, records)
        return loss + self.weight * cost

    def extra_repr(self) -> str:
        """Weight and name of the measure."""
        return f"weight={self.weight:g}, measure={self.name!r}"


class Penalty(_Weighed):
    """``L + weight * C``, where C is a measure of the steps: summed over the steps, mean over the samples.

    ``batch_figures()`` tells L and C of the last batch; the ``validation_loss`` of :func:`odenets.training.fit` is L
    alone, and its ``train_loss`` both.

    Args:
        weight: of C, not negative.
        measure: a function ``Step -> (B,)``, see :mod:`odenets.measures`.
        task: what is to be solved, L; cross-entropy if not given. Another penalty is a task too, and so is
            :class:`~odenets.least_action.LeastAction`.
        name: of the measure in the records; its own if not given.

    Raises:
        TypeError: a weight that is no number, a measure that is no function, or a task that is no objective.
        ValueError: a weight that is negative or not finite, or a task that records another measure by that name.

    >>> import torch, odenets
    >>> from odenets.measures import displacement
    >>> network = odenets.models.points_network(depth=2)
    >>> loss = Penalty(0.1, displacement)(network, torch.rand(8, 2), torch.arange(8) % 2)
    """

    def __init__(
        self, weight: float, measure: StepFunction, task: Objective | None = None, *, name: str | None = None
    ) -> None:
        check_weight(weight, "Penalty(0.1, measure)")
        if isinstance(measure, Objective) or not callable(measure):
            raise TypeError(
                f"measure must be a function Step -> (B,) such as odenets.measures.error, got {type(measure).__name__}"
            )
        if name is None:
            named = "name" if isinstance(measure, Measure) else "__name__"
            name = str(getattr(measure, named, type(measure).__name__))
        super().__init__(weight, name, measure, task)


class ErrorPenalty(_Weighed):
    """``L + weight * R``, where R adds up the errors that the solver estimates: what is easy to solve costs least.

    With the embedded error ``E_j`` of step j, root mean square over the features in the unit of the state, R is the
    mean over the samples of

    - "error": ``sum_j E_j |h_j|``, the regularizer ``R_E`` of Pal et al. (2021);
    - "square": ``sum_j E_j^2``, whose gradient vanishes with the error.

    A solve that controls its error has the estimate at hand, so that no field is evaluated for it. So it is with
    "heun", "midpoint" and the like at fixed steps; an FSAL method, as "bs23" and "dopri5", evaluates its closing stage
    then: once in a pass of a :class:`~odenets.NeuralODE`, once for each block of a :class:`~odenets.Flow` whose
    blocks have weights of their own. Gradients flow through the stages of all steps that are accepted, while their
    sizes h are constants. The error is not divided by the tolerance, so that a weight means the same at another one.

    ``batch_figures()`` tells L and R of the last batch, as of every :class:`Penalty`.

    Where one field with smooth stages makes a step, it is that field's curvature along the path that costs: of a method
    of order q+1 with an estimate of order q, ``E`` is ``h^(q+1)`` times derivatives of that order. The stages of an
    untied block are not samples of one velocity, and E then measures how far they differ.

    Args:
        weight: of R, not negative.
        task: what is to be solved, L; cross-entropy if not given.
            ``ErrorPenalty(1.0, ActionPenalty(0.1))`` has both.
        kind: "error" or "square".

    Raises:
        TypeError: a weight that is no number, or a task that is no objective.
        ValueError: a weight that is negative or not finite, or an unknown kind. Where the network is recorded: a method
            without an embedded error, or a neural ODE that keeps no steps, with an event or under another gradient than
            "direct".

    References:
        Pal, Ma, Shah, Rackauckas. Opening the blackbox: accelerating neural differential equations by regularizing
        internal solver heuristics. ICML 2021.

    >>> import torch, odenets
    >>> flow = odenets.NeuralODE(odenets.MLPField(2), solver="heun", steps=4)
    >>> network = odenets.Network(nn.Linear(4, 2), flow, nn.Linear(2, 3))
    >>> objective = ErrorPenalty(1.0, kind="square")
    >>> objective(network, torch.randn(8, 4), torch.arange(8) % 3).backward()
    >>> flow.evaluations
    8
    """

    def __init__(
        self,
        weight: float,
        task: Objective | None = None,
        *,
        kind: Literal["error", "square"] = "error",
        **unknown: Any,
    ) -> None:
        refuse("ErrorPenalty", unknown, dict.fromkeys(("cost", "p", "norm", "power"), "kind, 'error' or 'square'"))
        kinds = {"error": error_penalty, "square": square_error_penalty}
        if kind not in kinds:
            raise ValueError(f"kind must be 'error' or 'square', got {kind!r}")
        check_weight(weight, "ErrorPenalty(0.1, task)")
        super().__init__(weight, kinds[kind].name, kinds[kind], task)


class JacobianPenalty(_Weighed):
    """``L + weight * J``: what bends little is robust to changes of its inputs, and easy to solve.

    With the residue ``r_m`` of step m at its state ``x_m`` of D features, J is the mean over the samples of
    ``sum_m |h_m| |dr_m/dx_m|_F^2 / D``, for one field the integral of the squared Frobenius norm of its Jacobian along
    the path, which halving a block hardly changes. It is estimated without bias by Hutchinson's probes e, as
    ``|e^T dr_m/dx_m|^2``, see :func:`~odenets.measures.jacobian`: each takes a backward pass through the steps, and
    the gradient of the loss is one through that. Fields are differentiated twice; of piecewise linear activations, as
    ReLU, J has a gradient in the weights though their second derivative is 0.

    Any network that records its steps takes part, whether its encoder trains or not: the objective calls it with inputs
    that require a gradient, also in eval mode and under ``torch.no_grad``. Refused are steps that each sample takes by
    itself, those of a ReversibleFlow and of implicit methods, solves that keep no steps, blocks of adapted models
    whose samples do not lie in the first dimension, ``torch.compile`` and ``fit_instances``.
    A block of an adapted model that starts from a projection has the Jacobian at the projection's output, to which its
    branch is added: that of the activation behind the sum alone.

    ``batch_figures()`` tells L and J of the last batch, as of every :class:`Penalty`.

    Args:
        weight: of J, not negative.
        task: what is to be solved, L; cross-entropy if not given.
        probes: how many are drawn for each step, by torch's generator.
        distribution: "rademacher", entries -1 or 1, or "gaussian".

    Raises:
        TypeError: a weight or probes that are no number, or a task that is no objective.
        ValueError: a weight that is negative or not finite, no probe, or an unknown distribution. Where the network is
            recorded: what is refused.

    References:
        Hoffman, Roberts, Yaida. Robust learning with Jacobian regularization. arXiv:1908.02729.
        Finlay, Jacobsen, Nurbekyan, Oberman. How to train your neural ODE. ICML 2020, arXiv:2002.02798.

    >>> import torch, odenets
    >>> network, x, y = odenets.models.points_network(depth=3), torch.rand(8, 2), torch.arange(8) % 2
    >>> JacobianPenalty(0.1, probes=2)(network, x, y).backward()
    """

    def __init__(
        self,
        weight: float,
        task: Objective | None = None,
        *,
        probes: int = 1,
        distribution: Literal["rademacher", "gaussian"] = "rademacher",
        **unknown: Any,
    ) -> None:
        refuse(
            "JacobianPenalty",
            unknown,
            dict.fromkeys(("n", "num_proj", "projections", "samples"), "probes") | {"kind": "distribution"},
        )
        check_weight(weight, "JacobianPenalty(0.1, task)")
        check_count("probes", probes, 1)
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be 'rademacher' or 'gaussian', got {distribution!r}")
        chosen = {"probes": probes} if probes != 1 else {}
        chosen |= {"distribution": distribution} if distribution != "rademacher" else {}
        super().__init__(weight, "jacobian_penalty", jacobian_penalty.bind(**chosen), task)
