"""Least action against plain training: is what a network is attacked with easier to detect, and by which mechanism?

Pre-activation ResNets-14 are trained for CIFAR-10 plainly and with least action. Each is attacked, and detectors by its
paths and one by its embeddings are fitted on attacked images, as in ``detection_pretrained.py``. The unit of all
statistics is the pair of a plain network and one with least action. Who is paired is decided by clean accuracy on the
test images that are not attacked, by nothing else: as many pairs as there can be within half a point, and of these
those that differ least. Local Lipschitz constants on the data and off it say whether least action does what theorems 6
to 8 of [K24] have it do.

    python experiments/detection_least_action.py --folder DIR --pairs DIR/cifar10-pairs
    python experiments/detection_least_action.py --quick

DIR holds what torchvision downloads; trained networks in the second folder are not trained anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from detection_least_action_lipschitz import CLEAN, apart, constants, slopes
from detection_least_action_setup import METHODS, Config, parts_of, trained
from detection_least_action_tables import COLUMNS, details, figures, summarize, verdict
from detection_pretrained_detectors import CONTENDERS, FEATURES, FIRST, LOGISTIC, Contender, Sample, compare
from detection_pretrained_setup import attacked, images_of, noise_like, sets_of
from torch import Tensor

from lab.experiment import Experiment, Jobs, Report, Row, Run, command
from odenets import Network, measures, save_weights
from odenets.detection import Attacked, in_batches, split
from odenets.training.data import Batches, TensorData
from odenets.training.evaluation import evaluate

__all__ = ["EXPERIMENT"]

DETECTORS: dict[str, Contender] = {
    FIRST: CONTENDERS[FIRST],
    "eq. 34, clean only": CONTENDERS["eq. 34, clean only"],
    "separation, logistic": replace(CONTENDERS["separation"], classifiers=LOGISTIC),
    "Mahalanobis, logistic": replace(CONTENDERS["Mahalanobis"], classifiers=LOGISTIC),
}
"""By their names in the table; the first decides."""


@dataclass(frozen=True)
class Job:
    """A network: train it, or read it, attack it, and measure."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.replace(' ', '_')}_seed{self.seed}"


def jobs(config: Config) -> Jobs[Job]:
    """A network of every seed and method."""
    return (yield [Job(method, seed) for seed in config.seeds for method in METHODS])


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """What is measured on a network."""
    network = trained(config, job.method, job.seed)
    save_weights(network, run.folder / "weights.safetensors")
    report(1)
    (statistics, pool), (_, others) = images_of(config.attacked), parts_of(config)
    right = evaluate(network, Batches(others, 500)).accuracy, evaluate(network, Batches(pool, 500)).accuracy
    shares = [len(part) / (len(others) + len(pool)) for part in (others, pool)]
    action = in_batches(lambda x: network.record(x, action=measures.action)[1]["action"].sum(0), network, pool.x, 100)
    attacks = {
        each.name: attacked(config.attacked, network, each, pool, config.output / "attacks")
        for each in sets_of(config.attacked)
    }
    report(1)
    scores = compare_all(config, network, statistics, pool, attacks)
    report(1)
    mechanism = constants_of(config, network, pool, attacks)
    report(1)
    return {
        "accuracy": sum(share * each for share, each in zip(shares, right, strict=True)),
        "accuracy_of_others": right[0],
        "action": action.mean().item(),
        "attacks": [attack_row(name, each) for name, each in attacks.items()],
        "scores": scores,
        "mechanism": mechanism,
    }


def attack_row(name: str, each: Attacked) -> Row:
    """What an attack does."""
    moved = each.l2 > 0
    return {
        "set": name, "success": 100 * each.success_rate, "changed": moved.float().mean().item(),
        "l2": each.l2[moved].mean().item(),
    }  # fmt: skip


def compare_all(
    config: Config, network: Network, statistics: TensorData, pool: TensorData, attacks: Mapping[str, Attacked]
) -> list[Row]:
    """Scores of the detectors for every attack, with noise of its size left out and clean, means over the splits."""
    used = {kind for of in DETECTORS.values() for kind in of.features}
    kinds = {kind: FEATURES[kind].fit(network, statistics.x, statistics.y) for kind in sorted(used)}

    def sample(x: Tensor, successful: Tensor | None = None) -> Sample:
        X = {kind: in_batches(partial(of, network), network, x, 100).numpy() for kind, of in kinds.items()}
        predicted = in_batches(network, network, x, 100).argmax(1).numpy()
        changed = (x != pool.x).flatten(1).any(1) if successful is not None else torch.ones(len(x), dtype=torch.bool)
        fooled = changed if successful is None else successful
        return Sample(X, predicted, fooled.numpy(), changed.numpy())

    rows: list[Row] = []
    clean = sample(pool.x)
    for name, each in attacks.items():
        attack = sample(each.images, each.success)
        noise = sample(noise_like(pool.x, each.images, seed=0), torch.ones(len(pool), dtype=torch.bool))
        for noisy in (False, True):
            for detector, contender in DETECTORS.items():
                of = [
                    compare(
                        contender, clean, noise if noisy else None, attack, {name: (attack, noise, None)},
                        split(config.pool, test=config.test, validation=config.validation, seed=seed), seed,
                    )[1][name]
                    for seed in config.splits
                ]  # fmt: skip
                about = {"noisy": noisy, "tested": name, "detector": detector}
                rows.append(about | {key: sum(each[key] for each in of) / len(of) for key in of[0]})
    return rows


def constants_of(config: Config, network: Network, pool: TensorData, attacks: Mapping[str, Attacked]) -> list[Row]:
    """What theorems 6 to 8 bound, on the data and off it: means of logarithms over images, or pairs, and blocks.

    The images are the first ones that the last attack changes at the larger size. Off the data are these under that
    attack, with noise of its size, the means of two clean ones, and uniform noise.
    """
    moved = attacks[f"{config.attacks[-1]} {max(config.eps):g}"].images
    noisy = noise_like(pool.x, moved, seed=0)
    points = (moved != pool.x).flatten(1).any(1).nonzero()[: config.points, 0]
    x = pool.x[points]
    near = {CLEAN: x, "noise": noisy[points], "attacked": moved[points]}
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    sets = near | {"between": (x + x.roll(1, 0)) / 2, "uniform": draw}
    of: dict[str, dict[str, Tensor]] = {}
    for name, images in sets.items():
        for quantity, values in constants(network, images, config.iterations).items():
            of.setdefault(quantity, {})[name] = values
    of |= {"slope": slopes(network, near), "apart": apart(network, near)}
    return [
        {"quantity": quantity, "points": name, "log": values.log().mean(1).tolist()}
        for quantity, by_name in of.items()
        for name, values in by_name.items()
    ]


EXPERIMENT = Experiment.of(
    __name__,
    data=parts_of, summarize=summarize, columns=COLUMNS, verdict=verdict, details=details, figures=figures,
    quick=lambda c: replace(
        c, dataset="digits", attacks=("FGM", "BIM"), eps=(0.1,), pool=100, train=300, seeds=(0, 1), splits=(0, 1),
        epochs=2, batch_size=64, apart=50.0, points=8, iterations=3,
    ),
    selects=("seeds", "apart"),
    cost=lambda config, job: 4,
)  # fmt: skip

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
