"""Shattered gradients: how alike the gradients of a network are at neighboring inputs (Balduzzi et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.errors import check_count
from odenets.modes import inputs_for, keeping_state, total_dtype
from odenets.observing import keeping
from odenets.recording import is_recorder
from solvers import Step

__all__ = ["ShatteredGradients", "shattered_gradients"]


@dataclass(frozen=True)
class ShatteredGradients:
    """Correlations of gradients at inputs on a line, in the inputs and in each state, one row per place.

    Attributes:
        places: "input", unless that is the first state, and the names of the blocks before which the gradient is taken.
        autocorrelation: by the distance of inputs on the line, ``(places, N)``, 1 at distance 0.
        correlation: the mean over all pairs of different inputs, ``(places,)``.

    >>> flat = shattered_gradients(nn.Linear(3, 1), torch.randn(5, 3))  # a gradient that is the same everywhere
    >>> flat.places, round(flat.correlation.item(), 6), flat.autocorrelation.shape
    (('input',), 1.0, torch.Size([1, 5]))
    """

    places: tuple[str, ...]
    autocorrelation: Tensor
    correlation: Tensor


def shattered_gradients(network: nn.Module, inputs: Tensor, *, output: int = 0) -> ShatteredGradients:
    """Correlations of the gradients of one output between inputs, by their distance on a line.

    With g_i the gradient of the output at the i-th of N inputs, in that input or in the state before a block, the
    autocorrelation at distance k is ``<g_i, g_{i+k}> / sqrt(<g_i, g_i> <g_{i+k}, g_{i+k}>)``, each mean over the i of
    such pairs, and the correlation ``<g_i, g_j> / <g_i, g_i>`` over all ``i != j``. Means over the inputs are not
    subtracted: gradients that are the same everywhere have correlation 1, white noise has 0.

    Where half of the ReLUs are active, and a quarter at two inputs together, gradients of plain networks of L layers
    have the correlation ``2^-L`` at initialization, those of residual networks without norms ``(3/4)^L`` (theorems 1
    and 2 of the paper). In eval mode, where a new batch norm does nothing yet: :func:`odenets.recalibrate` gives it the
    statistics of the inputs. The network is left as it was.

    Args:
        network: any module; of a flow, a network or an adapted model the gradients in all states are taken too.
        inputs: floating, ``(N, *S)``, in their order on the line, such as ``a + t (b - a)`` for equal steps of t. Their
            samples do not act on each other.
        output: the number of the output of a sample, the entries of which are counted in one row.

    Returns:
        The correlations of each place, in float64 where the device has it.

    Raises:
        TypeError: no module, inputs that are no floating tensor, or outputs that are none.
        ValueError: fewer than two inputs, no such output, or one that does not depend on a state.

    References:
        Balduzzi, Frean, Leary, Lewis, Ma, McWilliams. The shattered gradients problem: if resnets are the answer, then
        what is the question? ICML 2017, arXiv:1702.08591.

    >>> from odenets.models import points_network
    >>> line = torch.linspace(-2, 2, 64)[:, None] * torch.ones(2)
    >>> shattered = shattered_gradients(points_network(depth=3), line)
    >>> shattered.places
    ('blocks.0', 'blocks.1', 'blocks.2')
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module, got {type(network).__name__}")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating tensor (N, *S), in order on a line, got {got}")
    if not inputs.ndim or len(inputs) < 2:
        raise ValueError(f"inputs must be at least two, (N, *S), got {tuple(inputs.shape)}")
    check_count("output", output, 0)
    with torch.inference_mode(False), torch.enable_grad(), keeping_state(network):
        network.eval()
        x = inputs_for(network, inputs).detach().clone().requires_grad_()
        value, places, states = _states(network, x)
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(x):
            raise TypeError(f"network must return a tensor of one row for each input, got {type(value).__name__}")
        rows = value.reshape(len(x), -1)
        if output >= rows.shape[1]:
            raise ValueError(f"output must be below the number of outputs, {rows.shape[1]}, got {output}")
        slopes = torch.autograd.grad(rows[:, output].sum(), states, allow_unused=True)
    if missing := [name for name, slope in zip(places, slopes, strict=True) if slope is None]:
        raise ValueError(f"output {output} must depend on the state at {missing[0]!r}, in which it has no gradient")
    correlations = [_correlations(slope.flatten(1).to(total_dtype(slope.device))) for slope in slopes]
    lags, means = zip(*correlations, strict=True)
    return ShatteredGradients(tuple(places), torch.stack(lags).cpu(), torch.stack(means).cpu())


def _states(network: nn.Module, x: Tensor) -> tuple[Any, list[str], list[Tensor]]:
    """The output, and the inputs and states in which it is differentiated, by their names."""
    if isinstance(network, AdaptedModel):
        value, _, states = network.differentiable_steps(x)
        return value, ["input", *network.names], [x, *states]
    if not is_recorder(network):
        return network(x), ["input"], [x]
    steps: list[Step] = []
    value, records = network.record(x, steps=keeping(steps, closing=False))
    states = [step.x0 for step in steps]
    if states and states[0] is x:
        return value, [*records.blocks], states
    return value, ["input", *records.blocks], [x, *states]


def _correlations(g: Tensor) -> tuple[Tensor, Tensor]:
    """By distance, ``(N,)``, and the mean of all pairs, of gradients ``(N, D)``."""
    products, n = g @ g.T, len(g)
    squares = products.diagonal()
    sums = squares.cumsum(0)
    lags = []
    for k in range(n):
        left, right = sums[n - 1 - k], sums[-1] - (sums[k - 1] if k else 0)
        lags.append(products.diagonal(k).sum() / (left * right).sqrt())
    mean = (products.sum() - squares.sum()) / (n - 1) / squares.sum()
    return torch.stack(lags), mean
