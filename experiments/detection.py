"""Detection of adversarial and out-of-distribution inputs by the path they take [K24, section 5].

Networks are trained plainly, with least action, or by reverse cross-entropy; the images that they have not seen are
attacked, and detectors are fitted on what several kinds of features see of clean and of adversarial images: the
trajectory [K24, eq. 34], with what Runge-Kutta blocks show besides (stages, embedded error, action), and the baselines
of the literature. The images are split once by index, into those that the network, the detectors, the choice among them
and the test have to themselves. Normalization is a layer of the attacked network; what fooled it is counted apart.

    python experiments/detection.py                          # seen attacks
    python experiments/detection.py --setting unseen
    python experiments/detection.py --setting ood
    python experiments/detection.py --setting adaptive
    python experiments/detection.py --setting timing
    python experiments/detection.py --setting seen --dataset mnist --folder DIR --solver euler --depth 9
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from detection_setup import TRAJECTORY, Config, Job, attacked, foreign, kinds_of, parts_of, trained
from detection_tables import columns, details, figures, summarize, verdict
from torch import Tensor

from lab.experiment import Experiment, Jobs, command
from lab.runs import Run
from lab.workers import Report
from odenets import Network
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
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate


def jobs(config: Config) -> Jobs[Job]:
    """A network of every method and seed."""
    return (yield [Job(method, seed) for method in config.methods for seed in range(config.seeds)])


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


def train(config: Config, job: Job, run: Run, report: Report) -> dict[str, Any]:
    """Train a network, and do with it what the setting says."""
    train, pool = parts_of(config)
    network = trained(config, job, train)
    report(1)
    work = {"adaptive": evade, "timing": clock}.get(config.setting, compare)
    return work(config, job, network, train, pool, report)


def compare(
    config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report
) -> dict[str, Any]:
    """Attack, and compare all kinds of features."""
    attacks = {name for pair in comparisons(config) for name in (pair[0], *pair[1])} & set(config.attacks)
    images, successes, rows = {"": pool.x}, {}, []
    for name in sorted(attacks):
        attack = attacked(config, network, job, name, pool)
        images[name], successes[name] = attack.images, attack.success.numpy()
        sizes = {"linf": attack.linf.mean().item(), "l2": attack.l2.mean().item()}
        rows.append({"attack": name, "success": attack.success_rate, **sizes})
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
            chosen = choose_and_score(
                sets[""], sets[seen], {name: sets[name] for name in tested},
                modes=config.modes, noisy=sets.get("noisy"), seed=job.seed,
            )  # fmt: skip
            results += [
                {
                    "kind": kind, "seen": seen, "tested": name, "candidate": chosen.candidate, "mode": chosen.mode,
                    "general_auroc": chosen.agnostic[name], "noisy_false_positives": chosen.noisy,
                    "curve": chosen.curves[name].tolist(), **asdict(scores),
                }
                for name, scores in chosen.scores.items()
            ]  # fmt: skip
    report(1)
    return {"accuracy": evaluate(network, Batches(pool, 500)).accuracy, "attacks": rows, "scores": results}


# -- attacks on the detector ----------------------------------------------------------------------------------------


def evade(
    config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report
) -> dict[str, Any]:
    """Attacks that know of the detector, from successful images that it detects."""
    parts = split(len(pool), test=config.test, validation=config.validation, seed=job.seed)
    attack = attacked(config, network, job, config.attacks[0], pool)
    features = Trajectory()
    pipeline = Pipeline(network, features, Detector(random_state=job.seed))
    pipeline.fit(pool.x[parts.fit], attack.images[parts.fit])
    tested = attack.subset(parts.test)
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

        fitted = torch.cat([pool.x[parts.fit], attack.images[parts.fit]])
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
    return row


# -- time -----------------------------------------------------------------------------------------------------------


def clock(
    config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report
) -> dict[str, Any]:
    """Seconds for features of the pool in interleaved rounds, beside a plain forward pass."""
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
    return {"seconds": row, "images": len(pool)}


def quick(config: Config) -> Config:
    """Few networks, images and attacks, and short ones."""
    few: dict[str, Any] = {"seeds": 2, "methods": config.methods[:1], "attacks": config.attacks[:2], "starts": 1}
    few |= {"train_size": 200, "pool_size": 200, "epochs": 3, "iterations": 2, "magnitudes": (0.0,), "rounds": 1}
    return replace(config, **few, queries=(2, 100), steps=10)


EXPERIMENT = Experiment(
    config=Config,
    data=parts_of,
    jobs=jobs,
    train=train,
    summarize=summarize,
    columns=columns,
    verdict=verdict,
    details=details,
    figures=figures,
    quick=quick,
    selects=("methods", "seeds"),
    cost=lambda config, job: {"adaptive": 4, "timing": 2 + config.rounds}.get(config.setting, 3),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
