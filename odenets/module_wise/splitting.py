"""A network split into modules, each with a head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from odenets.adapting.masking import MASKS
from odenets.errors import renamed
from odenets.flow import Flow
from odenets.inputs import call, is_by_keyword
from odenets.modes import evaluating, keeping_state
from odenets.module_wise.heads import Head, check_head, like, make_head, modules_of
from odenets.module_wise.modules import LocalLoss, LocalModule, ModuleWise
from odenets.module_wise.partition import (
    At,
    Cuttable,
    balanced,
    blocks_of,
    cut,
    even,
    in_order,
    inputs_on,
)
from odenets.outputs import logits_in

__all__ = ["split_into_modules"]


@renamed(classes="outputs")
def split_into_modules(
    network: Cuttable,
    split: int | Sequence[int],
    x: Any,
    *,
    outputs: int | None = None,
    balance: Literal["blocks", "memory"] = "blocks",
    at: At = "end",
    head: str | Head | nn.Module | Sequence[nn.Module] = "auto",
    last_head: Literal["own", "auxiliary"] = "own",
    local_loss: LocalLoss | None = None,
) -> ModuleWise:
    """A network in K modules, each with a head, to be trained without a gradient that crosses from one to another.

    New layers follow the network: its device, dtype and mode. Shapes are found in eval mode, which leaves it as it was.

    Args:
        network: a flow, a network or an adapted model; its weights are shared, not copied.
        split: the number of modules K, or after how many blocks each ends, rising, the last with or without.
        x: a batch of inputs, of two samples or more, by which shapes are found; or a tuple ``(x, *args)`` with what
            conditions the fields, or a mapping of an adapted model's keywords, ``{"input_ids": ..., "attention_mask":
            ...}``: batches hold the same inputs, of any length.
        outputs: numbers that a head returns for a sample, the classes of a classifier or the size of a regression's
            targets; as many as the network itself if not given, which a flow needs to be told.
        balance: what is shared out equally among K modules: "blocks", or "memory": the bytes that the blocks keep for
            their backward pass, measured on ``x``, the encoder's and transitions' with them. Weights, gradients, the
            optimizer's state, heads and what a local loss keeps are not weighed.
        at: "end", a transition belongs to the module after it, or "start", to the one before.
        head: "conv", "token" or "linear" (:func:`conv_head` and so on); "auto" by the shape of the state; a function of
            a state and the number of outputs; one layer for all modules ("same classifier"); or a list of one for each,
            but for a last that keeps the network's.
        last_head: whether the last module keeps the network's "own" head or has an "auxiliary" one like the others.
        local_loss: makes what each module minimizes besides, such as :func:`infopro` or :func:`predsim`.

    Returns:
        The network in modules, in the mode of ``network``.

    Raises:
        TypeError, ValueError: as :func:`~odenets.module_wise.partition.cut` and the heads raise, K out of range, a head
            that does not return ``(B, outputs)``, or more or fewer heads than modules that need one.

    >>> import odenets
    >>> network = odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> modules = split_into_modules(network, 2, torch.rand(2, 1, 8, 8))
    >>> [logits.shape for logits in modules.outputs(torch.rand(5, 1, 8, 8))]
    [torch.Size([5, 10]), torch.Size([5, 10])]
    """
    if not isinstance(first := in_order(x)[0], Tensor) or len(first) < 2:
        raise ValueError("x must be a batch of at least two inputs, which batch norms need")
    if isinstance(split, bool | str) or not isinstance(split, Integral | Sequence):
        raise TypeError(f"split must be a number of modules, or a list of their ends, got {split!r}")
    if balance not in ("blocks", "memory") or last_head not in ("own", "auxiliary"):
        words = "balance must be 'blocks' or 'memory' and last_head 'own' or 'auxiliary'"
        raise ValueError(f"{words}, got {balance!r} and {last_head!r}")
    blocks_of(network, x)
    inputs, has_head = inputs_on(network, x), not isinstance(network, Flow)
    images, *args = in_order(inputs)
    with torch.no_grad(), keeping_state(network), evaluating(network):
        output = call(network, inputs)  # a flow without a field makes it here
    blocks = blocks_of(network)
    if not isinstance(split, Sequence):
        ends = even(blocks, int(split)) if balance == "blocks" else balanced(network, int(split), inputs, at)
    else:
        ends = [*split] if split and split[-1] == blocks else [*split, blocks]
    parts, own = cut(network, ends, at, inputs)
    keeps = last_head == "own" and has_head
    if outputs is None:
        outputs = _outputs(output, has_head)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) != len(parts) - keeps:
        but = " but the last, which keeps the network's" if keeps else ""
        raise ValueError(f"head must hold one for each module{but}: {len(parts) - keeps}, got {len(head)}")
    by_default = isinstance(head, str) and len(parts) > keeps and is_by_keyword(x)
    if by_default and (masks := [name for name in MASKS if name in x]):
        warnings.warn(
            f"the heads of modules average over all tokens, also over what {masks[0]} leaves out: give head= a "
            "function that makes layers called with the state and the mask, or texts of one length",
            stacklevel=3,
        )
    modules, state = [], images
    for k, part in enumerate(parts):
        with torch.no_grad(), keeping_state(part), evaluating(part):
            state = part(state, *args)
        with images.device:  # where new layers are made
            layer = own if keeps and k == len(parts) - 1 else make_head(head, k, state, outputs)
            extra = None if local_loss is None else like(local_loss(k, len(parts), state, images), state)
        check_head(layer, state, outputs, k, tuple(args) if getattr(layer, "conditioned", False) else ())
        modules.append(LocalModule(part, layer, extra))
    result = ModuleWise(modules, ends)
    for module in set(result.modules()) - set(network.modules()) - set(modules_of(head)):
        module.training = network.training
    return result


def _outputs(output: Any, has_head: bool) -> int:
    """Numbers that the network itself returns for a sample."""
    output = logits_in(output)
    if not has_head or not isinstance(output, Tensor) or output.ndim != 2:
        got = f"has shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"is a {type(output).__name__}"
        raise ValueError(f"outputs must be given: the network's output {got}")
    return int(output.shape[1])
