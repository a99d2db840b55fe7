"""One classifier with a neural ODE, solved by this package and by torchdiffeq: accuracy and what it costs.

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
import statistics
import time
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from neural_ode_setup import Config, Job, build
from torch import Tensor, nn

from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.plotting import cost_of_solves, solves_while_training
from lab.results import groups
from lab.statistics import mean_interval
from lab.training import fit_network, parts_of
from odenets import Network, measures
from odenets.analysis.memory import measure_memory
from odenets.checkpoints import save_weights
from odenets.least_action import ActionPenalty
from odenets.neural_ode import NeuralODE
from odenets.training.callbacks import Callback
from odenets.training.data import Batches
from odenets.training.evaluation import evaluate
from odenets.training.objectives import CrossEntropy, Objective
from odenets.training.state import Training
from solvers import Tolerance


def jobs(config: Config) -> Jobs[Job]:
    """Every way with and without the action, seed by seed, so that every way meets the same conditions."""
    results = yield [Job(way, action, seed) for seed in config.seeds for action in (False, True) for way in config.ways]
    return sorted(results, key=lambda r: (r["action"], config.ways.index(r["way"]), r["seed"]))


class Meter(Callback):
    """Counts the field's calls up to the head and after it, and the seconds, while a network is in training mode.

    Args:
        network: with one flow.
        device: seconds are of the processor on a CPU, of the clock elsewhere.
        validation: images on which the accuracy is measured after an epoch.
    """

    def __init__(self, network: Network, device: str, validation: Batches | None = None) -> None:
        self.network, self.device, self.validation = network, device, validation
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
            self.network.flows[0].field.register_forward_hook(self._call),
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
        taken = {name: calls / self.batches for name, calls in self.calls.items()}
        taken["epoch_seconds"] = self._now() - self.started
        self._reset()
        return taken

    def after_epoch(self, training: Training, row: dict[str, Any]) -> None:
        """One epoch more."""
        row |= self.take()
        if self.validation is not None:
            row["validation_accuracy"] = evaluate(training.network, self.validation).accuracy


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train and measure one network."""
    parts = parts_of(config)
    batches = Batches(parts.train.to(config.device), config.batch_size, seed=job.seed)
    validation, test = (Batches(part.to(config.device), 500) for part in (parts.validation, parts.test))
    network = build(config, parts.train, job.way, job.seed)
    objective = ActionPenalty(config.weight) if job.action else CrossEntropy()
    with Meter(network, config.device, validation) as meter:
        rows = fit_network(config, network, batches, run, report, objective=objective, callbacks=[meter]).rows
    save_weights(network, run.folder / "weights.safetensors")
    probes = list(islice(batches.epoch(config.epochs), config.probes))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "test": evaluate(network, test).accuracy,
        "forward": statistics.fmean(row["forward"] for row in rows),
        "backward": statistics.fmean(row["backward"] for row in rows),
        "epoch_seconds": statistics.median(row["epoch_seconds"] for row in rows),
        "peak_memory": step_memory(network, probes[0], objective),
        "cost": cost_of_action(network, probes),
        **errors(config, network, test.data.x[:200]),
    }


def step(network: Network, batch: tuple[Tensor, Tensor], objective: Objective) -> None:
    """Forward and backward pass of one batch."""
    objective(network, *batch).backward()


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
            for objective, rows in ((CrossEntropy(), plain), (ActionPenalty(1.0), acting)):
                network.zero_grad()
                step(network, batch, objective)
                rows.append(meter.take())
    evaluations = [sum(row["forward"] + row["backward"] for row in rows[1:]) for rows in (plain, acting)]
    seconds = [(b["epoch_seconds"] / a["epoch_seconds"]) for a, b in zip(plain[1:], acting[1:], strict=True)]
    return {"evaluations": evaluations[1] / evaluations[0] - 1, "seconds": statistics.median(seconds) - 1}


@torch.no_grad()
def errors(config: Config, network: Network, x: Tensor) -> dict[str, float]:
    """Of the end state, in units of the tolerance, and of the action, relative; and the action itself."""
    network.eval()
    flow, start = network.flows[0], network.encoder(x)
    field = copy.deepcopy(flow.field).double()
    exact = NeuralODE(field, t1=config.total_time, tolerance=Tolerance(1e-7, 1e-7))
    end, records = exact.record(start.double(), action=measures.action)
    action = records["action"].sum(0)
    solution, recorded = flow.record(start, action=measures.action)
    ratio = (solution - end) / (config.atol + config.rtol * end.abs())
    difference = (recorded["action"].sum(0) - action).abs().mean() / action.mean()
    return {
        "state_error": ratio.square().mean().sqrt().item(),
        "action_error": difference.item(),
        "action_value": action.mean().item(),
    }


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way and objective: means over the seeds, accuracy with its 95 % interval, median time of epochs."""
    rows = []
    for (way, action), group in groups(results, "way", "action").items():
        row: dict[str, Any] = {"way": way, "action": action, "parameters": group[0]["parameters"]}
        row["test"] = mean_interval([r["test"] for r in group])
        for name in ("forward", "backward", "peak_memory", "state_error", "action_error", "action_value"):
            row[name] = statistics.fmean(r[name] for r in group)
        row["epoch_seconds"] = statistics.median(r["epoch_seconds"] for r in group)
        row["cost"] = {name: statistics.fmean(r["cost"][name] for r in group) for name in group[0]["cost"]}
        rows.append(row)
    return rows


COLUMNS: Columns = {
    "solved by": "{way}",
    "objective": lambda row: "+ action" if row["action"] else "",
    "test accuracy (%)": lambda row: f"{100 * row['test']:.2f}",
    "evals forward": "{forward:.1f}",
    "evals backward": "{backward:.1f}",
    "s/epoch": "{epoch_seconds:.2f}",
    "peak MB": lambda row: f"{row['peak_memory'] / 1e6:.1f}",
    "action costs evals": lambda row: f"{100 * row['cost']['evaluations']:+.0f} %",
    "and time": lambda row: f"{100 * row['cost']['seconds']:+.0f} %",
    "action": "{action_value:.3f}",
    "its error": lambda row: f"{100 * row['action_error']:.1g} %",
    "state error (tolerances)": "{state_error:.2f}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences: flows beside torchdiffeq with the same method, and what the action costs."""
    rows = {(row["way"], row["action"]): row for row in outcome.rows}
    names = {"bosh3": "bs23", "dopri5": "dopri5"}
    lines = []
    for (way, action), theirs in rows.items():
        who, method = way.split()
        ours = rows.get((f"flow {names.get(method)}", action))
        if who == "flow" or ours is None:
            continue
        share = {name: 100 * ours[name] / theirs[name] for name in ("epoch_seconds", "peak_memory")}
        calls = [row["forward"] + row["backward"] for row in (ours, theirs)]
        meet = "the intervals meet" if ours["test"].meets(theirs["test"]) else "the intervals do not meet"
        meet = "one seed, no interval" if ours["test"].n == 1 else meet
        lines.append(
            f"{ours['way']} beside {way}{', with the action' * action}: {100 * calls[0] / calls[1]:.0f} % of its "
            f"evaluations, {share['epoch_seconds']:.0f} % of its time, {share['peak_memory']:.0f} % of its memory; "
            f"accuracy {100 * ours['test']:.2f} beside {100 * theirs['test']:.2f} %, {meet}"
        )
    for (way,), group in groups(outcome.rows, "way").items():
        cost = {n: " and ".join(f"{100 * row['cost'][n]:+.0f} %" for row in group) for n in ("evaluations", "seconds")}
        lines.append(
            f"the action costs {way} {cost['evaluations']} evaluations, {cost['seconds']} time "
            "(on networks trained without and with it)"
        )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """What solves cost, and how it goes while the networks train."""
    return {
        "cost": lambda: cost_of_solves(outcome.rows),
        "training": lambda: solves_while_training(outcome.metrics),
    }


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, seeds=config.seeds[:1], epochs=1, train_size=200, test_size=100, probes=1),
    selects=("seeds", "ways"),
    cost=lambda config, job: config.epochs,
    keys=("way", "action", "seed"),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
