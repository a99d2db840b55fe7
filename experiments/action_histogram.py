"""The action of clean and of attacked images, and a test on it that has seen no attack [K24, fig. 21].

Networks are trained plainly and with least action. The kinetic action of their way through the network is computed for
clean images and for images under FGM attacks of several sizes; an image is rejected where its action lies outside two
quantiles of that of other clean images. Rates are over seeds.

    python experiments/action_histogram.py
    python experiments/action_histogram.py --dataset mnist --folder DIR --solver euler --depth 9 --epsilons 0.03 0.1 0.2
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detection_setup import Job, NetworkConfig, jobs, parts_of, trained

from lab.experiment import Columns, Experiment, Figures, Outcome, Report, Row, Run, command
from lab.results import groups
from lab.statistics import percent
from odenets import plotting
from odenets.detection import QuantileTest, Trajectory, in_batches, preset, run_attack, score, split


@dataclass(frozen=True)
class Config(NetworkConfig):
    """What to train and attack.

    Attributes:
        epsilons: sizes of the FGM attacks in the maximum norm.
        level: share of the clean images that the test may reject, half on each side; 0.04 in [K24].
    """

    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2)
    level: float = 0.04
    pool_size: int = 800
    epochs: int = 20
    output: Path = Path("runs/action_histogram")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilons or min(self.epsilons) <= 0:
            raise ValueError(f"epsilons must be positive, at least one, got {self.epsilons}")


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """The action of clean and attacked images, and how many of them the test rejects."""
    train, pool = parts_of(config)
    network = trained(config, job, train)
    report(1)
    attacks = {
        f"eps = {eps:g}": run_attack(
            network, preset("FGM", eps=eps, exact=False), pool.x, pool.y, batch_size=200, seed=job.seed
        )
        for eps in config.epsilons
    }
    images = {"clean": pool.x} | {name: attack.images for name, attack in attacks.items()}
    call = partial(Trajectory("action"), network)
    actions = {name: in_batches(call, network, x).numpy() for name, x in images.items()}
    parts = split(len(pool), test=0.5, validation=0.1, seed=job.seed)
    test = QuantileTest(config.level, side="both").fit(actions["clean"][parts.fit])
    held_out = {name: x[parts.test.numpy()] for name, x in actions.items()}
    rejected = {name: test.predict(x) < 0 for name, x in held_out.items()}
    fooled = {name: attack.success.numpy()[parts.test.numpy()] for name, attack in attacks.items()}
    clean, *others = (-test.score_samples(x) for x in held_out.values())
    results: Row = {
        "rejected": {name: float(r.mean()) for name, r in rejected.items()},
        "successful": {name: float(rejected[name][of].mean()) for name, of in fooled.items() if of.any()},
        "auroc": {name: score(clean, x).auroc for name, x in zip(attacks, others, strict=True)},
    }
    if job.seed == 0:  # is drawn
        limits = [config.level / 2, 1 - config.level / 2]
        results["quantiles"] = np.quantile(actions["clean"][parts.fit].sum(1), limits).tolist()
        results["action"] = {name: [float(f"{a:.5g}") for a in x.sum(1)] for name, x in actions.items()}
    report(1)
    return results


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per method and set of images, differences to the first method paired over the seeds."""
    rows = []
    by_method = groups(results, "method")
    for (method,), of in by_method.items():
        for name in of[0]["rejected"]:
            row: Row = {"method": method, "images": name, "rejected": percent(r["rejected"][name] for r in of)}
            if name != "clean":
                row["auroc"] = percent(r["auroc"][name] for r in of)
                shares = [r["successful"][name] for r in of if name in r["successful"]]
                row["successful"] = percent(shares) if shares else None
                if method != config.methods[0]:
                    pairs = zip(of, by_method[config.methods[0],], strict=True)
                    row["difference"] = percent(r["auroc"][name] - plain["auroc"][name] for r, plain in pairs)
            rows.append(row)
    return rows


def columns(config: Config) -> Columns:
    """Of the table."""
    return {
        "network": "{method}",
        "images": "{images}",
        "rejected (%)": "{rejected:.1f}",
        "of successful (%)": "{successful:.1f}",
        "AUROC": "{auroc:.1f}",
        f"- {config.methods[0]}": "{difference:.1f}",
    }


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences."""
    what = ("does not differ", "is larger", "is smaller")
    return [
        f"{row['images']}: the area under the curve of the action alone {what[row['difference'].sign]} with "
        f"{row['method']}, by {row['difference']:.1f} points (paired)"
        for row in outcome.rows
        if "difference" in row
    ]


def details(config: Config, results: list[Row]) -> dict[str, Any]:
    """By method the actions and the quantiles of the first network."""
    return {name: {r["method"]: r[name] for r in results if name in r} for name in ("action", "quantiles")}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Histograms of the action, a panel per method."""
    draw = partial(plotting.histograms, xlabel="action")
    return {"fig_21": lambda: draw(outcome.detail("action"), lines=outcome.detail("quantiles"))}


EXPERIMENT = Experiment.of(
    __name__,
    jobs=jobs,
    columns=columns,
    quick=lambda c: replace(c, seeds=2, train_size=200, pool_size=200, epochs=2, epsilons=c.epsilons[:2]),
    selects=("methods", "seeds"),
    cost=lambda config, job: 2,
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
