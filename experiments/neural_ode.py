"""One classifier with a continuous flow, solved by this package and by torchdiffeq: accuracy and what it costs.

    python experiments/neural_ode.py
    python experiments/neural_ode.py --dataset mnist --train-size 2000 --test-size 2000 --epochs 3 --seeds 0

Encoder, velocity field and head are the same, with the same first weights and batches for a seed; what solves the flow
differs: :class:`odenets.Flow`, or torchdiffeq's ``odeint`` or ``odeint_adjoint`` at the same rtol and atol. Every way
is trained on cross-entropy alone and with the kinetic action added, which a flow reads off the stages of its steps, and
torchdiffeq integrates as one more state, under error control like the others.

Equal tolerances do not make equal steps. Both choose the first step by Hairer's rule and control the root mean square
over the batch with the elementary controller at safety 0.9, but torchdiffeq lets a step grow tenfold instead of
fivefold, steps past the end time and interpolates back, where the error of bosh3 is larger than what it controls, and
takes the larger of the norms of state and action. Its adjoint controls the error of state, adjoint and every weight's
gradient.

How it is measured. Evaluations are calls of the field per training batch, up to the head and after it, mean over
epochs and seeds. Seconds per epoch are those of its training batches, median over epochs and seeds: processor time of
the one thread that trains, which other programs on the machine disturb less than wall time, and wall time on a GPU.
The trainings begin seed by seed, so that every way meets the same conditions. Peak memory is that of tensors alive at
once in one training step, without weights and data (see :mod:`odenets.analysis`). What the action costs is found on
each trained network, from the same batches and weights with and without it, in turn. Errors of state and action are
those against dopri5 in float64 at a tolerance of 1e-7, on 200 test samples.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import torch
import tyro
from lightning_fabric import Fabric
from neural_ode_setup import Config, Job, build, field_of, science, split
from neural_ode_tables import COLUMNS, summarize, verdict
from torch import Tensor, nn

from lab import plotting as lab_figures
from lab.runs import Run
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Flow, Network, measures, plotting
from odenets.analysis.memory import measure_memory
from odenets.checkpoints import save_weights
from odenets.least_action import ActionPenalty
from odenets.training import data
from odenets.training.evaluation import evaluate
from odenets.training.loop import Callback, fit
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.state import Training
from solvers import Tolerance


class Meter:
    """Counts the field's calls up to the head and after it, and the seconds, while a network is in training mode.

    Args:
        network: with one flow.
        device: seconds are of the processor on a CPU, of the clock elsewhere.
    """

    def __init__(self, network: Network, device: str) -> None:
        self.network, self.device = network, device
        self._reset()

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _reset(self) -> None:
        self.calls = {"forward": 0, "backward": 0}
        self.phase, self.batches, self.started = "backward", 0, 0.0

    def __enter__(self) -> Meter:
        self.hooks = [
            self.network.encoder.register_forward_pre_hook(self._begin),
            field_of(self.network.flows[0]).register_forward_hook(self._call),
            self.network.head.register_forward_pre_hook(self._end),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, module: nn.Module, *_: object) -> None:
        if module.training:
            self.started = self.started or self._now()
            self.batches += 1
            self.phase = "forward"

    def _call(self, module: nn.Module, *_: object) -> None:
        if module.training:
            self.calls[self.phase] += 1

    def _end(self, *_: object) -> None:
        self.phase = "backward"

    def take(self) -> dict[str, float]:
        """Calls per batch and seconds since the first batch after the last time this was called."""
        found = {name: calls / self.batches for name, calls in self.calls.items()}
        found["epoch_seconds"] = self._now() - self.started
        self._reset()
        return found


class Progress(Callback):
    """Reads the meter and moves the bar on after each epoch."""

    def __init__(self, meter: Meter, validation: data.Batches, report: Report) -> None:
        self.meter, self.validation, self.report = meter, validation, report

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """One epoch more."""
        row |= self.meter.take()
        row["validation_accuracy"] = evaluate(training.network, self.validation).accuracy
        self.report(1)


def train(config: Config, job: Job, report: Report) -> None:
    """Train and measure one network in a folder of its own; what was found stands in its summary."""
    run = Run(config.output / job.name, {**asdict(job), **science(config)}, resume=True)
    parts = split(config)
    batches = data.Batches(parts.train.to(config.device), config.batch_size, seed=job.seed)
    validation, test = (data.Batches(part.to(config.device), 500) for part in (parts.validation, parts.test))
    before = run.load_state()
    report(before["epoch"] if before else 0)
    network = build(config, parts.train, job.way, job.seed)
    objective = ActionPenalty(config.weight) if job.action else CrossEntropy()
    with Meter(network, config.device) as meter:
        training = fit(
            network,
            batches,
            epochs=config.epochs,
            optimizer=lambda net: torch.optim.SGD(net.parameters(), config.learning_rate, momentum=0.9),
            schedule=lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, config.epochs),
            objective=objective,
            callbacks=[Progress(meter, validation, report)],
            run=run,
            fabric=Fabric(accelerator=config.device, devices=1),
        )
    save_weights(network, run.folder / "weights.safetensors")
    rows = training.rows
    probes = list(islice(batches.epoch(config.epochs), config.probes))
    result = {
        **asdict(job),
        "name": job.name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "test": evaluate(network, test).accuracy,
        "forward": statistics.fmean(row["forward"] for row in rows),
        "backward": statistics.fmean(row["backward"] for row in rows),
        "epoch_seconds": statistics.median(row["epoch_seconds"] for row in rows),
        "peak_memory": step_memory(network, probes[0], objective),
        "cost": cost_of_action(network, probes),
        **errors(config, network, test.data.x[:200]),
    }
    run.finish(result, seeds=[job.seed])


def step(network: Network, batch: tuple[Tensor, Tensor], objective: Objective) -> None:
    """Forward and backward pass of one batch."""
    output, records = network.record(batch[0], **objective.measures)
    objective(network, batch, output, records).backward()


def step_memory(network: Network, batch: tuple[Tensor, Tensor], objective: Objective) -> int:
    """Peak memory of one training step in bytes, gradients included."""
    network.train().zero_grad()
    return measure_memory(lambda: step(network, batch, objective), batch[0].device).peak


def cost_of_action(network: Network, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Evaluations and time of training steps with the action, relative to the same steps without it."""
    plain, acting = [], []
    network.train()
    with Meter(network, batches[0][0].device.type) as meter:
        for batch in (batches[0], *batches):  # the first one twice: to warm up
            for objective, found in ((CrossEntropy(), plain), (ActionPenalty(1.0), acting)):
                network.zero_grad()
                step(network, batch, objective)
                found.append(meter.take())
    evaluations = [sum(row["forward"] + row["backward"] for row in found[1:]) for found in (plain, acting)]
    seconds = [(b["epoch_seconds"] / a["epoch_seconds"]) for a, b in zip(plain[1:], acting[1:], strict=True)]
    return {"evaluations": evaluations[1] / evaluations[0] - 1, "seconds": statistics.median(seconds) - 1}


@torch.no_grad()
def errors(config: Config, network: Network, x: Tensor) -> dict[str, float]:
    """Of the end state, in units of the tolerance, and of the action, relative; and the action itself."""
    network.eval()
    flow, start = network.flows[0], network.encoder(x)
    field = copy.deepcopy(field_of(flow)).double()
    exact = Flow(field, solver="dopri5", total_time=config.total_time, tolerance=Tolerance(1e-7, 1e-7))
    end, records = exact.record(start.double(), action=measures.action)
    action = records["action"].sum(0)
    found, recorded = flow.record(start, action=measures.action)
    ratio = (found - end) / (config.atol + config.rtol * end.abs())
    difference = (recorded["action"].sum(0) - action).abs().mean() / action.mean()
    return {
        "state_error": ratio.square().mean().sqrt().item(),
        "action_error": difference.item(),
        "action_value": action.mean().item(),
    }


def main(config: Config) -> None:
    """Train everything, print one table, write the run folder with its figures."""
    started = time.time()
    split(config)  # a wrong data folder shows here, before anything is written
    whole = {"seeds": config.seeds, "ways": config.ways}
    run = Run(config.output, science(config) | whole, resume=config.resume)
    jobs = [Job(way, action, seed) for seed in config.seeds for action in (False, True) for way in config.ways]
    cores = 1 if config.device == "cuda" else os.cpu_count() or 1
    with Workers(config.workers or cores) as workers:
        folder, cost = (lambda job: config.output / job.name), (lambda job: config.epochs)
        results = workers.complete(partial(train, config), jobs, folder, cost=cost, label="trainings")
    results.sort(key=lambda r: (r["action"], config.ways.index(r["way"]), r["seed"]))
    rows = summarize(results)
    plotting.save(lab_figures.neural_ode(run.folder), run.folder / "figures")
    print(run.conclude(results, ("way", "action", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
