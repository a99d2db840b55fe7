"""Pontryagin's maximum principle as training: successive approximations of states, costates and weights.

Training is the control of ``x_{m+1} = g_m(x_m, theta_m)`` by the weights of its steps. At a minimum of the loss each
step's weights make its Hamiltonian ``H_m = <p_{m+1}, g_m(x_m, theta_m)>`` stationary, with the costates
``p_m = grad_x H_m(x_m, p_{m+1})`` and ``p_M = -grad L(x_M)`` (Pontryagin et al. 1962). The method of successive
approximations computes states and costates with the weights that there are, and then maximizes the Hamiltonian of each
step by itself, so that no gradient flows from step to step.

>>> import torch, odenets
>>> network, x, y = odenets.models.points_network(depth=4), torch.rand(8, 2), torch.arange(8) % 2
>>> training = SuccessiveApproximations(network, rho=10.0)
>>> losses = [training.update(x, y).item() for _ in range(3)]
>>> losses[2] < losses[0]
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from odenets.errors import check_count, check_number, refuse
from odenets.flow import Flow
from odenets.inputs import arguments
from odenets.modes import keeping_state, to_training_mode
from odenets.network import Network
from odenets.recording import Records
from odenets.training.checks import check_objective, other_names
from odenets.training.evaluation import evaluate
from odenets.training.metrics import MetricFunction
from odenets.training.objectives import CrossEntropy, Objective, Task
from odenets.training.optimization import MakeOptimizer
from odenets.training.sources import Collate, Source

__all__ = ["SuccessiveApproximations", "fit_maximum_principle"]

LBFGS: MakeOptimizer = partial(torch.optim.LBFGS, max_iter=10, line_search_fn="strong_wolfe")
"""At most ten iterations with a line search, for each maximization."""


class _Layer(NamedTuple):
    """A step, or what stands before, between and behind flows, and its place in the network."""

    name: str
    module: nn.Module
    takes_args: bool

    def __call__(self, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        return self.module(x, *args) if self.takes_args else self.module(x)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]


class _Point(NamedTuple):
    """State and costate before a layer, and behind it."""

    x0: Tensor
    p0: Tensor | None
    x1: Tensor
    p1: Tensor


class SuccessiveApproximations:
    """The extended method of successive approximations of Li, Chen, Tai and E (2018), for a loop of one's own.

    An update computes, for a batch, the states x and the costates p of all layers, the latter of each sample's own
    loss, and then maximizes for each layer by itself, in its weights theta alone, the mean over the samples of

    ``<p1, g(x0, theta)> - rho/2 |x1 - g(x0, theta)|^2 - rho/2 |p0 - grad_x <p1, g(x0, theta)>|^2``

    minus ``decay/2 |theta|^2``, where g is the step ``x + h r`` of a block. With ``rho=0`` and one step of SGD for each
    layer it is gradient descent by backpropagation with that weight decay, to rounding. A maximization that goes far
    may let the loss grow, and rho holds weights where the states and costates are nearly kept. The layers of a network
    are its encoder, blocks, transitions and head; norms are Euclidean, sums over the features.

    Each maximization begins with a new optimizer. Running statistics are those of the update's one forward pass, and
    gradients in ``p.grad`` stay as they are. Parameters that take no gradients stay.

    Args:
        network: a :class:`~odenets.Network` or :class:`~odenets.Flow` of blocks with weights of their own. With rho
            above 0 its fields are differentiated twice, which implicit methods are not.
        objective: an objective that measures no steps, or a function ``(output, y) -> loss``, the mean over the
            samples; cross-entropy if not given.
        rho: weight of the penalties, not negative; where the loss grows, take a larger one.
        decay: weight of the squared weights, a cost of the controls, not negative.
        optimizer: makes the optimizer of a layer's parameters; L-BFGS of at most ten iterations if not given.
        iterations: its steps in each maximization.

    Raises:
        TypeError: another network, no objective, or what is no number.
        ValueError: a flow without a field, whose blocks share weights or which is reversible; a weight in two layers;
            none that trains; active dropout, which is another function at each call; an objective that measures steps;
            or a number out of range.

    References:
        Li, Chen, Tai, E. Maximum principle based algorithms for deep learning. JMLR 2018, arXiv:1710.09513.

    >>> import torch, odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), solver="euler", depth=4)
    >>> training = SuccessiveApproximations(flow, nn.functional.mse_loss, rho=0.5)
    >>> training.update(torch.randn(8, 2), torch.zeros(8, 2)).shape
    torch.Size([])
    """

    def __init__(
        self,
        network: Network | Flow,
        objective: Objective | Callable[[Any, Any], Tensor] | None = None,
        *,
        rho: float = 10.0,
        decay: float = 0.0,
        optimizer: MakeOptimizer = LBFGS,
        iterations: int = 1,
        **unknown: Any,
    ) -> None:
        refuse("SuccessiveApproximations", unknown, {"weight_decay": "decay", "lr": "optimizer, partial(SGD, lr=0.1)"})
        self.network, self.objective = network, _terminal(objective)
        self.rho, self.decay = _weight("rho", rho), _weight("decay", decay)
        check_count("iterations", iterations, 1)
        if not callable(optimizer):
            raise TypeError(
                f"optimizer must be a function of parameters, got {type(optimizer).__name__}: "
                "partial(torch.optim.SGD, lr=0.1)"
            )
        self.optimizer, self.iterations = optimizer, iterations
        _layers(network)

    def update(self, x: Any, y: Any) -> Tensor:
        """Take the weights to those that maximize the Hamiltonians at the states and costates of a batch.

        Args:
            x: inputs, ``(B, *S)``, or a tuple ``(x, *args)`` with what the velocity fields take besides.
            y: targets.

        Returns:
            The loss before the update, a scalar without a gradient.

        Raises:
            TypeError, ValueError: a loss or weights that are not finite; as the class, of what has changed since.
        """
        layers = _layers(self.network)
        with torch.inference_mode(False), torch.enable_grad():
            points, loss = self._points(layers, x, y)
            _, *args = arguments(x)
            for layer, point in zip(layers, points, strict=True):
                if layer.parameters:
                    self._maximize(layer, point, tuple(args))
        return loss

    def _points(self, layers: list[_Layer], inputs: Any, y: Any) -> tuple[list[_Point], Tensor]:
        """States and costates around each layer, and the loss."""
        x, *args = arguments(inputs)
        passes: list[tuple[Tensor, Tensor]] = []
        for layer in layers:
            x0 = x.detach().clone() if not passes else x.detach()
            x0 = x0.requires_grad_() if x0.is_floating_point() else x0
            x = layer(x0.clone() if x0.requires_grad else x0, tuple(args))
            passes.append((x0, x))
        output = x.detach().requires_grad_()
        loss = self.objective.loss(self.network, (inputs, y), output, Records({}))
        if not loss.isfinite():
            raise ValueError(f"loss must be finite, got {loss.item()}: take a larger rho, or fewer iterations")
        (slope,) = torch.autograd.grad(loss, output)
        p, points = -len(output) * slope, []
        for x0, x1 in reversed(passes):
            p0 = None
            if x0.requires_grad and x1.requires_grad:
                (p0,) = torch.autograd.grad(x1, x0, p, allow_unused=True)
            points.append(_Point(x0.detach(), p0, x1.detach(), p))
            p = torch.zeros_like(x0) if p0 is None else p0
        return points[::-1], loss.detach()

    def _maximize(self, layer: _Layer, point: _Point, args: tuple[Any, ...]) -> None:
        parameters = layer.parameters
        before, weights = [p.grad for p in parameters], [p.detach().clone() for p in parameters]
        optimizer: Any = self.optimizer(parameters)  # whose types know no closure that returns a tensor

        def closure() -> Tensor:
            value = -self._hamiltonian(layer, point, args)
            slopes = torch.autograd.grad(value, parameters, allow_unused=True)
            for p, slope in zip(parameters, slopes, strict=True):
                p.grad = torch.zeros_like(p) if slope is None else slope
            return value.detach()

        try:
            with keeping_state(layer.module):
                for _ in range(self.iterations):
                    optimizer.step(closure)
        finally:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        if not all(bool(p.isfinite().all()) for p in parameters):
            with torch.no_grad():
                for p, weight in zip(parameters, weights, strict=True):
                    p.copy_(weight)
            raise ValueError(
                f"the weights of {layer.name} must stay finite, and {type(optimizer).__name__} takes them to infinity: "
                "they are left as they were; take a larger rho, or another optimizer"
            )

    def _hamiltonian(self, layer: _Layer, point: _Point, args: tuple[Any, ...]) -> Tensor:
        """The augmented Hamiltonian of a layer with the weights that it has, the mean over the samples."""
        x0, p0, x1, p1 = point
        bends = self.rho > 0 and p0 is not None
        x0 = x0.clone().requires_grad_() if bends else x0
        x = layer(x0.clone(), args)
        total = (p1 * x).sum()
        value = total
        if self.rho:
            value = value - self.rho / 2 * (x1 - x).square().sum()
        if bends and p0 is not None:
            (p,) = torch.autograd.grad(total, x0, create_graph=True)
            value = value - self.rho / 2 * (p0 - p).square().sum()
        value = value / len(x)
        if self.decay:
            value = value - self.decay / 2 * torch.stack([p.square().sum() for p in layer.parameters]).sum()
        return value


def fit_maximum_principle(
    network: Network | Flow,
    batches: Iterable[Any],
    *,
    epochs: int,
    objective: Objective | Callable[[Any, Any], Tensor] | None = None,
    rho: float = 10.0,
    decay: float = 0.0,
    optimizer: MakeOptimizer = LBFGS,
    iterations: int = 1,
    validation: Iterable[Any] | None = None,
    metric: MetricFunction | None = None,
    collate: Collate | None = None,
    report: Callable[[dict[str, Any]], object] = lambda row: None,
    **unknown: Any,
) -> list[dict[str, Any]]:
    """Train by :class:`SuccessiveApproximations`, an update for each batch.

    Large batches serve it best: weights are taken to what one batch calls for.

    Args:
        network, objective, rho, decay, optimizer, iterations: those of the class; a network without a field yet gets
            it from the first batch.
        batches: any iterable of batches ``(inputs, targets)``, taken to the network's device and dtype.
        epochs: how often all are drawn.
        validation: data as ``batches``, on which loss and metric are measured after each epoch.
        metric: as in :func:`odenets.training.evaluate`.
        collate: makes ``(inputs, targets)`` of a batch that is no such pair.
        report: called with the row of each epoch.

    Returns:
        A row for each epoch: ``epoch``, ``train_loss``, the mean over the samples of the losses before the updates,
        and with validation ``validation_loss`` and the metric, ``validation_accuracy``.

    Raises:
        TypeError, ValueError: as the class, :meth:`SuccessiveApproximations.update` and
            :func:`odenets.training.evaluate`.

    >>> import torch, odenets
    >>> from odenets.training import Batches, points
    >>> network, train = odenets.models.points_network(depth=3), Batches(points("moons", 40, seed=0), 40)
    >>> [list(row) for row in fit_maximum_principle(network, train, epochs=1, validation=train)]
    [['epoch', 'train_loss', 'validation_loss', 'validation_accuracy']]
    """
    refuse("fit_maximum_principle()", unknown, other_names("network", "batches", "objective", "metric", "collate"))
    check_count("epochs", epochs, 0)
    source = Source.of(batches, collate)
    held_out = None if validation is None else Source.of(validation, collate, "validation")
    for one in (source, held_out):
        if one is not None:
            one.move_to(network)
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        with torch.no_grad(), keeping_state(network):
            network(*arguments(source.first()[0]))
    settings: dict[str, Any] = {"rho": rho, "decay": decay, "optimizer": optimizer, "iterations": iterations}
    training = SuccessiveApproximations(network, objective, **settings)
    rows = []
    for epoch in range(1, epochs + 1):
        to_training_mode(network)
        total, samples = 0.0, 0
        for x, y in source.epoch(epoch - 1):
            n = len(arguments(x)[0])
            total, samples = total + training.update(x, y).item() * n, samples + n
        row: dict[str, Any] = {"epoch": epoch, "train_loss": total / samples}
        if held_out is not None:
            evaluation = evaluate(network, held_out, objective=training.objective, metric=metric)  # type: ignore[arg-type]  # a source of batches
            row["validation_loss"] = evaluation.loss
            if evaluation.name:
                row[f"validation_{evaluation.name}"] = evaluation.metric
        rows.append(row)
        report(row)
    return rows


def _terminal(objective: Any) -> Objective:
    """The objective, a function of the output alone."""
    if objective is None:
        return CrossEntropy()
    if callable(objective) and not isinstance(objective, Objective | type):
        return Task(cast(Callable[[Any, Any], Tensor], objective))
    objective = check_objective(objective)
    if objective.measures:
        raise ValueError(
            f"objective must be of the output alone, got {type(objective).__name__}, which measures steps, "
            f"{[*objective.measures]}: costs of the controls are decay"
        )
    return objective


def _weight(name: str, value: Any) -> float:
    value = check_number(name, value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return value


def _layers(network: Any) -> list[_Layer]:
    """The layers whose composition a network is, each with weights of its own.

    Raises:
        TypeError, ValueError: as the class.
    """
    if not isinstance(network, Network | Flow):
        raise TypeError(
            f"network must be an odenets.Network or a Flow, whose steps are layers, got {type(network).__name__}"
        )
    if network.__dict__.get("readout", "solution") != "solution":
        raise ValueError(f"network must read the solution, got readout {network.readout!r}")
    layers = [*_steps_of(network)]
    owners: dict[nn.Parameter, str] = {}
    for layer in layers:
        for p in layer.module.parameters():
            if owners.setdefault(p, layer.name) != layer.name:
                raise ValueError(
                    f"each weight must be of one layer, whose Hamiltonian it maximizes, got one in {owners[p]} and in "
                    f"{layer.name}: take blocks with weights of their own, or odenets.training.fit"
                )
        for name, module in layer.module.named_modules():
            if module.training and isinstance(module, Flow) and getattr(module.tableau, "draws", False):
                raise ValueError(
                    f"{layer.name} has steps of {module.tableau.name} that draw random numbers, another function at "
                    "each evaluation: call network.eval() before, or odenets.training.fit"
                )
            if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise ValueError(
                    f"{layer.name} has active dropout, {name!r}, which is another function at each evaluation: "
                    "put it into eval mode, or set its p to 0"
                )
    if not any(layer.parameters for layer in layers):
        raise ValueError("network has no parameter that requires a gradient: nothing would train")
    return layers


def _steps_of(network: Network | Flow) -> Iterator[_Layer]:
    if isinstance(network, Flow):
        yield from _blocks_of(network, "")
        return
    yield _Layer("encoder", network.encoder, False)
    flows = 0
    for layer in network.layers:
        if layer in network.flows:
            yield from _blocks_of(layer, f"flows.{flows} ")
            flows += 1
        else:
            yield _Layer(f"transitions.{flows - 1}", layer, False)
    yield _Layer("head", network.head, False)


def _blocks_of(flow: Any, where: str) -> Iterator[_Layer]:
    if not isinstance(flow, Flow):
        raise TypeError(
            f"network must be of Flows, whose blocks have weights of their own, got a {type(flow).__name__}: "
            "odenets.training.fit trains it"
        )
    if flow.coupling is not None:
        raise ValueError("network has a ReversibleFlow, whose steps are of two states: odenets.training.fit trains it")
    if not len(flow.blocks):
        raise ValueError(f"{where}flow has no field yet: call network(x) once")
    if flow.shared or flow.stage_fields == "chained":
        how = "one block for all its steps" if flow.shared else "chained fields"
        raise ValueError(
            f"{where}flow has {how}, so that its steps share weights: take blocks with weights of their own, or "
            "odenets.training.fit"
        )
    for m in range(flow.depth):
        yield _Layer(f"{where}blocks.{m}", flow.part(m, m + 1), True)
