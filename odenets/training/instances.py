"""Many instances of a small network trained together, as one batch of networks, each to the result of its own training.

An average over a hundred seeds is a hundred trainings. One by one they cost a hundred times the overhead of calling
small operations; stacked by ``torch.func``, with a dimension of instances before all parameters, they cost it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Trained instances, n of them.

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
        return self.objective.loss(self.network, (x, y), output, records)


class _Stack:
    """The instances still in training: their parameters and buffers, a dimension of instances before each."""

    def __init__(self, instances: list[_Instance], optimizer: Callable[[list[Tensor]], Optimizer]) -> None:
        self.instances = instances
        self.numbers = torch.arange(len(instances))
        """Which instances the rows are."""
        self.one = copy.deepcopy(instances[0])
        self.parameters, self.buffers = stack_module_state(instances)  # type: ignore[arg-type]  # any list of modules
        self.parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self.parameters.items()}
        self.optimizer = optimizer(self._trained)
        if (groups := len(self.optimizer.param_groups)) != 1:
            raise ValueError(f"optimizer must have one group of parameters, got {groups}")

    @property
    def _trained(self) -> list[Tensor]:
        return [p for p in self.parameters.values() if p.requires_grad]

    def _call(self, x: Tensor, y: Tensor | None, what: str) -> Tensor:
        """Call every instance with its own inputs ``x`` ``(n, B, *S)`` and labels ``(n, B)``."""

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
            return functional_call(self.one, (parameters, buffers), (x, y, what))

        in_dims = (0, 0, 0, None if y is None else 0)
        return torch.vmap(run, in_dims, randomness="different")(self.parameters, self.buffers, x, y)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Train for an epoch: each instance's loss, summed over its samples."""
        self.one.train()
        objective, optimizer = self.one.objective, self.optimizer
        total = torch.zeros(len(self.numbers), device=device_of(self.one))
        for x, y in batches:
            second_forward = objective.needs_second_forward
            loss = self._call(x, y, "loss")
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            if second_forward:
                self._call(x, y, "after step")
            else:
                objective.after_step(self.one.network, (x, y))
            total += loss.detach() * y.shape[1]
        return total

    @torch.no_grad()
    def accuracies(self, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Share of right answers on each set, per row, in eval mode and one pass over all sets."""
        if not sets:
            return {}
        self.one.eval()
        x, y = (torch.cat([part[self.numbers] for part in parts], 1) for parts in zip(*sets.values(), strict=True))
        if x[0].numel() > TOGETHER:
            answers = torch.stack([self._answers(row, part) for row, part in enumerate(x)])
        else:
            answers = self._call(x, None, "output").argmax(2)
        lengths = [x.shape[1] for x, _ in sets.values()]
        right = (answers == y).float()
        return {name: part.mean(1).cpu() for name, part in zip(sets, right.split(lengths, 1), strict=True)}

    def _answers(self, row: int, x: Tensor) -> Tensor:
        """The classes that one instance finds most likely for inputs ``(N, *S)``."""
        own = tuple({name: value[row] for name, value in values.items()} for values in (self.parameters, self.buffers))
        return torch.cat([functional_call(self.one, own, (part, None, "output")).argmax(1) for part in x.split(100)])

    def end(self, rows: Tensor) -> None:
        """Write some rows, a mask, into their instances and go on with the others; the optimizer's state follows."""
        self._write(rows)
        n = len(self.numbers)
        self.numbers = self.numbers[~rows]
        if not len(self.numbers):
            return
        others = (~rows).nonzero().flatten()
        for name, p in self.parameters.items():
            rest = p.detach()[others].requires_grad_(p.requires_grad)
            state = self.optimizer.state.pop(p, {})
            if state:
                self.optimizer.state[rest] = {
                    key: v[others] if isinstance(v, Tensor) and v.shape[:1] == (n,) else v for key, v in state.items()
                }
            self.parameters[name] = rest
        self.optimizer.param_groups[0]["params"] = self._trained
        self.buffers = {name: b[others] for name, b in self.buffers.items()}

    @torch.no_grad()
    def _write(self, rows: Tensor) -> None:
        """Write rows into instances; what objectives count in Python they count together, on the one that is called."""
        counts = {
            name.rpartition(".")[0]: state
            for name, state in self.one.state_dict().items()
            if name.endswith("_extra_state") and name.startswith("objective")
        }
        for row in rows.nonzero().flatten().tolist():
            instance = self.instances[int(self.numbers[row])]
            own = {**dict(instance.named_parameters()), **dict(instance.named_buffers())}
            for name, stacked in {**self.parameters, **self.buffers}.items():
                own[name].copy_(stacked[row])
            for name, state in counts.items():
                instance.get_submodule(name).set_extra_state(state)


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
        perfect, patience: names of data sets; an instance ends once it was right on all of them at so many measurements
            running.
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
    stack = _Stack(instances, optimizer)
    sets = {
        name: (torch.stack([d.x for d in data]), torch.stack([d.y for d in data])) for name, data in measured.items()
    }
    batches_of = _drawing(batches)
    losses = torch.full((n, epochs), torch.nan)
    accuracy = {name: torch.full((n, epochs), torch.nan) for name in sets}
    ended, streak = torch.full((n,), epochs), torch.zeros(n, dtype=torch.int)
    for epoch in range(epochs):
        numbers = stack.numbers
        total = stack.train(batches_of(numbers, epoch))
        losses[numbers, epoch:] = (total / len(batches[0].data)).cpu()[:, None]
        measuring = (epoch + 1) % every == 0 or epoch + 1 == epochs
        if measuring:
            for name, right in stack.accuracies(sets).items():
                accuracy[name][numbers, epoch:] = right[:, None]
        report(len(numbers))
        if not (measuring and perfect):
            continue
        faultless = torch.stack([accuracy[name][numbers, epoch] == 1 for name in perfect]).all(0)
        streak[numbers] = torch.where(faultless, streak[numbers] + 1, 0)
        done = streak[numbers] >= patience
        if done.any():
            ended[numbers[done]] = epoch + 1
            report(int(done.sum()) * (epochs - epoch - 1))
            stack.end(done)
            if not len(stack.numbers):
                break
    stack.end(torch.ones(len(stack.numbers), dtype=torch.bool))
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


def _check(
    n: int, batches: Sequence[Batches], measured: dict[str, Sequence[TensorData]], every: int, perfect: Sequence[str]
) -> None:
    if n < 1:
        raise ValueError("networks must hold at least one network")
    for name, sets in {"batches": [b.data for b in batches], **measured}.items():
        if len(sets) != n:
            raise ValueError(f"{name} must hold one per network, {n}, got {len(sets)}")
        if len({d.x.shape for d in sets}) > 1:
            raise ValueError(f"{name} must be of one size, got {sorted({tuple(d.x.shape) for d in sets})}")
    if len({b.size for b in batches}) > 1:
        raise ValueError(f"batches must be of one size, got {sorted({b.size for b in batches})}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if unknown := set(perfect) - set(measured):
        raise ValueError(f"perfect names {sorted(unknown)}, which is not measured; measured are {sorted(measured)}")
