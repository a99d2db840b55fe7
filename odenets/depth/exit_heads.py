"""Heads of a network in modules, behind which samples leave: linear ones, fitted to a network that stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from einops.layers.torch import Reduce
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.errors import check_count
from odenets.modes import evaluating, inputs_for, keeping_state
from odenets.training.notes import BatchNotes
from odenets.training.sources import Source

__all__ = ["Modules", "fit_heads", "in_order", "pooled_head"]


class Modules(Protocol):
    """Modules with heads, as :class:`odenets.module_wise.ModuleWise` has them."""

    @property
    def modules_in_order(self) -> Sequence[Any]:
        """Each is called with a state, and what the network takes besides, and returns logits and the next state."""
        ...

    def arguments(self, inputs: Any) -> tuple[Any, ...]:
        """The arguments ``(x, *args)`` for the ``inputs`` of a batch."""
        ...


def pooled_head(state: Tensor, outputs: int, *, places: int = 1) -> nn.Sequential:
    """A linear layer on the means of a state over its places: a head that costs next to nothing.

    Args:
        state: ``(B, C, H, W)``, tokens ``(B, T, D)``, or ``(B, D)``, which has no places.
        outputs: numbers for a sample.
        places: of an image, height and width of what is left of it; ``functools.partial(pooled_head, places=2)`` is a
            head for :func:`odenets.module_wise.split_into_modules`.

    Returns:
        The head, of such states to ``(B, outputs)``, on the device and in the dtype of the state.

    Raises:
        ValueError: a state of another shape.

    >>> state = torch.rand(2, 16, 8, 8)
    >>> pooled_head(state, 10)(state).shape, pooled_head(state, 10, places=2)[-1].in_features
    (torch.Size([2, 10]), 64)
    """
    check_count("places", places, 1)
    if state.ndim not in (2, 3, 4):
        raise ValueError(f"state must be (B, C, H, W), (B, T, D) or (B, D), got {tuple(state.shape)}")
    pools: dict[int, list[nn.Module]] = {
        2: [nn.Identity()],
        3: [Reduce("b t d -> b d", "mean")],
        4: [nn.AdaptiveAvgPool2d(places), nn.Flatten()],
    }
    pool = nn.Sequential(*pools[state.ndim])
    with torch.no_grad():
        features = pool(state[:1]).shape[1]
    return nn.Sequential(pool, nn.Linear(features, outputs, device=state.device, dtype=state.dtype))


def fit_heads(modules: Modules, batches: Iterable[Any], *, penalty: float = 1e-3, iterations: int = 200) -> int:
    """Fit linear heads of a network that stays as it is: a logistic regression for each, which has one solution.

    Heads are those of all modules but the last, whose own is the network's: a linear layer behind layers without
    weights, as :func:`pooled_head` and :func:`odenets.module_wise.linear_head` are. One pass in eval mode takes what
    they are given; L-BFGS fits the linear layers to it. Heads with other weights are trained with the network, by
    :func:`odenets.module_wise.fit_modules`.

    Args:
        modules: as :class:`EarlyExit` takes them.
        batches: training data, batches ``(inputs, labels)`` as :func:`odenets.training.fit` takes them, of one epoch.
        penalty: of the squares of the weights, for features of unit variance, beside the mean cross-entropy.
        iterations: of L-BFGS, at most.

    Returns:
        The number of heads that are fitted.

    Raises:
        TypeError: what is no such modules, or batches that are no pairs.
        ValueError: no batch, a head with other weights or whose weights are computed, or labels that are no classes.

    >>> import odenets
    >>> from odenets.module_wise import split_into_modules
    >>> x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    >>> modules = split_into_modules(odenets.models.small_network(depth=4), 2, x, head=pooled_head)
    >>> fit_heads(modules, [(x, y)])
    1
    """
    parts, network = in_order(modules), cast(nn.Module, modules)
    source, notes, labels = Source.of(batches), BatchNotes("batches"), list[Tensor]()
    with torch.no_grad(), keeping_state(network), evaluating(network):
        heads = [_linear(part.head, k) for k, part in enumerate(parts[:-1], 1)]
        features: list[list[Tensor]] = [[] for _ in heads]
        for inputs, y in source.in_order():
            with notes.next(inputs):
                state, *args = modules.arguments(inputs_for(network, inputs))
                labels.append(_labels(y, heads).to(state.device))
                for part, (before, _), kept in zip(parts, heads, features, strict=False):
                    state = part.part(state, *args)
                    kept.append(before(state))
    for (_, linear), kept in zip(heads, features, strict=True):
        _fit_linear(linear, torch.cat(kept), torch.cat(labels), penalty, iterations)
    return len(heads)


def _labels(y: Any, heads: Sequence[tuple[nn.Module, nn.Linear]]) -> Tensor:
    """The labels of a batch, classes of all heads."""
    classes = min((linear.out_features for _, linear in heads), default=0)
    if (
        not isinstance(y, Tensor)
        or y.is_floating_point()
        or y.ndim != 1
        or (heads and not ((y >= 0) & (y < classes)).all())
    ):
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"labels must be whole numbers (B,) from 0 to {classes - 1}, the classes of the heads, got {got}"
        )
    return y.long()


def _fit_linear(linear: nn.Linear, features: Tensor, labels: Tensor, penalty: float, iterations: int) -> None:
    """The layer of least mean cross-entropy, with a penalty on its weights for standardized features."""
    features = features.float()
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 1e-5 * mean.abs(), scale, torch.inf)  # constant to rounding: no weight
    features = (features - mean) / scale
    weight = torch.zeros(linear.out_features, linear.in_features, device=features.device, requires_grad=True)
    bias = torch.zeros(linear.out_features, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(cast(Any, loss))
    with torch.no_grad():
        linear.weight.copy_(weight / scale)
        linear.bias.copy_(bias - (weight / scale) @ mean)


def _linear(head: nn.Module, k: int) -> tuple[nn.Module, nn.Linear]:
    """What comes before the last layer of the head of module k, and that layer."""
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    before, last = nn.Sequential(*layers[:-1]), layers[-1]
    if (
        type(last) is not nn.Linear
        or "weight" not in last._parameters
        or last.bias is None
        or any(True for _ in before.parameters())
    ):
        raise ValueError(
            f"the head of module {k} must be a linear layer behind layers without weights to be fitted, got "
            f"{type(head).__name__}: split_into_modules(..., head=odenets.depth.pooled_head)"
        )
    return before, last


def in_order(modules: Any) -> list[Any]:
    """The modules, first to last."""
    if not isinstance(modules, nn.Module) or not hasattr(modules, "modules_in_order"):
        raise TypeError(
            f"modules must be a network in modules, got {type(modules).__name__}: "
            "odenets.module_wise.split_into_modules(network, 3, x, head=odenets.depth.pooled_head) makes them"
        )
    return [*cast(Any, modules).modules_in_order]
