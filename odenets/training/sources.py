"""Sources: any iterable of batches as every training reads it, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from odenets.inputs import arguments, has_rows, kind_of, plain, rows, samples_in
from odenets.modes import device_of, dtype_of, random_state, set_random_state
from odenets.training.data import Batches, TensorData, data_for

__all__ = ["Collate", "Source", "arguments", "part", "samples_in"]

Collate = Callable[[Any], tuple[Any, Any]]
"""Makes ``(inputs, targets)`` of what an iterable yields."""

PARTS = ("", "sampler", "batch_sampler", "batch_sampler.sampler", "dataset")
"""Where an iterable holds what decides its order: itself, and the parts of a DataLoader."""


class Source:
    """The batches ``(inputs, targets)`` of an iterable.

    ``inputs`` is a tensor ``(B, ...)``, a tuple ``(x, *args)`` or a dictionary of what the network takes by keyword,
    ``targets`` whatever the objective reads.

    Attributes:
        data: the iterable: a DataLoader, a list, an iterator, which has one epoch, or what else yields batches.
        collate: makes the pair of what ``data`` yields; None where it yields pairs.
        name: of the argument, for errors.
    """

    def __init__(self, data: Iterable[Any], collate: Collate | None = None, name: str = "batches") -> None:
        self.data, self.collate, self.name = data, collate, name
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._begun: _Begun | None = None
        self._spent = self._taken_up = False

    @staticmethod
    def of(data: Any, collate: Collate | None = None, name: str = "batches") -> Source:
        """The source of any data.

        Raises:
            TypeError: it is no iterable of batches, or ``collate`` is no function.
            ValueError: it holds no batch.
        """
        if isinstance(data, Source):
            return data
        if collate is not None and not callable(collate):
            raise TypeError(f"collate must be a function batch -> (inputs, targets), got {type(collate).__name__}")
        if isinstance(data, Batches):
            if type(data).__iter__ is not Batches.__iter__ and type(data).epoch is Batches.epoch:
                raise TypeError(f"{name} must draw in epoch(self, epoch), got a {type(data).__name__} with an __iter__")
            return _InMemory(data, collate, name)
        if collate is None and _is_pair(data):
            raise TypeError(
                f"{name} must be an iterable of batches, got the tensors {tuple(data[0].shape)} and "
                f"{tuple(data[1].shape)}: pass odenets.training.Batches((x, y), size), [(x, y)] for one batch, or a "
                "DataLoader of TensorDataset(x, y)"
            )
        if isinstance(data, TensorData):
            remedy = "pass odenets.training.Batches(data, size)"
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            remedy = "pass torch.utils.data.DataLoader(dataset, batch_size)"
        elif isinstance(data, Tensor | str | bytes | Mapping | nn.Module) or not isinstance(data, Iterable):
            remedy = "pass a DataLoader, or a list of pairs (inputs, targets)"
        else:
            source = Source(data, collate, name)
            if source.length == 0:
                raise source._empty()
            return source
        raise TypeError(f"{name} must be an iterable of batches, got {type(data).__name__}: {remedy}")

    @property
    def length(self) -> int | None:
        """Batches of an epoch; None where the iterable does not know."""
        try:
            return len(self.data)  # type: ignore[arg-type]  # that is the question
        except (TypeError, NotImplementedError):
            return None

    @property
    def title(self) -> str:
        """What an error about the samples calls them."""
        return self.name

    @property
    def shared(self) -> bool:
        """Whether the batches are the same in every process of a group: those of a list, and those in memory."""
        return isinstance(self.data, Sequence)

    @property
    def has_one_epoch(self) -> bool:
        """Whether the data is an iterator, which cannot begin anew."""
        return isinstance(self.data, Iterator)

    def move_to(self, network: nn.Module) -> None:
        """From now on batches come on the device of a network and in its precision.

        Floating inputs are taken to its dtype, floating targets to that or float32, whichever is finer; whole numbers
        keep theirs.
        """
        self._place = device_of(network), dtype_of(network).to_real()

    def epoch(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The batches of an epoch; samplers with ``set_epoch`` are told its number.

        Raises:
            TypeError: a batch is no pair, or its inputs are no tensors.
            ValueError: no batch, one without samples, or a second epoch of an iterator.
        """
        number = 0
        for number, batch in enumerate(self._begin(epoch), 1):
            yield self._pair(batch, number)
        if not number:
            raise self._empty()

    def in_order(self) -> Iterator[tuple[Any, Any]]:
        """The batches for an evaluation: one pass, after which random state and seeded samplers are as they were.

        :class:`~odenets.training.Batches` come in the order of their data, without augmentation.
        """
        before, state = random_state(), self.state_dict()
        try:
            yield from self.epoch(0)
        finally:
            self.load_state_dict(state)
            self._taken_up = False
            set_random_state(before)

    def first(self, epoch: int = 0) -> tuple[Any, Any]:
        """The first batch of an epoch, which begins with it all the same; random state is left as it was."""
        if self._begun is None:
            before, generators = random_state(), self.state_dict()
            iterator = self._begin(epoch)
            batches = [*islice(iterator, 1)]
            self._begun = _Begun(epoch, batches, iterator, generators, random_state())
            set_random_state(before)
        if not self._begun.batches:
            raise self._empty()
        return self._pair(self._begun.batches[0], 1)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of the generators that a loader and its samplers hold, by where they are."""
        return {place: generator.get_state() for place, generator in self._generators().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            ValueError: other parts hold generators.
        """
        generators = self._generators()
        if set(generators) != set(state):
            raise ValueError(
                f"{self.name} must hold the seeded generators that it held in the checkpoint, {sorted(state)}, got "
                f"{sorted(generators)}"
            )
        self._begun = None if not self.has_one_epoch else self._begun
        self._taken_up = True
        for place, generator in generators.items():
            generator.set_state(state[place])

    def _begin(self, epoch: int) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        if begun is not None and (begun.epoch == epoch or self.has_one_epoch):
            set_random_state(begun.after)
            return chain(begun.batches, begun.iterator)
        if begun is not None:
            self.load_state_dict(begun.generators)
        if self.has_one_epoch and self._spent:
            raise ValueError(
                f"{self.name} is an iterator ({type(self.data).__name__}), which gives one epoch: pass a list or a "
                "DataLoader, which begin anew"
            )
        self._spent = True
        self._start_workers()
        for part in self._parts().values():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        return iter(self.data)

    def _start_workers(self) -> None:
        """Start workers that persist, after a resume: when they start, and only then, a loader draws their seed."""
        persist, self._taken_up = self._taken_up and getattr(self.data, "persistent_workers", False), False
        if persist:
            before, state = random_state(), self.state_dict()
            iter(self.data)
            self.load_state_dict(state)
            set_random_state(before)
            self._taken_up = False

    def _pair(self, batch: Any, number: int) -> tuple[Any, Any]:
        which = f"batch {number} of {self.name}"
        if self.collate is not None:
            batch, which = self.collate(batch), f"what collate returns for {which}"
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise TypeError(f"{which} must be a pair (inputs, targets), got {kind_of(batch)}: {self._remedy(batch)}")
        inputs, targets = plain(batch[0]), batch[1]  # torch's default_collate makes lists
        if samples_in(inputs, which) == 0:
            raise ValueError(f"{which} must hold samples, got none")
        if self._place is None:
            return inputs, targets
        device, dtype = self._place
        finer = torch.promote_types(dtype, torch.float32)
        return _moved(inputs, device, dtype), _moved(targets, device, finer)

    def _remedy(self, batch: Any) -> str:
        if self.collate is not None:
            return "return two"
        if isinstance(batch, Mapping) and "labels" in batch:
            inputs = '{name: x for name, x in batch.items() if name != "labels"}'
            return f'give collate=lambda batch: ({inputs}, batch["labels"])'
        return "give collate=, a function batch -> (inputs, targets)"

    def _parts(self) -> dict[str, Any]:
        """What decides the order, each once."""
        parts: dict[str, Any] = {}
        for place in PARTS:
            part = self.data
            for name in filter(None, place.split(".")):
                part = getattr(part, name, None)
            if part is not None and not any(part is other for other in parts.values()):
                parts[place] = part
        return parts

    def _generators(self) -> dict[str, torch.Generator]:
        generators: dict[str, torch.Generator] = {}
        for place, part in self._parts().items():
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is g for g in generators.values()):
                generators[place or "loader"] = generator
        return generators

    def _empty(self) -> ValueError:
        return ValueError(f"{self.name} must hold at least one batch, got none of {type(self.data).__name__}")


class _InMemory(Source):
    """Batches of tensors in memory, which are moved at once."""

    data: Batches

    @property
    def title(self) -> str:
        return self.data.data.name

    @property
    def shared(self) -> bool:
        return True

    def move_to(self, network: nn.Module) -> None:
        super().move_to(network)
        self.data = self.data.with_data(data_for(network, self.data.data))

    def in_order(self) -> Iterator[tuple[Any, Any]]:
        for number, batch in enumerate(self.data.in_order(), 1):
            yield self._pair(batch, number)

    def first(self, epoch: int = 0) -> tuple[Any, Any]:
        return self._pair(next(self.data.in_order()), 1)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def _begin(self, epoch: int) -> Iterator[Any]:
        return self.data.epoch(epoch)


@dataclass
class _Begun:
    """An epoch of which the first batch is drawn: with what it began, and the random state after that."""

    epoch: int
    batches: list[Any]
    iterator: Iterator[Any]
    generators: dict[str, Tensor]
    after: dict[str, Any]


def part(batch: Any, index: slice) -> Any:
    """The samples at ``index`` of a pair ``(inputs, targets)``.

    Of every tensor that has one row a sample, and of targets that are a list with one entry a sample.
    """
    (inputs, targets), n = batch, samples_in(batch[0])
    listed = isinstance(targets, tuple | list) and len(targets) == n
    if listed and not all(has_rows(leaf, n) for leaf in tree_leaves(targets)):
        return rows(inputs, index, n), targets[index]
    return rows((inputs, targets), index, n)


def _moved(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        wanted = dtype if leaf.is_floating_point() else leaf.dtype
        return leaf.to(device, wanted, non_blocking=device.type == "cuda")

    return moved(tree) if isinstance(tree, Tensor) else tree_map(moved, tree)


def _is_pair(data: Any) -> bool:
    return (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, Tensor) and part.ndim for part in data)
        and len(data[0]) == len(data[1])
    )
