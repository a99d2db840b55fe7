"""Several processes: which batches are whose, and how many samples they hold together."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

from odenets.inputs import samples_in
from odenets.training.sharding import is_divided
from odenets.training.sources import Collate, Source, part

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Batch", "Processes"]

Batch = tuple[Any, Any]


class Processes:
    """The processes of a Fabric, and data for each of them.

    Raises:
        TypeError: no Fabric.
        RuntimeError: a Fabric of several that is not launched.

    Warns:
        UserWarning: ``torchrun`` has started several, of which the Fabric knows one.

    Attributes:
        fabric: launched.
        replicas, replica: how many have batches of their own, and which this is.
    """

    def __init__(self, fabric: Fabric) -> None:
        if isinstance(fabric, type) or not callable(getattr(fabric, "setup_module", None)):
            raise TypeError(
                f'fabric must be a lightning_fabric.Fabric, got {fabric!r}: Fabric(accelerator="cpu", devices=1)'
            )
        started = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
        if fabric.world_size == 1 < started:
            warnings.warn(
                f"torchrun has started {started} processes, of which each trains a network by itself: pass "
                f'fabric=Fabric(devices={started}, strategy="ddp"), after fabric.launch()',
                stacklevel=4,
            )
        if fabric.world_size > 1 and not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(f"fabric must be launched for {fabric.world_size} processes: call fabric.launch() first")
        self.fabric = fabric
        shares = getattr(fabric.strategy, "distributed_sampler_kwargs", None) or {}
        self.replicas = shares.get("num_replicas", fabric.world_size)
        self.replica = shares.get("rank", fabric.global_rank)
        self._group: Any = None

    def source(self, data: Any, collate: Collate | None, name: str) -> Source:
        """The training data of this process: of a DataLoader, what Fabric's distributed sampler leaves to it.

        Batches in memory, and those of a list, are the same in all processes, of which each takes a share of each
        batch.

        Raises:
            TypeError, ValueError: what :meth:`Source.of` raises, or a DataLoader that Fabric cannot distribute.
        """
        source = Source.of(data, collate, name)
        if self.replicas == 1 or not isinstance(data, DataLoader) or _is_distributed(data):
            return source
        try:
            loader = self.fabric.setup_dataloaders(data, move_to_device=False)
        except Exception as error:
            raise TypeError(
                f"{name} must be a DataLoader whose sampler Fabric can replace by a distributed one, got one with a "
                f"{type(data.batch_sampler).__name__} and a {type(data.sampler).__name__}: give its sampler "
                "DistributedSampler(dataset), or one of your own that draws each process' share"
            ) from error
        return _DistributedLoader(cast(Any, loader), collate, name)

    def rounds(self, source: Source, epoch: int) -> Iterator[tuple[Batch, int]]:
        """The batches of this process in an epoch, each with the number of samples that all processes have then.

        Raises:
            ValueError: a batch of which there is no sample for each process.

        Warns:
            UserWarning: a process has run out of batches, which ends the epoch for all.
        """
        if self.replicas == 1:
            for batch in source.epoch(epoch):
                yield batch, samples_in(batch[0])
        elif source.shared:
            for batch in source.epoch(epoch):
                yield self._share(batch, source.name)
        else:
            yield from self._together(source, epoch)

    def _share(self, batch: Batch, name: str) -> tuple[Batch, int]:
        n = samples_in(batch[0])
        if n < self.replicas:
            raise ValueError(
                f"{name} must hold a sample for each of {self.replicas} processes, got a batch of {n}: "
                "choose another batch size"
            )
        return part(batch, slice(self.replica, None, self.replicas)), n

    def _together(self, source: Source, epoch: int) -> Iterator[tuple[Batch, int]]:
        iterator = source.epoch(epoch)
        for done in itertools.count():
            batch = next(iterator, None)
            counts = torch.tensor([0 if batch is None else samples_in(batch[0]), int(batch is None)])
            distributed.all_reduce(counts, group=self._counting)
            samples, ended = counts.tolist()
            if ended or batch is None:
                if ended < self.fabric.world_size and self.fabric.is_global_zero:
                    warnings.warn(
                        f"{ended} of {self.fabric.world_size} processes ran out of {source.name} after {done}, with "
                        "which the epoch ends for all: give each as many, by a DistributedSampler, which repeats "
                        "samples, or drops some with drop_last=True",
                        stacklevel=2,
                    )
                return
            yield batch, samples * self.replicas // self.fabric.world_size

    @property
    def _counting(self) -> Any:
        """A group on the hosts: counting does not wait for a device."""
        if self._group is None and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")
        return self._group

    def start_alike(self, network: nn.Module) -> None:
        """Give all processes the first one's weights and buffers, as DDP does, and a sharded network needs."""
        if self.fabric.world_size > 1:
            for tensor in (*network.parameters(), *network.buffers()):
                distributed.broadcast(tensor.detach(), src=0)

    def check_shares(self, network: nn.Module) -> None:
        """Warn where processes neither have batches of their own nor parts of the network once it is set up.

        Warns:
            UserWarning: each does the same.
        """
        if self.fabric.world_size > self.replicas and not any(map(is_divided, network.parameters())):
            warnings.warn(
                f"{self.fabric.world_size} processes have the batches of {self.replicas} and whole parameters, so that "
                "several do the same: ModelParallelStrategy(parallelize, "
                f"data_parallel_size={self.fabric.world_size}, tensor_parallel_size=1) shards by FSDP2",
                stacklevel=4,
            )

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process."""
        if self.fabric.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.fabric.world_size
        distributed.all_gather_object(values, value)
        return values


class _DistributedLoader(Source):
    """A DataLoader that Fabric has set up."""

    def _begin(self, epoch: int) -> Iterator[Any]:
        # Fabric counts the loops over a loader and tells its sampler that number; after a resume it is the epoch's
        cast(Any, self.data)._num_iter_calls = epoch
        return super()._begin(epoch)


def _is_distributed(loader: DataLoader) -> bool:
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)
