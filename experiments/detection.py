"""Detection of adversarial and out-of-distribution inputs by the path they take (section 5; tables 12 to 15, 32 to 47).

Networks are trained plainly, with least action, or by reverse cross-entropy; the images that they have not seen are
attacked, and detectors are fitted on what several kinds of features see of clean and of adversarial images: the
trajectory (eq. 34), with what Runge-Kutta blocks show besides (stages, embedded error, action), and the baselines of
the literature. The images are split once by index, into those that the network, the detectors, the choice among them
and the test have to themselves. Normalization is a layer of the attacked network; what fooled it is counted apart.

    python experiments/detection.py                          # seen attacks
    python experiments/detection.py --setting unseen
    python experiments/detection.py --setting ood
    python experiments/detection.py --setting adaptive
    python experiments/detection.py --setting timing
    python experiments/detection.py --setting seen --dataset mnist --folder DIR --solver euler --depth 9
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from detection_setup import (
    TRAJECTORY,
    Config,
    Job,
    attacked,
    foreign,
    kinds_of,
    parts_of,
    science,
    trained,
)
from detection_tables import COLUMNS, adaptive_rows, figures, summarize, timing_rows, verdict
from torch import Tensor

from lab.runs import Run
from lab.tables import table
from lab.workers import Report, Workers
from odenets import Network, plotting
from odenets.detection import (
    LID,
    Detector,
    Features,
    Mahalanobis,
    NaturalSceneStatistics,
    Pipeline,
    ProjectedDescent,
    Samples,
    Trajectory,
    black_box,
    choose_and_score,
    distill,
    feature_attack,
    in_batches,
    split,
    surrogate_attack,
)
from odenets.training import data
from odenets.training.evaluation import evaluate


def seen_by(network: Network, kinds: Mapping[str, Features], x: Tensor) -> dict[str, np.ndarray]:
    """Features of images by variant."""
    return {name: in_batches(partial(features, network), network, x).numpy() for name, features in kinds.items()}


def comparisons(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """On what detectors are fitted, and on what they are tested."""
    if config.setting == "seen":
        return [(name, (name,)) for name in config.attacks]
    if config.setting == "unseen":
        return [(config.attacks[0], config.attacks[1:])]
    return [(config.foreign[0], config.foreign), (config.attacks[0], config.foreign)]


def begin(config: Config, job: Job, report: Report) -> tuple[Run, data.TensorData, data.TensorData, Network]:
    """The run of a job, the images of its network and those for its detectors, and the network, trained."""
    run = Run(config.output / config.setting / job.name, asdict(job) | science(config), resume=True)
    train, pool = parts_of(config)
    network = trained(config, job, train)
    report(1)
    return run, train, pool, network


def compare(config: Config, job: Job, report: Report) -> None:
    """Train, attack, and compare all kinds of features; what was found stands in the job's summary."""
    run, train, pool, network = begin(config, job, report)
    attacks = {name for pair in comparisons(config) for name in (pair[0], *pair[1])} & set(config.attacks)
    images, successes, rows = {"": pool.x}, {}, []
    for name in sorted(attacks):
        found = attacked(config, network, job, name, pool)
        images[name], successes[name] = found.images, found.success.numpy()
        rows.append(
            {
                "attack": name,
                "success": found.success_rate,
                "linf": found.linf.mean().item(),
                "l2": found.l2.mean().item(),
            }
        )
    if config.setting == "ood":
        images |= {name: foreign(config, name, pool) for name in config.foreign}
    if config.noisy:
        noise = 2 * torch.rand(pool.x.shape, generator=torch.Generator().manual_seed(job.seed)) - 1
        images["noisy"] = (pool.x + config.strength * noise).clamp(0, 1)
    report(1)
    predicted = {name: in_batches(network, network, x).argmax(1).numpy() for name, x in images.items()}
    splits = {
        name: split(len(x), test=config.test, validation=config.validation, seed=job.seed) for name, x in images.items()
    }
    results = []
    for kind, variants in kinds_of(config).items():
        for features in variants.values():
            features.fit(network, train.x, train.y)
        sets = {
            name: Samples(seen_by(network, variants, x), predicted[name], splits[name], successes.get(name))
            for name, x in images.items()
        }
        for seen, tested in comparisons(config):
            found = choose_and_score(
                sets[""], sets[seen], {name: sets[name] for name in tested},
                modes=config.modes, noisy=sets.get("noisy"), seed=job.seed,
            )  # fmt: skip
            results += [
                {
                    "kind": kind, "seen": seen, "tested": name, "candidate": found.candidate, "mode": found.mode,
                    "general_auroc": found.agnostic[name], "noisy_false_positives": found.noisy,
                    "curve": found.curves[name].tolist(), **asdict(scores),
                }
                for name, scores in found.scores.items()
            ]  # fmt: skip
    accuracy = evaluate(network, data.Batches(pool, 500)).accuracy
    run.finish(asdict(job) | {"accuracy": accuracy, "attacks": rows, "scores": results}, seeds=[job.seed])
    report(1)


# -- attacks on the detector ----------------------------------------------------------------------------------------


def adapt_attacks(config: Config, job: Job, report: Report) -> None:
    """Attacks that know of the detector, from successful images that it detects; what evades stands in the summary."""
    run, _, pool, network = begin(config, job, report)
    parts = split(len(pool), test=config.test, validation=config.validation, seed=job.seed)
    found = attacked(config, network, job, config.attacks[0], pool)
    features = Trajectory()
    pipeline = Pipeline(network, features, Detector(random_state=job.seed))
    pipeline.fit(pool.x[parts.fit], found.images[parts.fit])
    tested = found.subset(parts.test)
    detected = torch.from_numpy(pipeline.predict(tested.images)).bool()
    chosen = (detected & tested.success).nonzero().flatten()[: config.starts]
    rate = (detected & tested.success).sum().item() / max(int(tested.success.sum()), 1)
    row: dict[str, Any] = {"detected_successful": rate, "starts": len(chosen), "evaded": {}}
    if len(chosen):
        start, clean = tested.subset(chosen), pool.x[parts.test][chosen]

        def detects(x: Tensor) -> Tensor:
            return torch.from_numpy(pipeline.predict(x.cpu()))

        def score(X: np.ndarray) -> np.ndarray:
            return pipeline.detector.predict_proba(X)[:, 1]

        fitted = torch.cat([pool.x[parts.fit], found.images[parts.fit]])
        known = in_batches(partial(features, network), network, fitted).numpy()
        innocent = pool.x[parts.fit][:200]
        ways = {
            "black box": lambda: black_box(
                network, detects, start, clean, pool=innocent, seed=job.seed, max_iter=config.queries[0],
                max_eval=config.queries[1],
            ),
            "features": lambda: feature_attack(
                network, features, lambda z: torch.from_numpy(score(z.numpy()) > 0.5), start, clean, pool=innocent,
                seed=job.seed, max_iter=config.queries[0], max_eval=config.queries[1],
            ),
            "surrogate": lambda: surrogate_attack(
                network, features, score, distill(score, known, seed=job.seed), start, clean,
                descent=ProjectedDescent(eps=2 * config.strength, steps=config.steps),
            ),
        }  # fmt: skip
        for name, way in ways.items():
            result = way()
            row["evaded"][name] = result.share
            row.setdefault("l2", {})[name] = result.l2.mean().item()
            report(1)
    run.finish(asdict(job) | row, seeds=[job.seed])


# -- time -----------------------------------------------------------------------------------------------------------


def clock(config: Config, job: Job, report: Report) -> None:
    """Seconds for features of the pool in interleaved rounds, beside a plain forward pass."""
    run, train, pool, network = begin(config, job, report)
    step = max(config.magnitudes)
    kinds: dict[str, Features] = {TRAJECTORY: Trajectory(), "Mahalanobis": Mahalanobis(magnitude=step)}
    kinds |= {"Mahalanobis, no input step": Mahalanobis(), "LID": LID(), "scenes": NaturalSceneStatistics()}
    row: dict[str, list[float]] = {}
    for name in ("LID", "Mahalanobis, no input step", "Mahalanobis"):  # the first warm up
        started = time.perf_counter()
        kinds[name].fit(network, train.x, train.y)
        row["Mahalanobis, statistics"] = [time.perf_counter() - started]  # of the last
    calls = {"forward pass": network} | {name: partial(kind, network) for name, kind in kinds.items()}
    for i in range(1 + config.rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            in_batches(call, network, pool.x)
            if i:  # the first warms up
                row.setdefault(name, []).append(time.perf_counter() - started)
        report(1)
    run.finish(asdict(job) | {"seconds": row, "images": len(pool)}, seeds=[job.seed])


def main(config: Config) -> None:
    """Train, attack, compare, print one table, write the run folder with its figures."""
    if config.quick:
        config = replace(
            config, seeds=2, methods=config.methods[:1], attacks=config.attacks[:2], train_size=200, pool_size=200,
            epochs=3, iterations=2, magnitudes=(0.0,), starts=1, rounds=1, queries=(2, 100), steps=10,
        )  # fmt: skip
    started = time.time()
    parts_of(config)  # a wrong data folder shows here, before anything is written
    names = {name: getattr(config, name) for name in ("methods", "seeds")}
    run = Run(config.output / config.setting, science(config) | names, resume=config.resume)
    jobs = [Job(method, seed) for method in config.methods for seed in range(config.seeds)]
    work, cost = {"adaptive": (adapt_attacks, 4), "timing": (clock, 2 + config.rounds)}.get(
        config.setting, (compare, 3)
    )

    def folder(job: Job) -> Path:
        return run.folder / job.name

    with Workers(1 if config.setting == "timing" else config.workers or os.cpu_count() or 1) as workers:
        results = workers.complete(partial(work, config), jobs, folder, cost=lambda job: cost, label=config.setting)
    if config.setting in ("adaptive", "timing"):
        rows, shown, lines = (adaptive_rows if config.setting == "adaptive" else timing_rows)(config, results)
    else:
        rows = summarize(config, results)
        shown, lines = table(rows, COLUMNS), verdict(config, rows, results)
        plotting.save(figures(config, results), run.folder / "figures")
    trainings = [{"name": job.name, "job": job.name, "seed": job.seed} for job in jobs]
    print(run.conclude(trainings, ("job", "seed"), rows, shown, lines, started=started))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
