"""Foreign images, as the field measures it (OpenOOD v1.5): scores of the last layer, the path alone, both joined.

A trained ResNet for CIFAR-10 sees images of other collections. Every score is fitted on training images, its settings
are chosen on a third of the test images and on classes of the near set that are not tested; the rest is scored once,
for five such splits. The path's score is a distance from the paths of clean images, and no foreign image is fitted on.
Joined with the best score of the last layer, its features and its share are chosen in the same place, none at all
included. The coverage of the neurons of all stages stands beside them.

    python experiments/ood.py --network resnet56 --weights FILE --folder DIR --near DIR/cifar100.npz \\
        --far DIR/gtsrb.npz blended textures
    python experiments/ood.py --quick

FILE holds the weights (`lab/pretrained/resnets.py`), DIR what torchvision downloads; of the other sets, lossless ones,
an array ``images`` of bytes and one of ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ood_scores import LAST, PATH, joined, measured, scores_of
from ood_setup import NEAR, POOL, TRAIN, Config, data, network, read, sets_of
from ood_tables import COLUMNS, figures, summarize, verdict

from lab.experiment import Experiment, Jobs, Report, Row, Run, command
from odenets.files import write_atomically

__all__ = ["EXPERIMENT"]

WEIGHTS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Shares of the path in the joined score, among which, and none, is chosen."""


@dataclass(frozen=True)
class Job:
    """Read a set of images, or compare the scores on a split.

    Attributes:
        images: a set to read.
        seed: of the split.
    """

    images: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"read_{self.images}" if self.images else f"split{self.seed}"

    @property
    def tuning(self) -> bool:
        """Whether it serves the others."""
        return bool(self.images)


def names_of(config: Config) -> list[str]:
    """Sets of images by name."""
    return [TRAIN, POOL, NEAR, *(Path(name).stem for name in config.far)]


def jobs(config: Config) -> Jobs[Job]:
    """Sets, then splits."""
    yield [Job(images=name) for name in names_of(config)]
    return (yield [Job(seed=seed) for seed in config.seeds])


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """What a job is for."""
    if job.images:
        images = sets_of(config)[job.images]
        values: dict[str, Any] = {**read(config, images.x, odin=job.images != TRAIN), "y": images.y.numpy()}

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # given a path, savez would add an ending
                np.savez(file, **values)

        write_atomically(run.folder / "read.npz", write)
        result: Row = {"images": job.images, "count": len(images.x)}
    else:
        result = {"scores": compare(config, job.seed)}
    report(1)
    return result | {"tuning": job.tuning}


def compare(config: Config, seed: int) -> list[Row]:
    """Every score on every foreign set, with the settings that are best on images that are not tested."""
    sets: dict[str, dict[str, Any]] = {}
    for name in names_of(config):
        with np.load(config.run_folder / Job(images=name).name / "read.npz", allow_pickle=False) as file:
            sets[name] = {key: file[key] for key in file}
    scores = scores_of(sets, sets[TRAIN]["y"], network(config).linear)

    draw = np.random.default_rng(seed)
    order = draw.permutation(len(sets[POOL]["y"]))
    choosing, testing = np.split(order, [len(order) // 3])
    classes = draw.permutation(np.unique(near := sets[NEAR]["y"]))
    held = np.isin(near, classes[: max(1, round(config.held * len(classes)))])
    tested = {name: np.full(len(sets[name]["y"]), True) for name in names_of(config)[3:]} | {NEAR: ~held}

    def area(values: dict[str, np.ndarray]) -> float:
        """On the images for choosing."""
        return measured(values[POOL][choosing], values[NEAR][held])["auroc"]

    chosen: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
    for name, variants in scores.items():
        variant = max(variants, key=lambda each: area(variants[each]))
        chosen[name] = variant, variants[variant]
    best = max(LAST, key=lambda name: area(chosen[name][1]))
    last = chosen[best][1]
    sums = {"none": last}
    for variant, path in scores[PATH].items():
        clean = last[POOL][choosing], path[POOL][choosing]
        for weight in WEIGHTS:
            sums[f"{weight:g} {variant}"] = {name: joined(last[name], path[name], clean, weight) for name in last}
    share = max(sums, key=lambda each: area(sums[each]))
    chosen["best of the last layer"] = best, last
    chosen["joined"] = f"{best} + {share}", sums[share]

    rows: list[Row] = []
    for name, (variant, values) in chosen.items():
        of = {each: measured(values[POOL][testing], values[each][mask]) for each, mask in tested.items()}
        far = [of[each] for each in of if each != NEAR]
        of["far"] = {key: float(np.mean([each[key] for each in far])) for key in far[0]}
        rows += [{"score": name, "variant": variant, "images": each} | measures for each, measures in of.items()]
    return rows


EXPERIMENT = Experiment.of(
    __name__,
    data=data, summarize=summarize, columns=COLUMNS, verdict=verdict, figures=figures,
    quick=lambda c: replace(c, network="digits", train=300, pool=100, foreign=60, seeds=(0, 1), held=0.3, epochs=3),
    selects=("seeds", "held"),
)  # fmt: skip

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
