"""Many instances of a small network trained together, as one batch of networks, each as if it were alone.

An average over a hundred seeds is a hundred trainings. One by one they cost a hundred times the overhead of calling
small operations; stacked by ``torch.func``, with a dimension of instances before all parameters, they cost it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.optim import Optimizer

from odenets.modes import device_of
from odenets.network import Network
from odenets.training.data import Batches, TensorData
from odenets.training.objectives import Objective

__all__ = ["Instances", "fit_instances"]

TOGETHER = 2**16
"""Most numbers in the data of an instance for which accuracies are measured together; one by one is then faster."""


@dataclass(frozen=True)
class Instances:
    """What became of n instances.

    Attributes:
        networks: the networks, trained.
        objectives: their objectives, with what they remember.
        epochs: epochs that each was trained for, ``(n,)``.
        train_loss: mean training loss of each epoch, ``(n, epochs)``; after its last one an instance keeps its figures.
        accuracy: per data set ``(n, epochs)``, after each epoch, as last measured; NaN before that.
    """

    networks: list[Network]
    objectives: list[Objective]
    epochs: Tensor
    train_loss: Tensor
    accuracy: dict[str, Tensor]


class _Instance(nn.Module):
    """A network and its objective, so that parameters and buffers of both are stacked."""

    def __init__(self, network: Network, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x: Tensor, y: Tensor | None, what: str) -> Tensor:
        if what == "output":
            return self.network(x)
        assert y is not None
        if what == "after step":
            self.objective.after_step(self.network, (x, y))
            return x.new_zeros(())
        output, records = self.network.record(x, **self.objective.measures)
        return self.objective(self.network, (x, y), output, records)


class _Stack:
    """The parameters and buffers of the instances still in training, a dimension of instances before each."""

    def __init__(self, instances: list[_Instance]) -> None:
        self.one = copy.deepcopy(instances[0])
        self.parameters, self.buffers = stack_module_state(instances)  # type: ignore[arg-type]
        self.parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self.parameters.items()}

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are not frozen."""
        return [p for p in self.parameters.values() if p.requires_grad]

    def call(self, x: Tensor, y: Tensor | None, what: str) -> Tensor:
        """Call every instance with its own inputs ``x`` ``(n, B, *S)`` and labels ``(n, B)``."""

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
            return functional_call(self.one, (parameters, buffers), (x, y, what))

        in_dims = (0, 0, 0, None if y is None else 0)
        return torch.vmap(run, in_dims, randomness="different")(self.parameters, self.buffers, x, y)

    def answers(self, row: int, x: Tensor) -> Tensor:
        """The classes that one of them finds most likely for inputs ``(N, *S)``."""
        own = tuple({name: value[row] for name, value in values.items()} for values in (self.parameters, self.buffers))
        return torch.cat([functional_call(self.one, own, (part, None, "output")).argmax(1) for part in x.split(100)])

    def write(self, instances: Sequence[_Instance], rows: Sequence[int]) -> None:
        """Write rows of the stack into instances of their own."""
        with torch.no_grad():
            for instance, row in zip(instances, rows, strict=True):
                own = {**dict(instance.named_parameters()), **dict(instance.named_buffers())}
                for name, stacked in {**self.parameters, **self.buffers}.items():
                    own[name].copy_(stacked[row])

    def keep(self, rows: Tensor, optimizer: Optimizer) -> None:
        """Go on with some of the rows; the optimizer's state follows."""
        n = len(next(iter(self.parameters.values())))
        (group,) = optimizer.param_groups
        for name, p in self.parameters.items():
            kept = p.detach()[rows].requires_grad_(p.requires_grad)
            state = optimizer.state.pop(p, {})
            if state:
                optimizer.state[kept] = {
                    key: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (n,) else v for key, v in state.items()
                }
            self.parameters[name] = kept
        group["params"] = self.trained
        self.buffers = {name: b[rows] for name, b in self.buffers.items()}


def fit_instances(
    networks: Sequence[Network],
    batches: Sequence[Batches],
    *,
    epochs: int,
    optimizer: Callable[[list[Tensor]], Optimizer],
    objective: Callable[[], Objective],
    measured: Mapping[str, Sequence[TensorData]] | None = None,
    every: int = 1,
    perfect: Sequence[str] = (),
    patience: int = 3,
    report: Callable[[int], object] = lambda n: None,
) -> Instances:
    """Train n networks of one architecture together; each ends, to rounding, as if it had been trained alone.

    Args:
        networks: of one architecture, each with its own weights; trained in place.
        batches: training data of each, of one size.
        epochs: how many.
        optimizer: makes an optimizer of one group that treats every number alike, such as Adam or SGD, with or without
            momentum; no norms over parameters.
        objective: makes the objective of one instance.
        measured: data sets of each instance, by name, on which accuracies are measured.
        every: epochs from one measurement to the next; the last epoch is always measured.
        perfect: names of data sets; an instance ends once it was right on all of them at ``patience`` measurements
            running.
        patience: see there.
        report: called with the number of epochs done, summed over the instances; one that ends early reports all.

    Returns:
        :class:`Instances`.

    Raises:
        ValueError: not as many batches or data sets as networks, data of several sizes, an unknown name in
            ``perfect``, an optimizer of several groups.
    """
    n, measured = len(networks), dict(measured or {})
    _check(n, batches, measured, every, perfect)
    instances = [_Instance(network, objective()) for network in networks]
    for instance, batch in zip(instances, batches, strict=True):
        instance.train()
        if any(nn.parameter.is_lazy(p) for p in instance.parameters()):
            instance.network(batch.data.x[:2])
    stack = _Stack(instances)
    made = optimizer(stack.trained)
    if len(made.param_groups) != 1:
        raise ValueError(f"optimizer must have one group of parameters, got {len(made.param_groups)}")
    sets = {
        name: (torch.stack([d.x for d in data]), torch.stack([d.y for d in data])) for name, data in measured.items()
    }
    drawn = _drawing(batches)
    training = torch.arange(n)  # which instances the rows of the stack are
    losses, ended, streak = (
        torch.full((n, epochs), torch.nan),
        torch.full((n,), epochs),
        torch.zeros(n, dtype=torch.int),
    )
    accuracy = {name: torch.full((n, epochs), torch.nan) for name in sets}
    for epoch in range(epochs):
        stack.one.train()
        total = torch.zeros(len(training), dtype=losses.dtype, device=device_of(stack.one))
        for part in drawn(training, epoch):
            needs_second_forward = stack.one.objective.needs_second_forward
            loss = stack.call(*part, "loss")
            made.zero_grad()
            loss.sum().backward()
            made.step()
            if needs_second_forward:
                stack.call(*part, "after step")
            else:
                stack.one.objective.after_step(stack.one.network, part)
            total += loss.detach() * part[1].shape[1]
        losses[training, epoch:] = (total / len(batches[0].data)).cpu()[:, None]
        looked = (epoch + 1) % every == 0 or epoch + 1 == epochs
        if looked:
            for name, right in _accuracies(stack, sets, training).items():
                accuracy[name][training, epoch:] = right[:, None]
        report(len(training))
        if not (looked and perfect):
            continue
        faultless = torch.stack([accuracy[name][training, epoch] == 1 for name in perfect]).all(0)
        streak[training] = torch.where(faultless, streak[training] + 1, 0)
        done = streak[training] >= patience
        if done.any():
            rows = done.nonzero().flatten()
            stack.write([instances[i] for i in training[rows].tolist()], rows.tolist())
            _count(stack, [instances[i] for i in training[rows].tolist()])
            ended[training[rows]] = epoch + 1
            report(len(rows) * (epochs - epoch - 1))
            training = training[~done]
            if not len(training):
                break
            stack.keep((~done).nonzero().flatten(), made)
    stack.write([instances[i] for i in training.tolist()], range(len(training)))
    _count(stack, [instances[i] for i in training.tolist()])
    return Instances(list(networks), [instance.objective for instance in instances], ended, losses, accuracy)


def _drawing(batches: Sequence[Batches]) -> Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]]:
    """Makes the batches ``(n, B, *S)`` and ``(n, B)`` of an epoch for some of the instances."""
    if any(b.crop or b.flip for b in batches):

        def augmented(training: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for parts in zip(*(batches[i].epoch(epoch) for i in training.tolist()), strict=True):
                x, y = zip(*parts, strict=True)
                yield torch.stack(x), torch.stack(y)

        return augmented
    x, y = torch.stack([b.data.x for b in batches]), torch.stack([b.data.y for b in batches])

    def plain(training: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, rows = torch.stack([batches[i].order(epoch) for i in training.tolist()]), training[:, None]
        for index in order.split(batches[0].size, 1):
            yield x[rows, index], y[rows, index]

    return plain


def _count(stack: _Stack, instances: list[_Instance]) -> None:
    """What the objectives count in Python they count together, on the one that is called."""
    for name, state in stack.one.state_dict().items():
        if name.endswith("_extra_state") and name.startswith("objective"):
            for instance in instances:
                instance.get_submodule(name.rpartition(".")[0]).set_extra_state(state)


@torch.no_grad()
def _accuracies(stack: _Stack, sets: dict[str, tuple[Tensor, Tensor]], training: Tensor) -> dict[str, Tensor]:
    """Share of right answers on each set, per row of the stack, in eval mode and one pass over all sets."""
    if not sets:
        return {}
    stack.one.eval()
    x, y = (torch.cat([part[training] for part in parts], 1) for parts in zip(*sets.values(), strict=True))
    if x[0].numel() > TOGETHER:
        answers = torch.stack([stack.answers(row, part) for row, part in enumerate(x)])
    else:
        answers = stack.call(x, None, "output").argmax(2)
    lengths = [x.shape[1] for x, _ in sets.values()]
    right = (answers == y).float()
    return {name: part.mean(1).cpu() for name, part in zip(sets, right.split(lengths, 1), strict=True)}


def _check(
    n: int, batches: Sequence[Batches], measured: dict[str, Sequence[TensorData]], every: int, perfect: Sequence[str]
) -> None:
    if n < 1:
        raise ValueError("networks must hold at least one network")
    for name, given in {"batches": [b.data for b in batches], **measured}.items():
        if len(given) != n:
            raise ValueError(f"{name} must hold one per network, {n}, got {len(given)}")
        if len({d.x.shape for d in given}) > 1:
            raise ValueError(f"{name} must be of one size, got {sorted({tuple(d.x.shape) for d in given})}")
    if len({b.size for b in batches}) > 1:
        raise ValueError(f"batches must be of one size, got {sorted({b.size for b in batches})}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if unknown := set(perfect) - set(measured):
        raise ValueError(f"perfect names {sorted(unknown)}, which is not measured; measured are {sorted(measured)}")
