"""Objectives: what training minimizes, a function of a network's output and of what was measured on its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.errors import refuse
from odenets.inputs import exchanged
from odenets.measures import StepFunction
from odenets.recording import Records, named_measures, record, recorder_in
from odenets.training.broadcasting import refusing_pairs
from odenets.training.labels import cross_entropy, logits_and_labels, without_label
from odenets.training.step_counting import StepCounter, eagerly

__all__ = ["Batch", "CrossEntropy", "Objective", "ReverseCrossEntropy", "Task", "check_loss", "targets_of"]

Batch = tuple[Any, Any]
"""Inputs, a tensor x, a tuple ``(x, *args)`` with what the velocity fields get besides, or a mapping of inputs by
keyword, and targets."""


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


_MISSING: Any = object()


def targets_of(batch: Any) -> Any:
    """The second of a pair.

    Raises:
        TypeError: a batch is no pair.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"batch must be a pair (inputs, targets), got {got}")
    return batch[1]


class Objective(StepCounter):
    """What is minimized, a function of a network's output and of what is measured on its steps; to be derived from.

    :class:`CrossEntropy`, :class:`Task` and :class:`odenets.least_action.LeastAction` are some. :func:`fit` takes one;
    in a loop of one's own it is called with the network and a batch:

    >>> import odenets
    >>> network, objective = odenets.models.small_network(depth=2), CrossEntropy()
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    >>> for x, y in [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]:
    ...     loss = objective(network, x, y)  # records what it measures, weighs and counts
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()

    A subclass overrides :meth:`loss`. What it must remember from step to step are its buffers: they are saved and
    restored.

    Attributes:
        measures: what the network is to record, by name: functions ``Step -> (B,)``, see :mod:`odenets.measures`.
        group: the processes that share its batches, a torch.distributed group; all of them if None.

    Raises:
        TypeError: measures without names, or a subclass that defines ``forward``, which records and calls :meth:`loss`.
    """

    group: Any = None

    def __init__(self, measures: Mapping[str, StepFunction] | None = None) -> None:
        super().__init__()
        self.measures: dict[str, StepFunction] = named_measures({} if measures is None else measures)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            raise TypeError(
                f"an objective overrides loss(self, network, batch, output, records), got {cls.__name__} with forward, "
                "which records and calls it"
            )

    @eagerly
    def forward(self, network: nn.Module, x: Any = _MISSING, y: Any = _MISSING, *rest: Any) -> Tensor:
        """The loss, a scalar to call ``backward`` on, of what the network records of the batch.

        What counts the steps of the optimizer, ``after_step``, is called for the last one first. Forward hooks of the
        network itself are not called, since ``record`` is: those of its parts are, and of a Recording around it.

        Args:
            network: a :class:`~odenets.Recorder`, or a :class:`~odenets.recording.Recording` of one in whatever wraps
                it: ``DistributedDataParallel(Recording(network, objective.measures))``.
            x: inputs, a tensor ``(B, *S)``, a tuple ``(x, *args)``, or a mapping of what the network takes by keyword,
                such as a batch of Hugging Face's tokenizers.
            y: targets.
            rest: nothing; more arguments are refused.

        Returns:
            The loss, of no dimensions.

        Raises:
            TypeError: a network that records nothing or is wrapped without Recording, x and y exchanged, or no loss.
            ValueError: a loss that is no scalar, or depends on no parameter.
            RuntimeError: objectives that count steps, where the network was trained in eval mode.

        Warns:
            UserWarning: the network has forward hooks or was compiled in place, which ``record`` leaves out; weights
                move without a step of an optimizer.
        """
        if y is _MISSING or rest:
            raise TypeError(
                "an objective is called as objective(network, x, y), where x may be (x, *args) or {'x': x}, got "
                f"{1 + (x is not _MISSING) + (y is not _MISSING) + len(rest)} arguments: with output and records at "
                "hand take objective.loss(network, (x, y), output, records)"
            )
        _check_order(x, y)
        inner = recorder_in(network)
        if inner is network:
            _check_called(network)
        if counting := self.counts_steps and self.is_counting:
            self.notice_step()
        output, records = record(network, x, self.measures)
        loss = self.loss(network, (x, y), output, records)
        if torch.is_grad_enabled() and inner.training:
            check_loss(loss, self)
        if counting:
            self.expect_step(network, (x, y), loss)
        return loss

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The loss of a batch; what a subclass defines.

        Args:
            network: the network, in training mode.
            batch: inputs and targets, ``(inputs, targets)``.
            output: the network's output, such as logits ``(B, classes)``.
            records: per measure ``(blocks, B)``.

        Returns:
            A scalar, the mean over the samples of the batch.

        Raises:
            NotImplementedError: a subclass does not define it.
        """
        self.check_records(records)
        raise NotImplementedError(f"{type(self).__name__} must override loss(self, network, batch, output, records)")

    def validation_loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """What validation reports, a scalar: that of :attr:`task`, or :meth:`loss` where that is the objective itself.

        ``network``, ``batch``, ``output`` and ``records`` are as in :meth:`loss`.
        """
        if self.task is not self:
            return self.task.validation_loss(network, batch, output, records)
        return self.loss(network, batch, output, records)

    @property
    def task(self) -> Objective:
        """What is to be solved, the part without the cost of moving the data; itself where there is no cost."""
        return self._modules.get("task", self)  # type: ignore[return-value]  # a subclass' attribute of that name

    @task.setter
    def task(self, task: Objective) -> None:  # torch keeps modules without asking here
        raise TypeError(f"task must be an objective, got {type(task).__name__}")

    def figures(self) -> dict[str, float]:
        """Numbers of its own, by name, that the row of an epoch shows; those of the task."""
        return {} if self.task is self else self.task.figures()

    def check_records(self, records: Mapping[str, Tensor]) -> None:
        """That ``records`` hold all measures.

        Raises:
            TypeError: they are no mapping.
            ValueError: a measure is missing.
        """
        if not isinstance(records, Mapping):
            raise TypeError(f"records must hold measures by name, got {type(records).__name__}")
        if missing := [name for name in self.measures if name not in records]:
            raise ValueError(
                f"records must hold {missing}, which {type(self).__name__} reads, got {list(records)}: record them, "
                "output, records = network.record(x, **objective.measures)"
            )


class Task(Objective):
    """Any function of the output and the targets, such as ``Task(F.mse_loss)`` for a regression.

    Args:
        function: ``(output, y) -> loss``, a scalar tensor; a module such as ``nn.HuberLoss()`` moves with it, and what
            it learns is the objective's, whose parameters an optimizer must be given too. Targets are of any kind that
            the function understands.

    Raises:
        TypeError: no function, or an objective, which is a task already.
        ValueError: a function with ``reduction="sum"``.

    >>> from odenets.models import points_network
    >>> x, y = torch.rand(8, 2), torch.rand(8, 1)
    >>> loss = Task(F.mse_loss)(points_network(classes=1, depth=2), x, y)
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        if isinstance(function, Objective):
            raise TypeError(f"function must be of (output, y), got the objective {type(function).__name__}: take it")
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"function must be of (output, y), such as F.mse_loss or nn.MSELoss(), got {function!r}")
        settings = getattr(function, "keywords", None) or getattr(function, "__dict__", {})  # of a partial, a module
        if settings.get("reduction") == "sum":
            raise ValueError(f"function must return the mean over the batch, got {function!r:.80}: reduction='mean'")
        self.function = function

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The function of ``output`` and the targets in ``batch``, a scalar; ``network`` and ``records`` play no part.

        Raises:
            TypeError, ValueError: the function returns no scalar tensor, or takes an output and targets of two shapes,
                which it would spread out over pairs of samples.
        """
        with refusing_pairs(output, targets := targets_of(batch), self.function):
            value = self.function(output, targets)
        _check_scalar(value, "function", self.function)
        return value


class CrossEntropy(Objective):
    """Cross-entropy of the output, in float32 at least. Labels are classes, or shares of the classes.

    The output is logits ``(B, classes)``, or a mapping or an object that holds them as "logits", as the ModelOutput of
    Hugging Face's models. A ``loss`` that such a model computes from labels among its inputs is not used, here or in
    any other objective: what is minimized is that of the targets y. ``Task(lambda output, y: output.loss)`` is it.
    A sample with the label -100 counts for nothing, as in torch; its action counts.

    Args:
        label_smoothing: share of the target that is spread over all classes, in [0, 1).

    Raises:
        TypeError: arguments of torch's alone, such as weights of the classes, which a :class:`Task` has.
        ValueError: a share outside [0, 1).

    >>> from odenets.models import points_network
    >>> x, y = torch.rand(8, 2), torch.arange(8) % 2
    >>> CrossEntropy(label_smoothing=0.1)(points_network(depth=2), x, y).backward()
    """

    def __init__(self, label_smoothing: float = 0.0, **unknown: Any) -> None:
        super().__init__()
        of_torch = {name: f"Task(nn.CrossEntropyLoss({name}=...))" for name in ("weight", "reduction", "ignore_index")}
        refuse("CrossEntropy", unknown, of_torch)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The cross-entropy of logits in ``output``, ``(B, classes)``, and the labels in ``batch``, a scalar.

        ``network`` and ``records`` play no part.

        Raises:
            TypeError, ValueError: outputs that are no logits of two classes or more, or no label for each.
        """
        output, y = logits_and_labels(output, targets_of(batch))
        return cross_entropy(output, y, label_smoothing=self.label_smoothing)

    def validation_loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """:meth:`loss` of ``network``, ``batch``, ``output`` and ``records`` without label smoothing."""
        return cross_entropy(*logits_and_labels(output, targets_of(batch)))


class ReverseCrossEntropy(Objective):
    """``-1/(C-1) sum over c != y of log softmax_c(-z)``: the classes that are not right are to be equally likely.

    The network of Pang et al. (2018) has outputs ``-z`` in training and is used with their negatives. Here z is
    the network's output throughout, so that the most likely class is its largest, as for any other classifier, and an
    attacker who differentiates it knows of the negation.

    References:
        Pang, Du, Dong, Zhu. Towards robust detection of adversarial examples. NeurIPS 2018.

    >>> from odenets.models import points_network
    >>> x, y = torch.rand(8, 2), torch.arange(8) % 2
    >>> loss = ReverseCrossEntropy()(points_network(depth=2), x, y)
    """

    def loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """The loss of logits z, ``output`` ``(B, classes)``, and the classes in ``batch``, ``(B,)``, a scalar.

        ``network`` and ``records`` play no part.

        Raises:
            TypeError, ValueError: outputs that are no logits of two classes or more, or labels that are no classes.
        """
        output, y = logits_and_labels(output, targets_of(batch))
        if y.is_floating_point():
            raise ValueError(f"labels must be classes (B,), whole numbers, got shares of the classes {_shape(y)}")
        others = without_label(F.log_softmax(-output, 1), y).sum(1)
        return -others.mean() / (output.shape[1] - 1)

    def validation_loss(self, network: nn.Module, batch: Batch, output: Any, records: Records) -> Tensor:
        """Cross-entropy, as for any other classifier; ``network``, ``batch``, ``output``, ``records`` as for loss."""
        return cross_entropy(*logits_and_labels(output, targets_of(batch)))


def check_loss(loss: Any, objective: Objective) -> None:
    """That a loss is one that a backward pass can start from.

    Raises:
        TypeError: no tensor.
        ValueError: no scalar, or one that depends on no parameter.
    """
    _check_scalar(loss, "objective", objective)
    if torch.is_grad_enabled() and not loss.requires_grad:
        kind = type(objective).__name__
        raise ValueError(f"the loss of {kind} depends on no parameter that requires a gradient: nothing would train")


def _check_scalar(value: Any, argument: str, function: Any) -> None:
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__
        name = getattr(function, "__name__", type(function).__name__)
        raise (ValueError if isinstance(value, Tensor) else TypeError)(
            f"{argument} must return a scalar tensor, the mean over the batch, but {name} returns {got}"
        )


def _check_called(network: nn.Module) -> None:
    """Warn of what a call of the network does and a call of its ``record`` does not."""
    if network._compiled_call_impl is not None:
        what, remedy = "was compiled in place", "take torch.compile(Recording(network, objective.measures))"
    elif (network._forward_hooks or network._forward_pre_hooks) and not hasattr(network, "unshard"):
        what, remedy = "has forward hooks", "take Recording(network, objective.measures), with the hooks on that"
    else:
        return
    warnings.warn(f"network {what}, which an objective leaves out, since it records: {remedy}", stacklevel=6)


def _check_order(x: Any, y: Any) -> None:
    if exchanged(x, y):
        raise TypeError(
            f"an objective is called with (network, x, y), got {x.dtype} {_shape(x)} as inputs x and {y.dtype} "
            f"{_shape(y)} as targets y: exchange them"
        )
