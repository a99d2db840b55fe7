"""Networks of one architecture with their objectives, stacked: one call runs, trains or measures all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_leaves, tree_map

from odenets.inputs import arguments
from odenets.modes import device_of
from odenets.network import Network
from odenets.recording import record
from odenets.training.metrics import Metric, accuracy
from odenets.training.objectives import Objective
from odenets.training.optimization import MakeOptimizer, make_optimizer

__all__ = ["Instance", "Stack", "stacked"]

TOGETHER = 2**16
"""Most numbers in the data of an instance for which accuracies are measured together; one by one is then faster."""


class Instance(nn.Module):
    """A network and its objective, so that parameters and buffers of both are stacked."""

    def __init__(self, network: Network, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, inputs: Any, y: Any, what: str) -> Any:
        """Output, loss, or what the objective does after a step, as ``what`` says."""
        x, *args = arguments(inputs)
        if what == "output":
            return self.network(x, *args)
        if what == "after step":
            self.objective.after_step(self.network, (inputs, y))
            return x.new_zeros(())
        output, records = record(self.network, inputs, self.objective.measures)
        return self.objective.loss(self.network, (inputs, y), output, records)


class Stack:
    """The instances still in training: their parameters and buffers, a dimension of instances before each.

    Attributes:
        numbers: which instances the rows are.
        optimizer: of the stacked parameters.
    """

    def __init__(self, instances: list[Instance], optimizer: MakeOptimizer) -> None:
        self.instances = instances
        self.numbers = torch.arange(len(instances))
        self.one = copy.deepcopy(instances[0])
        self.parameters, self.buffers = stack_module_state(instances)  # type: ignore[arg-type]  # any list of modules
        self.parameters = {name: p.detach().requires_grad_(p.requires_grad) for name, p in self.parameters.items()}
        self.optimizer = make_optimizer(optimizer, self._trained)  # type: ignore[arg-type]  # leaves, as parameters are
        if (groups := len(self.optimizer.param_groups)) != 1:
            raise ValueError(f"optimizer must have one group of parameters, got {groups}")

    @property
    def _trained(self) -> list[Tensor]:
        return [p for p in self.parameters.values() if p.requires_grad]

    def _call(self, x: Any, y: Any, what: str) -> Any:
        """Call every instance with its own inputs ``x`` ``(n, B, *S)`` and targets ``(n, B)``."""

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Any, y: Any) -> Any:
            return functional_call(self.one, (parameters, buffers), (x, y, what))

        in_dims = (0, 0, 0, None if y is None else 0)
        return torch.vmap(run, in_dims, randomness="different")(self.parameters, self.buffers, x, y)

    def train(self, batches: Iterable[tuple[Any, Any]], after_step: Callable[[], object]) -> Tensor:
        """Train for an epoch: each instance's mean loss; ``after_step`` is called after each step."""
        self.one.train()
        objective, optimizer = self.one.objective, self.optimizer
        total, samples = torch.zeros(len(self.numbers), device=device_of(self.one)), 0
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
            after_step()
            of_each = arguments(x)[0].shape[1]
            total += loss.detach() * of_each
            samples += of_each
        return total / samples

    @torch.no_grad()
    def measure(self, sets: Mapping[str, tuple[Any, Any]], metric: Metric) -> dict[str, Tensor]:
        """A metric on each set, per row, in eval mode."""
        self.one.eval()
        if sets and metric.function is accuracy and all(isinstance(x, Tensor) for x, _ in sets.values()):
            return self._accuracies(dict(sets))
        return {name: self._values(tree_map(lambda t: t[self.numbers], pair), metric) for name, pair in sets.items()}

    def _values(self, pair: tuple[Any, Any], metric: Metric) -> Tensor:
        """A metric on one set, per row."""
        inputs, y = pair
        n, samples = arguments(inputs)[0].shape[:2]
        values = []
        for row in range(n):
            x, of_row = (tree_map(lambda t, i=row: t[i], part) for part in (inputs, y))
            values.append(metric.value(self._output(row, x), of_row, samples))
        return torch.tensor(values)

    def _accuracies(self, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Share of right answers on each set, per row, in one pass over all sets."""
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
        return torch.cat([self._output(row, part).argmax(1) for part in x.split(100)])

    def _output(self, row: int, x: Any) -> Any:
        own = tuple({name: value[row] for name, value in values.items()} for values in (self.parameters, self.buffers))
        return functional_call(self.one, own, (x, None, "output"))

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
            for name, rows_of_all in {**self.parameters, **self.buffers}.items():
                own[name].copy_(rows_of_all[row])
            for name, state in counts.items():
                instance.get_submodule(name).set_extra_state(state)


def stacked(trees: Iterable[Any], what: str) -> Any:
    """Trees of tensors as one, with a dimension before each tensor.

    Raises:
        TypeError: something in them is no tensor.
        ValueError: they are of several shapes.
    """
    trees = [*trees]
    for tree in trees:
        if other := next((leaf for leaf in tree_leaves(tree) if not isinstance(leaf, Tensor)), None):
            raise TypeError(f"{what} must be tensors, to be stacked, got {type(other).__name__}")
    shapes = {tuple(tuple(leaf.shape) for leaf in tree_leaves(tree)) for tree in trees}
    if len(shapes) > 1:
        raise ValueError(f"{what} must be of one size, got {sorted(shapes)}")
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)
