"""heal: a compressed network trained for a while to return what the whole one does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.depth.compression.divergence import Kind, Outputs, are_logits, checked_run, kl_divergence, tensor_in
from odenets.depth.compression.positions import at_tokens, tokens_in
from odenets.errors import check_count, check_number
from odenets.inputs import check_batches, inputs_in, rows, samples_in
from odenets.modes import device_of, evaluating, inputs_for
from odenets.training.progress import counting

__all__ = ["heal"]


def heal(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    images: int = 7000,
    lr: float = 1e-4,
    temperature: float = 4.0,
    outputs: Kind = "auto",
    progress: str | None = None,
) -> nn.Module:
    """Train a compressed network for a while so that it returns what the whole one does (Hinton et al. 2015).

    No labels are read: what is minimized is the divergence of the outputs from the teacher's, of Kullback and Leibler
    for logits, which a classifier returns, and else the mean square error. Both networks are in eval
    mode, batch norms keep their statistics and dropout drops nothing; Adam's learning rate rises for a tenth of the
    steps and falls to 0 as a cosine does. Padding, by an ``attention_mask`` ``(B, T)``, does not
    count.

    Args:
        model: trained in place, those of its parameters that take gradients.
        teacher: the whole network, which has no fewer weights than the model.
        loader: batches of inputs, or of pairs of inputs and labels; gone through as often as needed, for which those of
            a generator are kept.
        images: samples that are seen, one counted as often as it comes.
        lr: the largest learning rate.
        temperature: by which logits are divided.
        outputs: what the networks return: "logits", or "values", whose square error is minimized; "auto", logits if
            they are called so or are a tensor ``(B, K)`` of more than one number.
        progress: the label of a bar.

    Returns:
        The model, in the mode that it was in.

    Warns:
        UserWarning: the divergence on the first batch has risen: the weights are those before.

    Raises:
        TypeError: no networks, or no batches of inputs.
        ValueError: no batch, or one that the networks do not take; numbers out of range; a model without parameters
            that take gradients; a teacher that is the model itself, or smaller; outputs that are not finite.
            Weights are those before then.

    >>> import copy
    >>> teacher = nn.Linear(3, 2)
    >>> model = heal(nn.Linear(3, 2), teacher, [torch.randn(20, 3)], images=100, lr=0.1)
    """
    for name, network in (("model", model), ("teacher", teacher)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch module, got {type(network).__name__}: the model of a Compression")
    if model is teacher:
        raise ValueError("model must not be the teacher itself, which it is to follow")
    check_count("images", images, 1)
    lr, temperature = check_number("lr", lr), check_number("temperature", temperature)
    if not (lr > 0 and temperature > 0 and math.isfinite(lr * temperature)):
        raise ValueError(f"lr and temperature must be positive, got {lr} and {temperature}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameters that take gradients: model.requires_grad_()")
    sizes = [sum(p.numel() for p in network.parameters() if p.ndim > 1) for network in (model, teacher)]
    if sizes[0] > sizes[1]:
        raise ValueError(
            f"teacher must be the whole network, got one of {sizes[1]} weights for a model of {sizes[0]}: heal(model, "
            "teacher, loader) trains its first argument"
        )
    check_batches(loader, "loader")
    if isinstance(loader, Iterator):
        loader = _first(loader, images)
    shared = {*map(id, parameters)} & {id(p) for p in teacher.parameters()}
    if shared:
        raise ValueError("model shares parameters with the teacher, which would change too: copy.deepcopy one of them")
    optimizer = torch.optim.Adam(parameters, lr=lr)
    judge: Outputs | None = None  # on the first batch
    weights, first, seen = [p.detach().clone() for p in parameters], 0.0, 0
    with (
        evaluating(model, teacher),
        torch.enable_grad(),
        counting(progress, "image") as show,
        _taken_back_after_errors(parameters, weights),
    ):
        while seen < images:
            before = seen
            for batch in loader:
                inputs = inputs_in(batch, "loader", model)
                n = samples_in(inputs, "the loader")
                if not n:
                    continue
                if judge is None:
                    judge = _judge(model, teacher, inputs, outputs)
                    first = judge.divergence(model)
                if n > images - seen:
                    inputs, n = rows(inputs, slice(None, images - seen), n), images - seen
                inputs = inputs_for(model, inputs)
                for group in optimizer.param_groups:
                    group["lr"] = lr * _schedule((seen + n / 2) / images)
                with torch.no_grad():
                    returned = checked_run(teacher, inputs_for(teacher, inputs), "loader")
                    wanted = at_tokens(tensor_in(returned).to(device_of(model)), tokens_in(inputs))
                output = at_tokens(tensor_in(checked_run(model, inputs, "loader")), tokens_in(inputs))
                if are_logits(returned, outputs):
                    divergence = kl_divergence(output / temperature, wanted / temperature).mean()
                    loss = divergence * temperature**2
                else:
                    loss = F.mse_loss(output, wanted)
                if not loss.isfinite():
                    raise ValueError(f"outputs are not finite after {seen} images: a smaller lr than {lr}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen += n
                show(seen, images)
                if seen >= images:
                    break
            if seen == before:
                raise ValueError("loader must hold at least one batch at each pass, got none: was it used up before?")
        optimizer.zero_grad()
        assert judge is not None  # of at least one batch
        if (last := judge.divergence(model)) > first:
            _take_back(parameters, weights)
            warnings.warn(
                "healing has not helped, and the weights are those before: on the first batch the divergence from the "
                f"teacher rose from {first:.3g} to {last:.3g}; a smaller lr than {lr}, more images than {images}, or "
                "inputs that the teacher was not trained on",
                stacklevel=2,
            )
    return model


@contextmanager
def _taken_back_after_errors(parameters: Iterable[nn.Parameter], weights: Iterable[Tensor]) -> Iterator[None]:
    """Let ``parameters`` be what they were, the ``weights``, where an error ends the training."""
    try:
        yield
    except Exception:
        _take_back(parameters, weights)
        raise


@torch.no_grad()
def _take_back(parameters: Iterable[nn.Parameter], weights: Iterable[Tensor]) -> None:
    """Give ``parameters`` the ``weights`` that they had, and no gradients."""
    for parameter, before in zip(parameters, weights, strict=True):
        parameter.copy_(before)
        parameter.grad = None


def _first(batches: Iterator[Any], samples: int) -> list[Any]:
    """The first batches of an iterator, which goes by once: as many as hold so many ``samples``, or all."""
    kept, seen = [], 0
    for batch in batches:
        kept.append(batch)
        seen += samples_in(inputs_in(batch, "loader"), "the loader")
        if seen >= samples:
            break
    return kept


@torch.no_grad()
def _judge(model: nn.Module, teacher: nn.Module, inputs: Any, kind: Kind) -> Outputs:
    """What the teacher returns for some inputs, by which the model is judged before and after."""
    returned = checked_run(teacher, inputs_for(teacher, inputs), "loader")
    wanted = tensor_in(returned).to(device_of(model))
    return Outputs([inputs_for(model, inputs)], [wanted], are_logits(returned, kind))


def _schedule(done: float) -> float:
    """The learning rate over its largest, at a share of all steps."""
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2
