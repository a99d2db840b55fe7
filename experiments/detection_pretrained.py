"""Detection on trained ResNets for CIFAR-10: attacks, noise of their size, and the detectors of the literature.

The test images are attacked and rounded to 8 bits, as clean ones are. Beside every attack stands noise of its own size:
the same changes, level by level, at other places and of random signs. A detector that calls noise an attack sees a
perturbation, no attack, so everything is measured twice: with noise left out of the fit, and with noise that counts as
clean wherever clean images do. Images that an attack leaves as they are do not count. A second control
is the change that the attack makes to another image. Features, classifiers and their settings are chosen on validation
images; the pool is split anew, by index, for every seed. At last come attacks that know of a detector.

    python experiments/detection.py --network resnet56 --weights FILE --folder DIR
    python experiments/detection.py --network resnet20 --weights FILE --folder DIR --slow AA DF CW HSJ BA
    python experiments/detection_pretrained.py --quick

FILE holds the weights (`lab/pretrained/resnets.py`), DIR what torchvision downloads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection_pretrained_adaptive import ADAPTIVE, evade
from detection_pretrained_detectors import CONTENDERS, FEATURES, Sample, compare
from detection_pretrained_setup import (
    CLEAN,
    EXCHANGED,
    NOISE,
    Config,
    Set,
    attacked,
    exchanged,
    images_of,
    network_of,
    noise_like,
    sets_of,
)
from detection_pretrained_tables import COLUMNS, details, figures, summarize, verdict
from torch import Tensor

from lab.experiment import Experiment, Jobs, Report, Row, Run, command
from odenets import adapt
from odenets.detection import in_batches, split
from odenets.files import write_atomically

__all__ = ["EXPERIMENT"]


@dataclass(frozen=True)
class Job:
    """Attack images, read features off all of them, compare the detectors on a split of them, or attack one of these.

    Attributes:
        attack: a set of attacked images to make.
        features: a kind to read.
        adaptive: a detector to attack.
        eps: the size of that.
        seed: of the split.
    """

    attack: Set | None = None
    features: str = ""
    adaptive: str = ""
    eps: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        if self.attack:
            return self.attack.name.replace(" ", "_")
        if self.adaptive:
            return f"against {self.adaptive} {self.eps:g}".replace(" ", "_").replace(",", "")
        return self.features.replace(" ", "_").replace(",", "") if self.features else f"split{self.seed}"

    @property
    def tuning(self) -> bool:
        """Whether it serves the others."""
        return bool(self.features)


def jobs(config: Config) -> Jobs[Job]:
    """Attacks, features, splits."""
    attacks = yield [Job(attack=each) for each in sets_of(config)]
    yield [Job(features=name) for name in FEATURES]
    splits = yield [Job(seed=seed) for seed in config.seeds]
    known = ADAPTIVE if config.starts else ()
    adaptive = yield [Job(adaptive=name, eps=eps, seed=config.seeds[0]) for name in known for eps in config.eps]
    return attacks + splits + adaptive


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """What a job is for."""
    if job.attack:
        result = attack(config, job.attack, run)
    elif job.features:
        result = read(config, job.features, run)
    elif job.adaptive:
        result = attack_detector(config, job)
    else:
        result = {"scores": compare_all(config, job.seed)}
    report(1)
    return result | {"tuning": job.tuning}


def attack(config: Config, each: Set, run: Run) -> Row:
    """Images under an attack and its controls, on disk; how large they are and what they do."""
    network, (_, pool) = network_of(config), images_of(config)
    made = attacked(config, network, each, pool, config.output / "attacks")
    noisy = noise_like(pool.x[: each.images], made.images, seed=0)
    of_others = exchanged(pool.x[: each.images], made.images)
    images = {"attack": made.images, "noise": noisy, "exchanged": of_others}
    _save(run.folder / "images.npz", **{k: _bytes(x) for k, x in images.items()}, successful=made.success.numpy())
    right, changed = made.clean == made.labels, (made.l2 > 0).float().mean().item()

    def success(x: Tensor) -> float:
        return (in_batches(network, network, x).argmax(1) != made.labels)[right].float().mean().item()

    change = (noisy - pool.x[: each.images]).flatten(1)
    return {
        "set": each.name,
        "images": each.images,
        "changed": changed,
        "accuracy": right.float().mean().item(),
        "success": made.success_rate,
        "noise_success": success(noisy),
        "exchanged_success": success(of_others),
        "linf": 255 * made.linf.mean().item(),
        "l2": made.l2.mean().item(),
        "noise_l2": change.norm(dim=1).mean().item(),
    }


def read(config: Config, kind: str, run: Run) -> Row:
    """Features of one kind of all images, and the classes that the network predicts for them, on disk."""
    model, (train, pool) = network_of(config), images_of(config)
    network = adapt(model, pool.x[:2])
    features = FEATURES[kind].fit(network, train.x, train.y)
    values: dict[str, np.ndarray] = {}
    for name, x in _sets(config, pool.x):
        values[name] = in_batches(partial(features, network), network, x, 100).numpy()
        if kind == next(iter(FEATURES)):
            values[f"predicted {name}"] = in_batches(model, model, x, 100).argmax(1).numpy()
    _save(run.folder / "features.npz", **values)
    return {"columns": values[CLEAN].shape[1]}


def _sets(config: Config, pool: Tensor) -> Iterable[tuple[str, Tensor]]:
    """All sets of images by name."""
    yield CLEAN, pool
    for each in sets_of(config):
        with np.load(config.run_folder / Job(attack=each).name / "images.npz", allow_pickle=False) as file:
            for name, key in zip(_names(each), ("attack", "noise", "exchanged"), strict=True):
                yield name, torch.from_numpy(file[key]).float() / 255


def _names(each: Set) -> tuple[str, str, str]:
    """Of an attack and its controls."""
    return each.name, NOISE + each.name, EXCHANGED + each.name


def samples_of(config: Config) -> dict[str, Sample]:
    """All sets as detectors see them."""
    features: dict[str, dict[str, np.ndarray]] = {}
    for kind in FEATURES:
        with np.load(config.run_folder / Job(features=kind).name / "features.npz", allow_pickle=False) as file:
            features[kind] = {name: file[name] for name in file}
    clean = _bytes(images_of(config)[1].x)
    masks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for each in sets_of(config):
        with np.load(config.run_folder / Job(attack=each).name / "images.npz", allow_pickle=False) as file:
            changed = (file["attack"] != clean[: each.images]).any((1, 2, 3))
            masks |= {name: (np.ones_like(changed), changed) for name in _names(each)}
            masks[each.name] = file["successful"], changed
    first = features[next(iter(FEATURES))]
    names = [name for name in first if not name.startswith("predicted ")]
    return {
        name: Sample(
            {kind: of[name] for kind, of in features.items()},
            first[f"predicted {name}"],
            *masks.get(name, np.ones((2, len(first[name])), dtype=bool)),
        )
        for name in names
    }


def comparisons(config: Config) -> list[tuple[str, tuple[str, ...]]]:
    """On what detectors are fitted and on what they are tested; the first attack is tested on all others too."""
    sets = sets_of(config)
    first = [each.name for each in sets if each.attack == config.attacks[0]]
    names = [each.name for each in sets]
    return [(name, tuple(other for other in names if other == name or name in first)) for name in names]


def compare_all(config: Config, seed: int) -> list[Row]:
    """Scores of all contenders on a split of the pool."""
    samples = samples_of(config)
    parts = split(config.pool, test=config.test, validation=config.validation, seed=seed)
    rows: list[Row] = []
    for seen, others in comparisons(config):
        tested = {name: (samples[name], samples[NOISE + name], samples[EXCHANGED + name]) for name in others}
        for noisy in (False, True):
            noise = samples[NOISE + seen] if noisy else None
            for name, contender in CONTENDERS.items():
                chosen, measures = compare(contender, samples[CLEAN], noise, samples[seen], tested, parts, seed)
                about = {"seen": seen, "noisy": noisy, "detector": name, "chosen": chosen}
                rows += [about | {"tested": other} | of for other, of in measures.items()]
    return rows


def attack_detector(config: Config, job: Job) -> Row:
    """What attacks within a ball reach that know of a detector."""
    model, (_, pool) = network_of(config), images_of(config)
    samples, seen = samples_of(config), Set(config.attacks[-1], min(config.eps), config.pool)
    with np.load(config.run_folder / Job(attack=seen).name / "images.npz", allow_pickle=False) as file:
        moved = torch.from_numpy(file["attack"]).float() / 255
    sets = samples[CLEAN], samples[NOISE + seen.name], samples[seen.name]
    parts = split(config.pool, test=config.test, validation=config.validation, seed=job.seed)
    result = evade(config, adapt(model, pool.x[:2]), job.adaptive, job.eps, sets, pool, moved, parts, job.seed)
    return {"adaptive": job.adaptive, "seen": seen.name, "eps": job.eps} | result


def _bytes(x: Tensor) -> np.ndarray:
    return (255 * x).round().byte().numpy()


def _save(path: Path, **arrays: Any) -> None:
    """An ``.npz`` file, atomically."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a path, savez would add an ending
            np.savez(file, **arrays)

    write_atomically(path, write)


EXPERIMENT = Experiment.of(
    __name__,
    data=images_of, summarize=summarize, columns=COLUMNS, verdict=verdict, details=details, figures=figures,
    quick=lambda c: replace(
        c, network="digits", attacks=("FGM", "BIM"), eps=(0.1,), pool=120, few=60, train=300, seeds=(0, 1), epochs=3,
        starts=3, steps=3,
    ),
    selects=("seeds",),
    settings=lambda config, job: {"attack": asdict(job.attack) if job.attack else None},
)  # fmt: skip

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
