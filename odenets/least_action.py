"""Least action: train the network that solves the task while moving its data least [K24, section 3.4].

The problem ``min C subject to L = 0``, with L the loss of the task and C the cost of moving the data, is solved by the
method of multipliers: ``L + C / lambda`` is minimized while lambda grows with the loss that is left. A fixed weight is
its relaxation.

>>> import odenets
>>> objective = LeastAction(lambda0=1.0, tau=0.1, every=5)
>>> x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
>>> network = odenets.models.small_network(solver="euler", h=1.0, depth=2)
>>> loss = objective(network, x, y)  # or odenets.training.fit(..., objective=objective)
>>> loss = ActionPenalty(0.1)(network, x, y)  # the relaxation
>>> output, records = network.record(x, action=odenets.measures.action)
>>> Cost("action")(records) == records["action"].sum(0).mean()
tensor(True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, distributed, nn

from odenets import measures
from odenets.errors import check_count, check_number, refuse
from odenets.inputs import samples_in
from odenets.measures import StepFunction
from odenets.modes import keeping_state, total_dtype
from odenets.recording import Records, record, unwrapped
from odenets.training.costs import WithCost, check_weight
from odenets.training.objectives import Batch, Objective
from odenets.training.step_counting import eagerly

__all__ = ["ActionPenalty", "Cost", "LeastAction"]


_ELSEWHERE = {
    **dict.fromkeys(("lam", "lambda_", "lmbda", "lambd", "lambda_0", "multiplier"), "lambda0, the first lambda"),
    **dict.fromkeys(("weight", "alpha", "coefficient"), "the weight of an ActionPenalty, or 1 / lambda0"),
    **dict.fromkeys(("lr", "step_size", "growth"), "tau, how fast lambda grows"),
    **dict.fromkeys(("s", "steps", "interval"), "every, steps between two changes of lambda"),
    **dict.fromkeys(("objective", "criterion", "loss", "loss_fn"), "task, such as Task(F.mse_loss)"),
    "exponent": "p",
}
"""Arguments of :class:`LeastAction` by other names."""


class Cost:
    """What moving the data costs: a number per batch, of one measure.

    Args:
        kind: "action", the kinetic action of the steps, the mean over the samples of ``sum_m h_m sum_i b_i <|p_i|^p>``,
            which halving a block does not change; "residue", the sum over blocks of the mean of ``|r|^p`` of [K24],
            h left out, the same for Euler steps of size 1; "norm", the sum over blocks of the Frobenius norm, not
            squared, of the batch's residues, as in the experiments of [K24] in two dimensions.
        p: the exponent, 2 for the energy; "norm" knows no other.

    The first two are means over the D features of a state, not sums: the squared norm of [K24, eq. 16 and 31] is D
    times as large. For another p they are means of ``|r_i|^p`` over the features i, so that the ground cost is the p-th
    power of the p-norm; [K24, eq. 16] has that of the Euclidean norm, which is another cost.

    Raises:
        TypeError: p that is no number.
        ValueError: an unknown kind, or p below 1.
    """

    def __init__(self, kind: Literal["action", "residue", "norm"] = "action", p: float = 2.0) -> None:
        if kind not in ("action", "residue", "norm"):
            raise ValueError(f"cost must be 'action', 'residue' or 'norm', got {kind!r}")
        p = check_number("p", p)
        if not (math.isfinite(p) and p >= 1) or (kind == "norm" and p != 2):
            raise ValueError(f"p must be at least 1, and 2 for the cost 'norm', got {p}")
        self.kind = kind
        self.measure: StepFunction = {
            "action": measures.action if p == 2 else measures.action.bind(p=p),
            "residue": measures.residue if p == 2 else measures.residue.bind(p=p),
            "norm": measures.square_norm,
        }[kind]

    def __call__(self, records: Mapping[str, Tensor]) -> Tensor:
        """The cost of a batch, a scalar; its ``records`` hold the measure ``(blocks, B)`` by the kind's name."""
        values = records[self.kind]
        if self.kind != "norm":
            return values.sum(0).mean()
        squares = values.sum(1)
        moved = squares > 0
        return (torch.where(moved, squares, 1).sqrt() * moved).sum()  # where nothing moves the gradient is 0


class _WithCost(WithCost):
    """The loss of a task and the cost of moving the data."""

    def __init__(self, task: Objective | None, cost: str | Cost, p: float) -> None:
        if isinstance(cost, Cost) and p != 2:
            raise ValueError(f"p is that of the Cost where one is given, got p={p}: Cost({cost.kind!r}, p={p})")
        cost = cost if isinstance(cost, Cost) else Cost(cost, p)  # type: ignore[arg-type]  # checked there
        super().__init__(task, cost.kind, cost.measure, cost)
        self.kind = cost.kind

    def extra_repr(self) -> str:
        return f"cost={self.kind!r}"


class ActionPenalty(_WithCost):
    """``L + weight * C``: the relaxation with a fixed weight. C is a mean over features, see :class:`Cost`.

    Args:
        weight: of the cost, not negative.
        task: what is to be solved, L; cross-entropy if not given.
        cost, p: kind and exponent of the :class:`Cost`.

    Raises:
        TypeError: a weight that is no number, or a task that is no objective.
        ValueError: a weight that is negative or not finite, or what :class:`Cost` raises.
    """

    def __init__(self, weight: float, task: Objective | None = None, *, cost: str = "action", p: float = 2.0) -> None:
        check_weight(weight, "ActionPenalty(0.1, task)")
        super().__init__(task, cost, p)
        self.weight = weight

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The task's loss of ``network``, ``batch``, ``output`` and ``records``, and the weighted cost, a scalar."""
        self.check_records(records)
        loss, cost = self.parts(network, batch, output, records)
        return loss + self.weight * cost

    def extra_repr(self) -> str:
        """Weight and kind of the cost."""
        return f"weight={self.weight:g}, {super().extra_repr()}"


class LeastAction(_WithCost):
    """``L + C / lambda``, where every s steps ``lambda += tau * L`` [K24, equation 19 and Algorithm 1].

    The cost weighs much at first and the less the longer the task is not solved. The cost C is a mean over features,
    see :class:`Cost`: with D of them, lambda is that of [K24] divided by D.

    The objective counts the steps of one training; in another it goes on from its lambda. :func:`odenets.training.fit`
    tells it of each step, and in a loop of one's own it notices them: before the next loss, or when its state is asked
    for; until then ``multiplier`` is that of before the step. The step of any optimizer of torch that holds weights
    of the network counts once, however many losses it takes (LBFGS, which so minimizes with one lambda), and one that
    ``GradScaler`` skips does not. Steps that are written by hand, and optimizers of copies of the weights, need a call
    of :meth:`after_step` each; without it there is a warning. In eval mode, without gradients, and where
    ``torch.func`` differentiates, it changes nothing. Any other loss is one of training: validate, attack and
    compare in eval mode or without gradients, or "before" takes the first such loss for that of the step.

    Args:
        task: what is to be solved, L; cross-entropy if not given.
        lambda0: first lambda, positive.
        tau: how fast lambda grows, positive.
        every: s, steps of the optimizer between two changes of lambda, a whole number.
        cost, p: kind and exponent of the :class:`Cost`.
        update: "before", every s-th step begins with the change, by the loss of its batch, and takes the new lambda
            already, as the published code has it; "next", the step after every s-th begins with it [K24, eq. 33];
            "after", every s-th step ends with it, by the loss of its batch with the new weights [K24, eq. 19], which
            takes another forward pass: in training mode, with running statistics and random state left as they were. In
            a loop of one's own that is with the next loss; the batch of every s-th step is kept until then. Without
            gradients the objective changes nothing.
        weigh: "divide" the cost by lambda, or "multiply" the loss by it: the same minimum, but then the loss' gradient,
            and with it the effective learning rate, grows with lambda.

    Attributes:
        multiplier: lambda, in float64 whatever the network's dtype, or float32 on a device without float64. Where
            several processes train it grows with the mean of their losses; where a batch comes in parts, with the loss
            of the first part ("before", "next") or of the last ("after"). By a loss that is not finite, in any of the
            processes, it does not grow.

    Raises:
        TypeError: a task that is no objective, what is no number, or ``every`` that is no whole one.
        ValueError: arguments out of range, or an exponent p beside a :class:`Cost`, which has its own.
    """

    multiplier: Tensor

    def __init__(
        self,
        task: Objective | None = None,
        *,
        lambda0: float = 1.0,
        tau: float = 1.0,
        every: int = 1,
        cost: str = "action",
        p: float = 2.0,
        update: Literal["before", "next", "after"] = "before",
        weigh: Literal["divide", "multiply"] = "divide",
        **unknown: Any,
    ) -> None:
        refuse("LeastAction", unknown, _ELSEWHERE)
        super().__init__(task, cost, p)
        lambda0, tau = check_number("lambda0", lambda0), check_number("tau", tau)
        for name, value in (("lambda0", lambda0), ("tau", tau)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        check_count("every", every, 1)
        if update not in ("before", "next", "after"):
            raise ValueError(f"update must be 'before', 'next' or 'after', got {update!r}")
        if weigh not in ("divide", "multiply"):
            raise ValueError(f"weigh must be 'divide' or 'multiply', got {weigh!r}")
        self.tau, self.every, self.update, self.weigh = tau, every, update, weigh
        self.steps = 0
        self._changed_in = -1
        self.register_buffer("multiplier", torch.tensor(lambda0, dtype=total_dtype("cpu")))

    @eagerly
    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The task's loss of ``network``, ``batch``, ``output``, ``records``, with the cost, a scalar."""
        self.check_records(records)
        training = torch.is_grad_enabled() and self.training and unwrapped(network).training and self._may_grow
        if training:
            self.notice_step()
        loss, cost = self.parts(network, batch, output, records)
        if training and self.update != "after" and self._due and self._changed_in != self.steps:
            self._changed_in = self.steps
            self._grow(loss, samples_in(batch[0]))
        weight = self.multiplier.to(torch.promote_types(loss.dtype, torch.float32))
        loss = loss + cost / weight if self.weigh == "divide" else weight * loss + cost
        self.expect_step(network, batch, loss)
        return loss

    def after_step(self, network: nn.Module, batch: Batch) -> None:
        """Count the step of a ``batch``; with ``update="after"`` lambda grows by its loss of the ``network`` now."""
        if self.update == "after" and self._due:
            with torch.no_grad(), keeping_state(network):
                output, records = record(network, batch[0], self.task.measures)
                self._grow(self.task.loss(network, batch, output, records), samples_in(batch[0]))
            torch.clear_autocast_cache()  # which may hold weights cast without gradients
        super().after_step(network, batch)
        self.steps += 1
        self.end_step()

    @property
    def needs_second_forward(self) -> bool:
        """Whether :meth:`after_step` calls the network after the coming step, as ``update="after"`` does every s-th."""
        return super().needs_second_forward or (self.update == "after" and self._due)

    @property
    def counts_steps(self) -> bool:
        """True."""
        return True

    @property
    def keeps_batch(self) -> bool:
        """Whether :meth:`after_step` reads the batch."""
        return self.needs_second_forward or super().keeps_batch

    @property
    def _due(self) -> bool:
        """Whether lambda changes in this step."""
        if self.update == "next":
            return self.steps > 0 and self.steps % self.every == 0
        return (self.steps + 1) % self.every == 0

    @property
    def _may_grow(self) -> bool:
        """Whether lambda is no constant of a function that torch.func differentiates or maps."""
        functorch = torch._C._functorch  # type: ignore[attr-defined]  # torch's own
        level = functorch.maybe_current_level()
        return level is None or functorch.maybe_get_level(self.multiplier) == level

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move; the multiplier keeps its precision, in which small changes are not lost."""
        multiplier = self.multiplier
        del self.multiplier
        try:
            super()._apply(fn, recurse)
        finally:
            self.register_buffer("multiplier", multiplier)
        device = fn(torch.zeros((), device=multiplier.device)).device
        if device.type == "meta" or multiplier.device.type == "meta":
            self.multiplier = torch.empty_like(multiplier, device=device)
        else:
            self.multiplier = multiplier.to(total_dtype(device)).to(device)
        return self

    def _grow(self, loss: Tensor, samples: int) -> None:
        loss = loss.detach().to(self.multiplier.dtype)
        if distributed.is_available() and distributed.is_initialized():
            total = torch.stack([loss * samples, loss.new_tensor(samples)])
            distributed.all_reduce(total, group=self.group)
            loss = total[0] / total[1]
        growth = self.tau * loss
        self.multiplier += torch.where(growth.isfinite(), growth, 0)

    def figures(self) -> dict[str, float]:
        """Lambda, and what the task shows."""
        return super().figures() | {"lambda": self.multiplier.item()}

    def extra_repr(self) -> str:
        """Lambda, how it grows, and the kind of the cost."""
        value = "" if self.multiplier.is_meta else f"lambda={self.multiplier.item():g}, "
        return f"{value}tau={self.tau:g}, every={self.every}, update={self.update!r}, {super().extra_repr()}"

    def get_extra_state(self) -> Tensor:
        """Steps counted, for ``state_dict``."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the ``state`` of :meth:`get_extra_state`."""
        self.steps, self._changed_in = int(state), -1
        self.end_step()
