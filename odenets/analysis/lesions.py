"""Lesion studies: a network with some of its blocks removed or in another order (Veit, Wilber and Belongie 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odenets.adapting import AdaptedModel
from odenets.errors import check_count
from odenets.flow import Flow
from odenets.inputs import call
from odenets.modes import evaluating, inputs_for
from odenets.network import Network

__all__ = ["Lesions", "lesion_study", "permuted_blocks", "removed_blocks"]

Order = tuple[int, ...]


@dataclass(frozen=True)
class Lesions:
    """Loss and accuracy of a whole network, and of each lesion of it, as :func:`lesion_study` measures them.

    Attributes:
        names: those of the blocks that can be removed, by their numbers in the orders.
        orders: for each lesion the numbers of the blocks that are taken, in order.
        loss: cross-entropy of the whole network, the mean over the samples.
        accuracy: that of the whole network, in [0, 1].
        losses: those of the lesions, ``(lesions,)``; where one block each is removed, that of block m is at m.
        accuracies: those of the lesions, ``(lesions,)``.

    >>> Lesions(("a", "b", "c"), ((0, 2), (1, 0, 2)), 0.1, 1.0, torch.ones(2), torch.ones(2)).kendall_tau
    tensor([1.0000, 0.3333])
    """

    names: tuple[str, ...]
    orders: tuple[Order, ...]
    loss: float
    accuracy: float
    losses: Tensor
    accuracies: Tensor

    @property
    def kendall_tau(self) -> Tensor:
        """Kendall's rank correlation of each order with the natural one, ``(lesions,)``; 1 where only some are left."""
        return torch.tensor([_kendall(order) for order in self.orders])


def lesion_study(
    network: Network | AdaptedModel, batches: Iterable[Any], orders: Iterable[Sequence[int]] | None = None
) -> Lesions:
    """What a classifier loses without each of its blocks, or with the blocks taken in other orders.

    A block that is removed is the identity, as if its branch were 0: the state passes as it is. Networks that learn an
    ensemble of paths lose little by any one block, and gradually with more of them (Veit et al. 2016, figures 3 and 5);
    plain ones, and blocks that change the representation, lose much. In eval mode, without gradients; the network is
    left as it was. Blocks keep their times t.

    Args:
        network: a network of flows whose blocks have fields of their own, or one block that all share; or
            :func:`odenets.adapt` of a model, whose blocks are the modules that keep the shape of the state, those of a
            transformer with both of their steps. Other blocks of the latter, such as those that begin with a
            projection, stay.
        batches: any iterable of batches ``(inputs, labels)``, ``(B, *S)`` and ``(B,)`` int64.
        orders: for each lesion the numbers of the blocks that are taken; each with one block removed if not given. In
            a network of several flows those of a flow come before those of the next; of an adapted model blocks can be
            left out alone. :func:`removed_blocks` and :func:`permuted_blocks` draw some.

    Returns:
        Loss and accuracy of the whole and of every lesion.

    Raises:
        TypeError: another network or flow, one whose output is no tensor of logits, or batches that are no pairs.
        ValueError: no batch, a network that reads an ensemble, a reversible flow, chained fields or a flow without a
            field, a model without blocks that can be removed, or orders of other blocks.

    References:
        Veit, Wilber, Belongie. Residual networks behave like ensembles of relatively shallow networks. NeurIPS 2016,
        arXiv:1605.06431.

    >>> from odenets.models import points_network
    >>> batches = [(torch.rand(8, 2), torch.arange(8) % 2)]
    >>> lesions = lesion_study(points_network(depth=3), batches)
    >>> lesions.names, lesions.losses.shape, lesions.orders[0]
    (('blocks.0', 'blocks.1', 'blocks.2'), torch.Size([3]), (1, 2))
    """
    _check_network(network)
    if not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of (inputs, labels), got {kind}: Batches(data, size)")
    chosen, totals, samples, names = None, None, 0, ()
    with evaluating(network), torch.no_grad():
        for batch in batches:
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TypeError(f"batches must hold pairs (inputs, labels), got {type(batch).__name__}")
            x, y = inputs_for(network, batch[0]), batch[1]
            cut = _cut(network, x)
            if chosen is None:
                names, chosen = cut.names, _checked(orders, cut)
            rows = [_of_output(output, y) for output in cut.outputs(x, chosen)]
            totals = torch.stack(rows) if totals is None else totals + torch.stack(rows)
            samples += len(y)
    if totals is None or chosen is None:
        raise ValueError("batches must hold at least one batch")
    whole, *lesions = (totals / samples).cpu()
    rows = torch.stack(lesions) if lesions else totals.new_zeros(0, 2)
    return Lesions(names, tuple(chosen), whole[0].item(), whole[1].item(), rows[:, 0], rows[:, 1])


def removed_blocks(network: Network | AdaptedModel, count: int, *, draws: int = 10, seed: int = 0) -> list[Order]:
    """Orders in which so many blocks, drawn at random, are removed, for :func:`lesion_study` (figure 5 of the paper).

    Args:
        network: as there; an adapted model with its blocks found.
        count: how many are removed.
        draws: how many orders are drawn.
        seed: of the draws.

    Returns:
        The numbers of the blocks that are left, for each draw.

    Raises:
        TypeError: no whole number, or another network.
        ValueError: more blocks than there are, or none to draw; as :func:`lesion_study` besides.

    >>> from odenets.models import points_network
    >>> removed_blocks(points_network(depth=5), 3, draws=2)
    [(2, 3), (1, 2)]
    """
    flows = _lengths(network)
    depth = sum(flows)
    check_count("count", count, 0)
    check_count("draws", draws, 1)
    if count > depth:
        raise ValueError(f"count must be at most the number of blocks, {depth}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    return [tuple(sorted(torch.randperm(depth, generator=generator)[count:].tolist())) for _ in range(draws)]


def permuted_blocks(network: Network, swaps: int, *, draws: int = 10, seed: int = 0) -> list[Order]:
    """Orders in which so many random pairs of blocks of a flow change places, for :func:`lesion_study`.

    Args:
        network: as there, no adapted model.
        swaps: how many pairs change places, one after the other.
        draws: how many orders are drawn.
        seed: of the draws.

    Returns:
        The numbers of the blocks in order, for each draw.

    Raises:
        TypeError: no whole number, or another network.
        ValueError: no flow of two blocks; as :func:`lesion_study` besides.

    >>> from odenets.models import points_network
    >>> permuted_blocks(points_network(depth=5), 1, draws=2)
    [(0, 3, 2, 1, 4), (0, 1, 2, 4, 3)]
    """
    if isinstance(network, AdaptedModel):
        raise TypeError("network must be an odenets.Network: blocks of an adapted model can be left out alone")
    check_count("swaps", swaps, 0)
    check_count("draws", draws, 1)
    pairs, first = [], 0
    for length in _lengths(network):
        pairs += [(first + i, first + j) for j in range(length) for i in range(j)]
        first += length
    if not pairs:
        raise ValueError("network must have a flow of at least two blocks, which can change places")
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for _ in range(draws):
        order = list(range(first))
        for k in torch.randint(len(pairs), (swaps,), generator=generator).tolist():
            i, j = pairs[k]
            order[i], order[j] = order[j], order[i]
        orders.append(tuple(order))
    return orders


class _CutNetwork:
    """A network of flows as its blocks, each a flow of its own."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.flows = [_parts(flow, i) for i, flow in enumerate(network.flows)]
        self.names = network.names
        self.flow_of = [i for i, parts in enumerate(self.flows) for _ in parts]
        self.parts = [part for parts in self.flows for part in parts]

    def check(self, order: Order) -> None:
        """That blocks of a flow come before those of the next."""
        flows = [self.flow_of[m] for m in order]
        if flows != sorted(flows):
            raise ValueError(f"orders must take the blocks of a flow before those of the next, got {order}")

    def outputs(self, x: Tensor, orders: Sequence[Order]) -> Iterator[Any]:
        """The output of the whole, and in each order, which begins with the states that it shares with the whole."""
        state = self.network.encode(x)
        states = [state]  # behind so many blocks
        for m in range(len(self.parts)):
            state = self._step(state, m, self.flow_of[max(m - 1, 0)])
            states.append(state)
        last = len(self.flows) - 1
        yield self.network.head(state)
        for order in orders:
            same = next((m for m, k in enumerate(order) if k != m), len(order))
            state, flow = states[same], self.flow_of[max(same - 1, 0)]
            for m in order[same:]:
                state, flow = self._step(state, m, flow), self.flow_of[m]
            yield self.network.head(self._enter(state, flow, last))

    def _step(self, state: Tensor, m: int, flow: int) -> Tensor:
        """The state behind block m, from one in this flow."""
        return self.parts[m].record(self._enter(state, flow, self.flow_of[m]), check=False)[0]

    def _enter(self, state: Tensor, flow: int, into: int) -> Tensor:
        for transition in self.network.transitions[flow:into]:
            state = transition(state)
        return state


class _CutModel:
    """An adapted model, of whose blocks some are the identity while it runs."""

    def __init__(self, adapted: AdaptedModel, x: Any) -> None:
        if x is not None:
            call(adapted.find, x)
        self.adapted, self.model = adapted, adapted.model
        blocks = [spec.block for spec in adapted.blocks if not spec.recorder]
        projected = {spec.block for spec in adapted.blocks if spec.projection is not None}
        modules = dict(self.model.named_modules())
        self.names = tuple(name for name in dict.fromkeys(blocks) if name in modules and name not in projected)
        if not self.names:
            raise ValueError("network must have blocks that are modules and keep the shape of the state, got none")

    def check(self, order: Order) -> None:
        """That blocks are left out alone."""
        if [*order] != sorted(order):
            raise ValueError(f"orders must leave blocks of an adapted model out, and not exchange them, got {order}")

    def outputs(self, x: Tensor, orders: Sequence[Order]) -> Iterator[Any]:
        """The output of the whole, and with the blocks of each order."""
        yield call(self.adapted, x)
        for order in orders:
            with self._without({name for m, name in enumerate(self.names) if m not in order}):
                yield call(self.adapted, x)

    @contextmanager
    def _without(self, names: set[str]) -> Iterator[None]:
        modules = {name: self.model.get_submodule(name) for name in names}
        handles = [module.register_forward_hook(_identity(name), with_kwargs=True) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _identity(name: str) -> Callable[..., Any]:
    def replace(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        x0 = args[0] if args else next(iter(keywords.values()))
        x1 = output[0] if isinstance(output, tuple) else output
        if not (isinstance(x0, Tensor) and isinstance(x1, Tensor) and x0.shape == x1.shape):
            raise ValueError(f"block {name!r} does not keep the shape of the state, so that it cannot be removed")
        return (x0, *output[1:]) if isinstance(output, tuple) else x0

    return replace


def _check_network(network: Any) -> None:
    if not isinstance(network, Network | AdaptedModel):
        raise TypeError(
            f"network must be an odenets.Network or an adapted model, got {type(network).__name__}: pass adapt(network)"
        )
    if isinstance(network, Network) and network.readout != "solution":
        raise ValueError(f"network must read the solution, got readout {network.readout!r}")


def _cut(network: Network | AdaptedModel, x: Any) -> _CutNetwork | _CutModel:
    if isinstance(network, AdaptedModel):
        return _CutModel(network, x)
    if x is not None and any(nn.parameter.is_lazy(p) for p in network.parameters()):
        network(x)
    return _CutNetwork(network)


def _parts(flow: Any, number: int) -> list[Flow]:
    """Each block of a flow as a flow that keeps its time."""
    if not isinstance(flow, Flow):
        raise TypeError(f"network must be of Flows, whose blocks can be removed, got a {type(flow).__name__}")
    flow.check_one_step("network", "a block of it is no function of the state alone")
    if not len(flow.blocks):
        raise ValueError(f"flow {number} has no field yet: call network(x) once")
    if flow.stage_fields == "chained" and flow.depth > 1:
        raise ValueError(f"flow {number} has chained fields, so that a block reads the next one's")
    if not flow.shared:
        return [flow.part(m, m + 1) for m in range(flow.depth)]
    blocks: Any = [*flow.blocks]
    starts = [flow.start + math.fsum(flow.h[:m]) for m in range(flow.depth)]
    parts = [
        Flow.of(blocks, (h,), start=t, solver=flow.tableau, shared=True) for t, h in zip(starts, flow.h, strict=True)
    ]
    return [part.train(flow.training) for part in parts]


def _lengths(network: Any) -> list[int]:
    _check_network(network)
    cut = _cut(network, None)
    return [len(cut.names)] if isinstance(cut, _CutModel) else [len(parts) for parts in cut.flows]


def _checked(orders: Iterable[Sequence[int]] | None, cut: _CutNetwork | _CutModel) -> list[Order]:
    depth = len(cut.names)
    if orders is None:
        return [tuple(m for m in range(depth) if m != removed) for removed in range(depth)]
    chosen = [tuple(order) for order in orders]
    for order in chosen:
        for m in order:
            check_count("orders", m, 0)
        if len({*order}) < len(order) or any(m >= depth for m in order):
            raise ValueError(f"orders must hold numbers of blocks below {depth}, each at most once, got {order}")
        cut.check(order)
    return chosen


def _of_output(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy and right answers, summed over the samples, ``(2,)``."""
    if not isinstance(output, Tensor):
        raise TypeError(f"network must return logits, got {type(output).__name__}")
    y = y.to(output.device)
    right = (output.argmax(1) == y).sum()
    loss = F.cross_entropy(output.float() if output.dtype.itemsize < 4 else output, y, reduction="sum")
    return torch.stack([loss, right.to(loss.dtype)])


def _kendall(order: Order) -> float:
    pairs = [(a, b) for j, b in enumerate(order) for a in order[:j]]
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs) if pairs else 1.0
