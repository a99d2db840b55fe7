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
once in one training step, without weights and data (see :mod:`odenets.memory`). What the action costs is found on each
trained network, from the same batches and weights with and without it, in turn. Errors of state and action are those
against dopri5 in float64 at a tolerance of 1e-7, on 200 test samples.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchdiffeq
import tyro
from einops.layers.torch import Rearrange
from lightning_fabric import Fabric
from torch import Tensor, nn

from odenets import Flow, Network, data, measures, models, plotting
from odenets.checkpoints import save_weights
from odenets.fields import ConvField
from odenets.flow import Records
from odenets.jobs import Report, Workers
from odenets.least_action import ActionPenalty
from odenets.measures import Measure
from odenets.memory import memory
from odenets.objectives import CrossEntropy, Objective
from odenets.runs import Run
from odenets.statistics import mean_interval
from odenets.tables import table
from odenets.training import Callback, Training, evaluate, fit
from solvers import Statistics, Step, Tolerance

Way = Literal["odeint bosh3", "odeint dopri5", "adjoint bosh3", "adjoint dopri5", "flow bs23", "flow dopri5"]


@dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
        dataset: digits come with scikit-learn, MNIST through torchvision.
        folder: where torchvision's files lie; without it they are downloaded once.
        train_size: samples for training and validation, stratified; 0 takes all.
        test_size: the same for the test.
        ways: who solves the flow, by which method.
        rtol, atol: of every solve.
        weight: of the mean action in the objective that has it.
        total_time: the flow runs over ``[0, total_time]``.
        features: channels of the state.
        time: whether the field reads t.
        seeds: of weights and batch order.
        epochs: of every training.
        batch_size: samples per step.
        learning_rate: at the start, for SGD with momentum 0.9; a cosine brings it to 0.
        probes: batches on which a trained network is measured.
        device: "cpu" or "cuda".
        workers: trainings side by side, each on one thread; 0 takes one per core on a CPU, one on a GPU.
        output: run folder.
        resume: go on with the run in the folder.

    Raises:
        ValueError: a number is out of range, or a way unknown.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    folder: Path | None = None
    train_size: int = 0
    test_size: int = 0
    ways: tuple[Way, ...] = (
        "odeint bosh3",
        "odeint dopri5",
        "adjoint dopri5",
        "flow bs23",
        "flow dopri5",
    )
    rtol: float = 1e-3
    atol: float = 1e-6
    weight: float = 0.1
    total_time: float = 1.0
    features: int = 16
    time: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    batch_size: int = 64
    learning_rate: float = 0.05
    probes: int = 5
    device: Literal["cpu", "cuda"] = "cpu"
    workers: int = 0
    output: Path = Path("runs/neural_ode")
    resume: bool = False

    def __post_init__(self) -> None:
        Tolerance(self.rtol, self.atol)
        for name in ("features", "epochs", "batch_size", "probes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ways", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one")
        for way in self.ways:
            if way not in get_args(Way):
                raise ValueError(f"unknown way {way!r}; known are {', '.join(get_args(Way))}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class Job:
    """One training."""

    way: Way
    action: bool
    seed: int

    @property
    def name(self) -> str:
        """Of the job's folder."""
        return f"{self.way.replace(' ', '-')}{'-action' * self.action}-seed{self.seed}"


class WithAction(nn.Module):
    """Velocity of the state ``(x, z)``, ``dz/dt = <v^2>``: z is the action of each sample, ``(B,)``."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocities of x and z."""
        v = self.field(t, state[0])
        return v, v.square().flatten(1).mean(1)


def field_of(flow: Flow) -> nn.Module:
    """The velocity field of a continuous flow."""
    return flow.blocks[0].fields[0]  # type: ignore[index,return-value]


class TorchdiffeqFlow(Flow):
    """A continuous flow that torchdiffeq solves; of the measures it knows the action, as an extra state.

    Args:
        field: velocity field.
        solver: "bosh3" or "dopri5".
        adjoint: ``odeint_adjoint`` instead of ``odeint``.
        tolerance: rtol and atol.
        total_time: end time.
    """

    def __init__(
        self, field: nn.Module, *, solver: str, adjoint: bool, tolerance: Tolerance, total_time: float = 1.0
    ) -> None:
        super().__init__(field, solver=solver, tolerance=tolerance, total_time=total_time)
        solve: Callable[..., Any] = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.odeint = partial(solve, method=solver, rtol=tolerance.rtol, atol=tolerance.atol)

    def _steps(self, x: Tensor, closing: bool, finds: frozenset[str] = frozenset()) -> Iterator[Step]:
        raise NotImplementedError("torchdiffeq does not show its steps")

    def _record(self, x: Tensor, readout: str, measures: Mapping[str, Measure]) -> tuple[Tensor, Records]:
        if readout != "solution" or set(measures) - {"action"}:
            raise ValueError(f"torchdiffeq gives the solution and the action, not {readout!r} and {sorted(measures)}")
        field, times = field_of(self), x.new_tensor([0.0, self.total_time])
        self.statistics = Statistics()
        counting = field.register_forward_hook(self._count)
        try:
            if not measures:
                return self.odeint(field, x, times)[-1], Records({})
            states, action = self.odeint(WithAction(field), (x, x.new_zeros(len(x))), times)
            return states[-1], Records({"action": action[-1:]})
        finally:
            counting.remove()

    def _count(self, *_: object) -> None:
        self.statistics.evaluations += 1


def build(config: Config, dataset: data.Dataset, way: Way, seed: int) -> Network:
    """The classifier with the seed's weights, whoever solves its flow."""
    torch.manual_seed(seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    stride = max(2, size // 8)
    encoder = nn.Sequential(
        models.Normalize(list(dataset.mean), list(dataset.std)),
        nn.Conv2d(channels, config.features, stride + 2, stride=stride, padding=(stride + 1) // 2, bias=False),
    )
    field = ConvField(config.features, activation="silu", time=config.time)
    cells = encoder(dataset.x[:1]).numel()
    head = nn.Sequential(Rearrange("b c h w -> b (c h w)"), nn.Linear(cells, dataset.classes))
    who, solver = way.split()
    options: dict[str, Any] = {"solver": solver, "total_time": config.total_time}
    options["tolerance"] = Tolerance(config.rtol, config.atol)
    flow = Flow(field, **options) if who == "flow" else TorchdiffeqFlow(field, adjoint=who == "adjoint", **options)
    return Network(encoder, flow, head)


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
    return memory(lambda: step(network, batch, objective), batch[0].device).peak


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


def split(config: Config) -> data.Split:
    """The data, cut the same for every job."""
    train, test = data.load(config.dataset, config.folder)
    if config.test_size:
        test = data.subsample(test, config.test_size)
    return data.split(train, test, size=config.train_size or None)


def science(config: Config) -> dict[str, Any]:
    """What decides the outcome of a job, and not where, beside what, or for which other seeds it runs."""
    settings = asdict(config)
    for name in ("output", "resume", "workers", "folder", "seeds", "ways"):
        settings.pop(name)
    return settings


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way and objective: means over the seeds, accuracy with its 95 % interval, median time of epochs."""
    rows = []
    for way, action in dict.fromkeys((r["way"], r["action"]) for r in results):
        group = [r for r in results if (r["way"], r["action"]) == (way, action)]
        row: dict[str, Any] = {"way": way, "action": action, "parameters": group[0]["parameters"]}
        row["test"] = mean_interval([r["test"] for r in group])
        for name in ("forward", "backward", "peak_memory", "state_error", "action_error", "action_value"):
            row[name] = statistics.fmean(r[name] for r in group)
        row["epoch_seconds"] = statistics.median(r["epoch_seconds"] for r in group)
        row["cost"] = {name: statistics.fmean(r["cost"][name] for r in group) for name in group[0]["cost"]}
        rows.append(row)
    return rows


COLUMNS: dict[str, Any] = {
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


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: flows beside torchdiffeq with the same method, and what the action costs."""
    found = {(row["way"], row["action"]): row for row in rows}
    names = {"bosh3": "bs23", "dopri5": "dopri5"}
    lines = []
    for (way, action), theirs in found.items():
        who, method = way.split()
        ours = found.get((f"flow {names.get(method)}", action))
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
    for way in dict.fromkeys(row["way"] for row in rows):
        costs = [row["cost"] for row in rows if row["way"] == way]
        evaluations = [f"{100 * cost['evaluations']:+.0f} %" for cost in costs]
        seconds = [f"{100 * cost['seconds']:+.0f} %" for cost in costs]
        lines.append(
            f"the action costs {way} {' and '.join(evaluations)} evaluations, {' and '.join(seconds)} time "
            "(on networks trained without and with it)"
        )
    return lines


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
    rows = summarise(results)
    plotting.save(plotting.neural_ode(run.folder), run.folder / "figures")
    print(run.conclude(results, ("way", "action", "seed"), rows, table(rows, COLUMNS), verdict(rows), started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
