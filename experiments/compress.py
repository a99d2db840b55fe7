"""Fewer blocks in trained networks, without training: what each way of choosing and replacing them leaves.

    python experiments/compress.py
    python experiments/compress.py --network resnet56 --weights FOLDER --folder DIR --calibration 2000

A network of residual blocks is an integrator, and its blocks are steps. Dropped is a step; merged are two that become
one of twice the length; a linear map in the place of a run of blocks is one exponential step. The ways:

- **block influence** (ShortGPT, Men et al. 2024): blocks go whose state turns least, by 1 less the cosine of the states
  before and after; and the same with the statistics of batch norms recomputed;
- **relative residue**: those of the least ``|x1 - x0| / |x0|``;
- **removal**: those of which the outputs diverge least, statistics recomputed;
- **ReplaceMe** (Shopkhoev et al. 2025): the run of blocks between whose ends the state turns least goes, and a linear
  map of the branch of the block before, by least squares, makes up for it at no cost; there is none of more blocks than
  follow each other at one shape;
- **compress**: :func:`odenets.depth.compression.compress` with all its choices.

Networks are trained elsewhere: ResNets for CIFAR-10 from files, SmolLM2-135M and EfficientNet-lite0 from wheels of PyPI
(``lab/pretrained`` tells which and how); without any a small one is trained on digits. Calibration and test are apart:
training and test images; two texts, by default newspaper (the wheel ``gensim``) and a handbook (Debian's package
``debian-handbook``); two folders of photographs. EfficientNet has no labels here: it is judged by how often its class
is that of the whole network.

Where ``--healed`` says so, a network of images is healed as well: trained for 7,000 training images to return what the
whole one does.

Multiplications kept are those of all blocks, seams included. Latencies are processor time, networks taking turns, over
the whole network's in the same round.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from compress_setup import MEASURES, Config, latencies, subject_of, train_small
from matplotlib.figure import Figure

from lab.experiment import Columns, Experiment, Figures, Jobs, Outcome, Report, Run, command
from lab.images import batches
from lab.plotting import intervals
from lab.results import groups
from lab.statistics import mean_interval, paired
from odenets.analysis import count_macs
from odenets.depth import compress, heal
from odenets.training.runs import read_summary

WAYS: dict[str, dict[str, Any]] = {
    "block influence": {"by": "influence"},
    "block influence, statistics": {"by": "influence", "statistics": True},
    "relative residue": {"by": "residue"},
    "removal": {"choices": ("remove",), "refit": False},
    "ReplaceMe": {"by": "replaceme"},
    "ReplaceMe, statistics": {"by": "replaceme", "statistics": True},
    "compress": {},
}
"""Arguments of :func:`odenets.depth.compress` by the name of a way."""


@dataclass(frozen=True)
class Job:
    """A network compressed in one way; or first the whole one, to which it is compared."""

    method: str
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of the job's folder."""
        return f"{self.method.replace(', ', '-').replace(' ', '-')}-seed{self.seed}"


WHOLE = Job("whole", 0, tuning=True)
WEIGHTS = "weights.pt"


def jobs(config: Config) -> Jobs[Job]:
    """Every way for every seed, after the whole network, which is trained first if it is trained here."""
    yield [WHOLE]
    results = yield [Job(method, seed) for seed in config.seeds for method in config.methods]
    return sorted(results, key=lambda r: (config.methods.index(r["method"]), r["seed"]))


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Compress a network in one way and look at what is left at each number of blocks."""
    weights = config.run_folder / WHOLE.name / WEIGHTS
    if job == WHOLE and config.network == "digits":
        run.folder.mkdir(exist_ok=True)
        torch.save(train_small(config, report).state_dict(), weights)
    subject = subject_of(config, job.seed, weights)
    sample = subject.calibration[0][:1]
    if job == WHOLE:
        blocks = [subject.model.get_submodule(name) for name in subject.blocks]
        macs = {
            "macs": count_macs(subject.model, sample),
            "block_macs": count_macs(subject.model, sample, within=blocks),
        }
        return macs | {"score": subject.judge(subject.model), "blocks": len(blocks)}
    whole = read_summary(config.run_folder / WHOLE.name)["results"]
    curve: list[dict[str, Any]] = [{"removed": 0, "score": whole["score"], "macs": 1.0}]
    started = time.process_time()
    result = compress(
        subject.model,
        subject.calibration,
        remove=min(config.removed),
        samples=config.judged,
        outputs="logits",
        held_out=subject.held_out,
        **WAYS[job.method],
    )
    seconds = time.process_time() - started
    models = [subject.model]
    report(1)
    for removed in config.removed:
        started = time.process_time()
        if job.method != "compress" and removed not in result.removable:  # no run of so many blocks, for ReplaceMe
            report(1)
            continue
        point = result.at(remove=removed)
        each = time.process_time() - started
        macs = 1 - (whole["macs"] - count_macs(point.model, sample)) / whole["block_macs"]
        row = {"removed": removed, "score": subject.judge(point.model), "macs": macs, "seconds": seconds + each}
        curve.append(row | {"divergence": point.divergence, "runs": [[r["blocks"], r["choice"]] for r in point.table]})
        models.append(point.model)
        if job.method == "compress" and removed in config.healed and subject.images is not None:
            loader = batches(subject.images, 64, seed=job.seed)
            model = heal(copy.deepcopy(point.model), subject.model, loader, images=config.images)
            curve[-1]["healed"] = subject.judge(model)
        report(1)
    for row, times in zip(curve, latencies(models, subject.probe, config.rounds), strict=True):
        row |= times
    return {"curve": curve, "blocks": whole["blocks"]}


def summarize(config: Config, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way and number of blocks, its differences to the baselines paired over the seeds."""
    scores = {(r["method"], point["removed"], r["seed"]): point["score"] for r in results for point in r["curve"]}
    rows = []
    for (method,), group in groups(results, "method").items():
        for removed in (0, *sorted(config.removed)):
            points = [point for r in group for point in r["curve"] if point["removed"] == removed]
            if not points:
                continue
            row: dict[str, Any] = {"network": config.network, "method": method, "removed": removed}
            row["blocks"] = group[0]["blocks"] - removed
            row["score"] = mean_interval([point["score"] for point in points])
            if "healed" in points[0]:
                row["healed"] = mean_interval([point["healed"] for point in points])
            for name in points[0].keys() - {"removed", "score", "runs", "healed"}:
                row[name] = fmean(point[name] for point in points)
            if removed:
                row["runs"] = points[0]["runs"]
            for short, other in BASELINES.items():
                theirs = [scores.get((other, removed, r["seed"])) for r in group]
                if method == "compress" and removed and None not in theirs:
                    row[f"to_{short}"] = paired(row["score"].values, [value for value in theirs if value is not None])
            rows.append(row)
    return rows


BASELINES = {"influence": "block influence", "replaceme": "ReplaceMe"}


def columns(config: Config) -> Columns:
    """Of the table; the score has the name of its measure."""
    return {
        "method": "{method}",
        "blocks gone": "{removed}",
        MEASURES[config.network].name: "{score:.2f}",
        "healed": "{healed:.2f}",
        "- block influence": "{to_influence:.2f}",
        "- ReplaceMe": "{to_replaceme:.2f}",
        "block MACs kept (%)": _percent("macs"),
        "time at batch 1 (%)": _percent("ratio_1"),
        "at batch 64 (%)": _percent("ratio_64"),
        "seconds": "{seconds:.0f}",
    }


def _percent(name: str) -> Callable[[Any], str]:
    return lambda row: f"{100 * row[name]:.1f}"


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """Whether the curve of compress lies above each baseline's at every depth, and what is left at the last."""
    measure = MEASURES[config.network]
    sign = 1 if measure.higher else -1
    lines = []
    for short, other in BASELINES.items():
        rows = [row for row in outcome.rows if f"to_{short}" in row]
        if rows:
            gains = {row["removed"]: sign * row[f"to_{short}"].mean for row in rows}
            parts = {"ahead of": 1, "level with": 0, "behind": -1}
            found = {
                word: [k for k, gain in gains.items() if (gain > 0) - (gain < 0) == way] for word, way in parts.items()
            }
            texts = [f"{word} {other} with {', '.join(map(str, ks))} blocks gone" for word, ks in found.items() if ks]
            lines.append(f"compress is {'; '.join(texts)} ({measure.name})")
    last = max(config.removed)
    left = [f"{row['method']} {row['score']:.2f}" for row in outcome.rows if row["removed"] == last]
    whole = next(row for row in outcome.rows if row["removed"] == 0)
    lines.append(
        f"{measure.name} with {last} of {whole['blocks']} blocks gone: {'; '.join(left)}; whole {whole['score']:.2f}"
    )
    for row in outcome.rows:
        if "healed" in row:
            lines.append(
                f"healed on {config.images} images with {row['removed']} blocks gone: {row['healed']:.2f}, "
                f"before {row['score']:.2f}"
            )
    return lines


def figures(config: Config, outcome: Outcome) -> Figures:
    """The measure over blocks gone, and over what is kept of the blocks' multiplications."""
    name = MEASURES[config.network].name

    def curves(x: str, xlabel: str) -> Figure:
        series = {
            method: [(row[x], row["score"]) for row in rows]
            for (method,), rows in groups(outcome.rows, "method").items()
        }
        return intervals(series, xlabel=xlabel, ylabel=name)

    return {
        "blocks": lambda: curves("removed", "blocks gone"),
        "macs": lambda: curves("macs", "kept of the multiplications of the blocks"),
    }


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(
        config, seeds=config.seeds[:1], removed=(1, 2), calibration=100, test=60, epochs=2, rounds=1
    ),
    selects=("methods", "seeds"),
    columns=columns,
    cost=lambda config, job: 1 + config.epochs if job.tuning else 1 + len(config.removed),
    data=lambda config: subject_of(config, config.seeds[0]),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
