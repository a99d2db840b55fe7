"""A loop of one's own in as many processes as ``torchrun`` starts: each writes its weights and its lambda."""

import sys
from pathlib import Path

import torch
from torch import distributed, nn

from odenets.least_action import LeastAction
from odenets.recording import Recording
from tests.odenets.training.small import IMAGES, TWENTY, tiny


def train(update: str, rank: int, processes: int) -> tuple[dict[str, torch.Tensor], float]:
    """Weights and lambda after five steps, of which each process has its share of every batch."""
    network, objective = tiny(torch.float64), LeastAction(update=update, tau=0.3, every=2)
    called = Recording(network, objective.measures)
    if processes > 1:
        called = nn.parallel.DistributedDataParallel(called)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for i in range(5):
        x, y = IMAGES[4 * i :][:4].double(), TWENTY.y[4 * i :][:4]
        objective(called, x[rank::processes], y[rank::processes]).backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.after_step(network, (x[rank::processes], y[rank::processes]))
    return network.state_dict(), objective.multiplier.item()


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    results = {update: train(update, rank, distributed.get_world_size()) for update in ("before", "next", "after")}
    torch.save(results, Path(sys.argv[1]) / f"{rank}.pt")
    distributed.destroy_process_group()
