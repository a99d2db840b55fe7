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
from odenets.module_wise.modules import LocalModule, ModuleWise
from odenets.module_wise.partition import Part
from odenets.recording import Records
from odenets.training.objectives import Objective, after_step, check_loss, right_answers

__all__ = ["end_to_end_step", "local_step", "parallel_step"]


def local_step(
    module: LocalModule,
    objective: Objective,
    optimizer: Optimizer,
    x: Tensor,
    images: Tensor,
    y: Tensor,
    *,
    clip_norm: float | None = None,
    share: Callable[[Optimizer], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of one module on a batch; when it returns, nothing is kept of its backward pass, nor its gradients.

    Args:
        module: in training mode.
        objective: of the module.
        optimizer: of the module's parameters.
        x: the state before, or the images; no gradient reaches it.
        images: the inputs of the network.
        y: labels.
        clip_norm: largest norm of the gradient.
        share: called between the backward pass and the step, to average gradients with other processes.

    Returns:
        The state after the module, before the step, and the summed loss and the number of right answers, ``(2,)``.
    """
    x = x.detach()
    logits, state, records = module.forward_with_records(x, objective.measures)
    loss = objective.loss(module, (x, y), logits, records)
    if module.local_loss is not None:
        loss = loss + module.local_loss(state, images, y)
    check_loss(loss, objective)
    totals = _totals(loss, logits, y)
    optimizer.zero_grad()  # of what was done with the network before
    loss.backward()
    state = state.detach()
    del logits, records, loss  # and with them what the backward pass needed
    if share is not None:
        share(optimizer)
    _apply(optimizer, clip_norm)
    after_step(objective, module, (x, y))
    return state, totals


def parallel_step(
    network: ModuleWise,
    objectives: Sequence[Objective],
    optimizers: Sequence[Optimizer],
    x: Tensor,
    y: Tensor,
    *,
    clip_norm: float | None = None,
) -> Tensor:
    """A step of every module on a batch, first to last, each on the state behind the one before.

    Returns:
        Summed loss and number of right answers of each module, ``(K, 2)``.
    """
    state, totals = x, []
    for module, objective, optimizer in zip(network.modules_in_order, objectives, optimizers, strict=True):
        state, one = local_step(module, objective, optimizer, state, x, y, clip_norm=clip_norm)
        totals.append(one)
    return torch.stack(totals)


def end_to_end_step(
    network: ModuleWise,
    objective: Objective,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    checkpointed: bool = False,
    clip_norm: float | None = None,
) -> Tensor:
    """A step of the whole network on a batch by backpropagation from the last head, for comparison.

    Args:
        network, objective, optimizer, x, y, clip_norm: as in :func:`local_step`.
        checkpointed: keep the states between modules only, and compute each module again in the backward pass, from
            the same buffers; its batch norms count the batch once.

    Returns:
        Summed loss and number of right answers, ``(1, 2)``.
    """
    state, rows, parts, measures = x, [], [], objective.measures
    for module in network.modules_in_order:
        layout: list[Any] = []

        def run(
            state: Tensor, part: Part | AdaptedModel = module.part, layout: list[Any] = layout
        ) -> tuple[Tensor, ...]:
            state, records = part.record(state, **measures)
            layout[:] = records.layout
            return state, *(records[name] for name in measures)

        if checkpointed:
            again = partial(_replay, module.part)
            state, *rows = cast(tuple[Tensor, ...], checkpoint(run, state, use_reentrant=False, context_fn=again))
        else:
            state, *rows = run(state)
        parts.append((Records(dict(zip(measures, rows, strict=True)), *layout), module.depth))
    logits, records = (
        network.modules_in_order[-1].head(state),
        Records.join(parts, network.module_names),
    )
    loss = objective.loss(network, (x, y), logits, records)
    check_loss(loss, objective)
    totals = _totals(loss, logits, y)
    optimizer.zero_grad()
    loss.backward()
    del logits, records, loss, state, parts, rows
    _apply(optimizer, clip_norm)
    after_step(objective, network, (x, y))
    return totals[None]


@torch.no_grad()
def _totals(loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Summed loss, in float32 at least, and number of right answers."""
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    return torch.stack([loss * len(y), right_answers(logits, y)])


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
