"""Whether the parts of a network compute what the whole does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from odenets.adapting.adapted import AdaptedModel
from odenets.adapting.cutting.parts import Inputs
from odenets.adapting.program.places import tensors_in
from odenets.modes import keeping_state
from solvers import Step

__all__ = ["check_parts"]


def check_parts(network: AdaptedModel, parts: Sequence[AdaptedModel], head: nn.Module, inputs: Inputs) -> None:
    """That parts give the output, the states of the steps and the gradients of the whole, in both modes.

    The network is left as it was: modes, buffers and random state.

    Args:
        network: the whole.
        parts, head: of it.
        inputs: of the model, with an example.

    Raises:
        ValueError: they do not.
    """
    for mode in (False, True):
        whole, composed = (_values(network, parts, head, inputs, mode, cut) for cut in (False, True))
        for what, expected in whole.items():
            if not _all_close(expected, composed[what]):
                raise ValueError(
                    f"the model cannot be cut: in {'training' if mode else 'eval'} mode the {what} of its parts "
                    "differ from those of the whole, as where a pass changes what Python holds or where the model has "
                    "derivatives of its own"
                )


def _values(
    network: AdaptedModel, parts: Sequence[AdaptedModel], head: nn.Module, inputs: Inputs, mode: bool, cut: bool
) -> dict[str, list[Tensor | None]]:
    """What the whole computes, or its parts one after another; gradients are of training mode."""
    everything = (network, *parts, head)
    own = set(network.modules())
    parameters = [p for p in network.parameters() if p.requires_grad]
    with keeping_state(*everything), torch.set_grad_enabled(mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if network.model.training != mode:
            network.train(mode)
        for module in [one for holder in everything for one in holder.modules() if one not in own]:
            module.training = mode
        if cut:
            output, steps = _composed(parts, head, inputs)
        else:
            output, steps = network.output_and_steps(*inputs.args, **inputs.kwargs)
        values = [x for _, x in tensors_in(output)]
        states = [x for step in steps for x in (step.x0, step.x1)]
        losses = [x.float().square().mean() for x in values if x.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if losses and parameters:
            gradients = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
    return {"output": [*values], "states": [*states], "gradients": [*gradients]}


def _composed(parts: Sequence[AdaptedModel], head: nn.Module, inputs: Inputs) -> tuple[Any, list[Step]]:
    state, *rest = inputs.example
    steps: list[Step] = []
    for part in parts:
        state, more = part.output_and_steps(state, *rest)
        steps += more
    return head(state, *rest), steps


def _all_close(expected: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(expected) == len(others) and all(map(_close, expected, others))


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return not any(x is not None and x.any() for x in (one, other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach().float(), other.detach().float()
    scale = float(one.nan_to_num(0, 0, 0).abs().amax()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
