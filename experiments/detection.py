"""Detection of adversarial and foreign inputs by the path they take [K24, section 5; tables 12 to 15, 32 to 47].

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

Networks that others trained have a study of their own, ``detection_pretrained.py``, which this script begins too:

    python experiments/detection.py --network resnet56 --weights FILE --folder DIR
    python experiments/detection.py --network resnet56 --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from timeit import timeit
from typing import Any

import numpy as np
import torch
from detection_setup import TRAJECTORY, Config, Job, attacked, foreign, jobs, kinds_of, parts_of, trained
from detection_tables import columns, details, figures, summarize, verdict

from lab.experiment import Experiment, Report, Row, Run, command
from lab.pretrained.resnets import DEPTHS
from odenets import Network
from odenets.detection import (
    LID,
    Detector,
    Evasion,
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


def comparisons(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """On what detectors are fitted, and on what they are tested."""
    if config.setting == "seen":
        return [(name, (name,)) for name in config.attacks]
    if config.setting == "unseen":
        return [(config.attacks[0], config.attacks[1:])]
    return [(config.foreign[0], config.foreign), (config.attacks[0], config.foreign)]


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train a network, and do with it what the setting says."""
    parts = parts_of(config)
    network = trained(config, job, parts[0])
    report(1)
    return {"adaptive": evade, "timing": clock}.get(config.setting, compare)(config, job, network, *parts, report)


def compare(config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report) -> Row:
    """Attack, and compare all kinds of features."""
    names = {name for seen, tested in comparisons(config) for name in (seen, *tested)} & set(config.attacks)
    attacks = {name: attacked(config, network, job, name, pool) for name in sorted(names)}
    images = {"": pool.x} | {name: attack.images for name, attack in attacks.items()}
    if config.setting == "ood":
        images |= {name: foreign(config, name, pool) for name in config.foreign}
    if config.noisy:
        noise = 2 * torch.rand(pool.x.shape, generator=torch.Generator().manual_seed(job.seed)) - 1
        images["noisy"] = (pool.x + config.strength * noise).clamp(0, 1)
    report(1)
    known: dict[str, dict[str, Any]] = {
        name: {
            "predicted": in_batches(network, network, x).argmax(1).numpy(),
            "parts": split(len(x), test=config.test, validation=config.validation, seed=job.seed),
            "successful": attacks[name].success.numpy() if name in attacks else None,
        }
        for name, x in images.items()
    }
    scores: list[Row] = []
    for kind, variants in kinds_of(config).items():
        calls = {v: partial(each.fit(network, train.x, train.y), network) for v, each in variants.items()}
        sets = {
            name: Samples({v: in_batches(call, network, x).numpy() for v, call in calls.items()}, **known[name])
            for name, x in images.items()
        }
        for seen, tested in comparisons(config):
            to_test = {name: sets[name] for name in tested}
            noisy = sets.get("noisy")
            chosen = choose_and_score(sets[""], sets[seen], to_test, modes=config.modes, noisy=noisy, seed=job.seed)
            scores += [
                {"kind": kind, "seen": seen, "tested": name, "candidate": chosen.candidate, "mode": chosen.mode}
                | {"general_auroc": chosen.agnostic[name], "noisy_false_positives": chosen.noisy}
                | {"curve": chosen.curves[name].tolist(), **asdict(of_test)}
                for name, of_test in chosen.scores.items()
            ]
    report(1)
    shown = [
        {"attack": name, "success": a.success_rate, "linf": a.linf.mean().item(), "l2": a.l2.mean().item()}
        for name, a in attacks.items()
    ]
    return {"accuracy": evaluate(network, Batches(pool, 500)).accuracy, "attacks": shown, "scores": scores}


def evade(config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report) -> Row:
    """Attacks that know of the detector, from successful images that it detects."""
    parts = split(len(pool), test=config.test, validation=config.validation, seed=job.seed)
    attack = attacked(config, network, job, config.attacks[0], pool)
    features = Trajectory()
    pipeline = Pipeline(network, features, Detector(random_state=job.seed))
    clean, adversarial = pool.x[parts.fit], attack.images[parts.fit]
    pipeline.fit(clean, adversarial)
    tested = attack.subset(parts.test)
    detected = torch.from_numpy(pipeline.predict(tested.images)).bool() & tested.success
    chosen = detected.nonzero().flatten()[: config.starts]
    rate = detected.sum().item() / max(int(tested.success.sum()), 1)
    if not len(chosen):
        return {"detected_successful": rate, "starts": 0, "evaded": {}}
    starts = tested.subset(chosen), pool.x[parts.test][chosen]
    known = in_batches(partial(features, network), network, torch.cat([clean, adversarial])).numpy()
    queries: dict[str, Any] = {"pool": clean[:200], "seed": job.seed}
    queries |= {"max_iter": config.queries[0], "max_eval": config.queries[1]}

    def score(X: np.ndarray) -> np.ndarray:
        return pipeline.detector.predict_proba(X)[:, 1]

    ways = {
        "black box": lambda: black_box(network, pipeline.predict, *starts, **queries),
        "features": lambda: feature_attack(network, features, lambda z: score(z.numpy()) > 0.5, *starts, **queries),
        "surrogate": lambda: surrogate_attack(
            network, features, score, distill(score, known, seed=job.seed), *starts,
            descent=ProjectedDescent(eps=2 * config.strength, steps=config.steps),
        ),
    }  # fmt: skip
    evasions: dict[str, Evasion] = {}
    for name, way in ways.items():
        evasions[name] = way()
        report(1)
    evaded, l2 = {n: e.share for n, e in evasions.items()}, {n: e.l2.mean().item() for n, e in evasions.items()}
    return {"detected_successful": rate, "starts": len(chosen), "evaded": evaded, "l2": l2}


def clock(config: Config, job: Job, network: Network, train: TensorData, pool: TensorData, report: Report) -> Row:
    """Seconds for features of the pool in interleaved rounds, beside a plain forward pass."""
    step = max(config.magnitudes)
    kinds: dict[str, Features] = {TRAJECTORY: Trajectory(), "Mahalanobis": Mahalanobis(magnitude=step)}
    kinds |= {"Mahalanobis, no input step": Mahalanobis(), "LID": LID(), "scenes": NaturalSceneStatistics()}
    names = ("LID", "Mahalanobis, no input step", "Mahalanobis")  # the first warm up
    *_, statistics = [timeit(partial(kinds[name].fit, network, train.x, train.y), number=1) for name in names]
    calls = {"forward pass": network} | {name: partial(kind, network) for name, kind in kinds.items()}
    passes = {name: partial(in_batches, call, network, pool.x) for name, call in calls.items()}
    rounds = []
    for _ in range(1 + config.rounds):  # the first warms up
        rounds.append({name: timeit(each, number=1) for name, each in passes.items()})
        report(1)
    row = {"Mahalanobis, statistics": [statistics]} | {name: [r[name] for r in rounds[1:]] for name in calls}
    return {"seconds": row, "images": len(pool)}


EXPERIMENT = Experiment.of(
    __name__,
    jobs=jobs, summarize=summarize, columns=columns, verdict=verdict, details=details, figures=figures,
    quick=lambda c: replace(
        c, seeds=2, methods=c.methods[:1], attacks=c.attacks[:2], train_size=200, pool_size=200, epochs=3, iterations=2,
        magnitudes=(0.0,), starts=1, rounds=1, queries=(2, 100), steps=10,
    ),
    selects=("methods", "seeds"),
    cost=lambda config, job: {"adaptive": 4, "timing": 2 + config.rounds}.get(config.setting, 3),
)  # fmt: skip


TRAINED = {f"resnet{depth}" for depth in DEPTHS}
"""Networks that others trained."""


def begun(arguments: Sequence[str]) -> tuple[Experiment[Any, Any], str | None]:
    """The experiment that arguments of the command line ask for: of a network with weights or of networks of its own.

    With what it says of itself.
    """
    if any(each.startswith("--weights") or each.removeprefix("--network=") in TRAINED for each in arguments):
        import detection_pretrained

        return detection_pretrained.EXPERIMENT, detection_pretrained.__doc__
    return EXPERIMENT, __doc__


if __name__ == "__main__":
    command(*begun(sys.argv[1:]))
