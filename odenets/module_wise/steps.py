"""Training steps on one batch: modules one after the other, each with its own backward pass, or all end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from odenets.adapting import AdaptedModel
from odenets.measures import needs_gradient
from odenets.module_wise.modules import LocalModule, ModuleWise
from odenets.module_wise.partition import Part
from odenets.recording import Records, record
from odenets.training.labels import check_labels, logits_and_labels
from odenets.training.metrics import Metric, MetricFunction
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy, check_loss
from odenets.training.sources import arguments, samples_in
from odenets.training.step_counting import after_step

__all__ = ["end_to_end_step", "local_step", "parallel_step"]


def local_step(
    module: LocalModule,
    objective: Objective,
    optimizer: Optimizer,
    x: Any,
    images: Tensor,
    y: Any,
    *,
    metric: MetricFunction | Metric | None = None,
    clip_norm: float | None = None,
    share: Callable[[Optimizer], None] | None = None,
    first: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of one module on a batch; when it returns, nothing is kept of its backward pass, nor its gradients.

    Args:
        module: in training mode.
        objective: of the module.
        optimizer: of the module's parameters.
        x: the state before, or the images, ``(B, ...)``, or a tuple ``(x, *args)`` with what the velocity fields get
            besides; no gradient reaches them.
        images: the inputs of the network, without ``args``.
        y: targets, labels ``(B,)`` or what the objective reads.
        metric: what is summed beside the loss, as in :func:`odenets.training.fit`, 0 of one that gathers; the accuracy
            if not given, 0 for a :class:`~odenets.training.Task`.
        clip_norm: largest norm of the gradient.
        share: called between the backward pass and the step, to average gradients with other processes.
        first: whether it is the first of an epoch: labels are looked at before, which waits for the device.

    Returns:
        The state after the module, before the step, and the loss and the metric summed over the batch, ``(2,)``; NaN
        for the accuracy of outputs that are no logits.

    Raises:
        TypeError, ValueError: what the objective or the metric raises, or a loss that nothing trains by.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> images, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    >>> network = split_into_modules(odenets.models.small_network(depth=2), 2, images)
    >>> state = images
    >>> for module in network.modules_in_order:
    ...     optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ...     state, totals = local_step(module, CrossEntropy(), optimizer, state, images, y)
    """
    state, *args = arguments(x)
    state = state.detach()
    batch = ((state, *args) if args else state, y)
    output, after, records = module.forward_with_records(state, objective.measures, tuple(args))
    loss = _loss(objective, module, batch, output, records, first)
    if module.local_loss is not None:
        loss = loss + module.local_loss(after, images, y)
    check_loss(loss, objective)
    totals = _totals(loss, output, y, len(state), metric, objective)
    optimizer.zero_grad()  # of what was done with the network before
    loss.backward()
    after = after.detach()
    del output, records, loss  # and with them what the backward pass needed
    if share is not None:
        share(optimizer)
    _apply(optimizer, clip_norm)
    after_step(objective, module, batch)
    return after, totals


def parallel_step(
    network: ModuleWise,
    objectives: Sequence[Objective],
    optimizers: Sequence[Optimizer],
    x: Any,
    y: Any,
    *,
    metric: MetricFunction | Sequence[Metric] | None = None,
    clip_norm: float | None = None,
    first: bool = False,
) -> Tensor:
    """A step of every module on a batch, first to last, each on the state behind the one before.

    What :func:`fit_modules` does with a batch, for a loop of one's own.

    Args:
        network, objectives, optimizers: the modules, and for each its objective and optimizer.
        x: inputs, ``(B, *S)`` or a tuple ``(x, *args)``.
        y, metric, clip_norm, first: as in :func:`local_step`; or a metric of each module.

    Returns:
        Loss and metric of each module, summed over the batch, ``(K, 2)``.

    Raises:
        TypeError, ValueError: as :func:`local_step`; or not one objective and optimizer for each module.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    >>> network = split_into_modules(odenets.models.small_network(depth=2), 2, x)
    >>> modules = network.modules_in_order
    >>> optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    >>> parallel_step(network, [CrossEntropy(), CrossEntropy()], optimizers, x, y).shape
    torch.Size([2, 2])
    """
    images, *args = network.arguments(x)
    state, totals = images, []
    metrics = metric if isinstance(metric, Sequence) else [metric] * network.K
    for module, objective, optimizer, one in zip(
        network.modules_in_order, objectives, optimizers, metrics, strict=True
    ):
        inputs = (state, *args) if args else state
        options: dict[str, Any] = {"metric": one, "clip_norm": clip_norm, "first": first}
        state, total = local_step(module, objective, optimizer, inputs, images, y, **options)
        totals.append(total)
    return torch.stack(totals)


def end_to_end_step(
    network: ModuleWise,
    objective: Objective,
    optimizer: Optimizer,
    x: Any,
    y: Any,
    *,
    checkpointed: bool = False,
    metric: MetricFunction | Metric | None = None,
    clip_norm: float | None = None,
    first: bool = False,
) -> Tensor:
    """A step of the whole network on a batch by backpropagation from the last head, for comparison.

    Args:
        network: of which the last head is trained, and all blocks.
        objective, optimizer: of the whole.
        x: inputs, ``(B, *S)`` or a tuple ``(x, *args)``.
        y, metric, clip_norm, first: as in :func:`local_step`.
        checkpointed: keep the states between modules only, and compute each module again in the backward pass, from
            the same buffers; its batch norms count the batch once.

    Returns:
        Loss and metric, summed over the batch, ``(1, 2)``.

    Raises:
        TypeError, ValueError: as :func:`local_step`; an objective that differentiates steps, checkpointed.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    >>> network = split_into_modules(odenets.models.small_network(depth=2), 2, x)
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    >>> end_to_end_step(network, CrossEntropy(), optimizer, x, y, checkpointed=True).shape
    torch.Size([1, 2])
    """
    state, *args = network.arguments(x)
    rows: list[Tensor] = []
    parts, measures, samples = [], objective.measures, samples_in(state)
    if checkpointed and (names := [name for name, one in measures.items() if needs_gradient(one)]):
        raise ValueError(
            f"checkpointed must be False where {names[0]!r} is measured, which differentiates steps within the pass, "
            "got True: modules are computed again in the backward pass alone"
        )
    for module in network.modules_in_order:
        layout: list[Any] = []

        def run(
            state: Tensor, part: Part | AdaptedModel = module.part, layout: list[Any] = layout
        ) -> tuple[Tensor, ...]:
            state, records = record(part, (state, *args), measures)
            layout[:] = records.layout
            return state, *(records[name] for name in measures)

        if checkpointed:
            again = partial(_replay, module.part)
            state, *rows = cast(tuple[Tensor, ...], checkpoint(run, state, use_reentrant=False, context_fn=again))
        else:
            state, *rows = run(state)
        parts.append(Records(dict(zip(measures, rows, strict=True)), *layout))
    output = network.modules_in_order[-1].output(state, tuple(args))
    records = Records.join(parts, network.module_names)
    loss = _loss(objective, network, (x, y), output, records, first)
    check_loss(loss, objective)
    totals = _totals(loss, output, y, samples, metric, objective)
    optimizer.zero_grad()
    loss.backward()
    del output, records, loss, state, parts, rows
    _apply(optimizer, clip_norm)
    after_step(objective, network, (x, y))
    return totals[None]


def _loss(
    objective: Objective, network: nn.Module, batch: tuple[Any, Any], output: Any, records: Records, first: bool
) -> Tensor:
    """The loss of an objective, whose labels have a logit each: looked at first, or where torch has raised."""
    classifies = isinstance(objective.task, CrossEntropy | ReverseCrossEntropy)
    if first and classifies:
        check_labels(*logits_and_labels(output, batch[1]), "batches")
    try:
        return objective.loss(network, batch, output, records)
    except (IndexError, RuntimeError):  # what torch raises on a CPU for a label without a logit
        if classifies:
            check_labels(*logits_and_labels(output, batch[1]), "batches")
        raise


@torch.no_grad()
def _totals(
    loss: Tensor, output: Any, y: Any, samples: int, metric: MetricFunction | Metric | None, objective: Objective
) -> Tensor:
    """Loss and metric summed over a batch, in float32 at least."""
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    measured = Metric.of(metric, objective)
    total = torch.as_tensor(measured.training_total(output, y, samples) if measured else 0.0, device=loss.device)
    return torch.stack([loss * samples, total.to(torch.promote_types(total.dtype, torch.float32))])


def _apply(optimizer: Optimizer, clip_norm: float | None) -> None:
    """Clip, step, and let go of the gradients."""
    if clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad()


def _replay(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a pass, and of its repetition, which starts from the same buffers and leaves no trace in them."""
    slots = [(module, name, b) for module in part.modules() for name, b in module._buffers.items() if b is not None]
    before = [buffer.clone() for _, _, buffer in slots]

    @contextmanager
    def again() -> Iterator[None]:
        now = [module._buffers[name] for module, name, _ in slots]
        for (module, name, _), buffer in zip(slots, before, strict=True):
            module._buffers[name] = buffer
        try:
            yield
        finally:
            for (module, name, _), buffer in zip(slots, now, strict=True):
                module._buffers[name] = buffer

    return nullcontext(), again()
