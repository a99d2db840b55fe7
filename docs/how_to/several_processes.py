"""torchrun --nproc-per-node 2 several_processes.py ddp (or sharded)"""

import os
import sys
from functools import partial

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import odenets
from odenets.training import fit


def parallelize(module, mesh):
    """Shard each flow by itself, and what is left: encoder and head."""
    for part in module.modules():
        if isinstance(part, odenets.Flow):
            fully_shard(part, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


n = int(os.environ["WORLD_SIZE"])
sharded = ModelParallelStrategy(parallelize, data_parallel_size=n, tensor_parallel_size=1)
fabric = Fabric(accelerator="auto", devices=n, strategy=sharded if sys.argv[1] == "sharded" else "ddp")
fabric.launch()

torch.manual_seed(0)
x = torch.randn(256, 2)
loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 32, shuffle=True)
network = odenets.Network(nn.Linear(2, 16), odenets.Flow(depth=2), nn.Linear(16, 2))
training = fit(network, loader, validation=loader, epochs=2, optimizer=partial(torch.optim.SGD, lr=0.1), fabric=fabric)
if fabric.is_global_zero:
    print(training.rows[-1]["validation_loss"])
