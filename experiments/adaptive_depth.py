"""The claims of [K24, section 6.2.1]: blocks of a higher order, ensembles of their schemes, a depth that adapts, LAP.

    python experiments/adaptive_depth.py
    python experiments/adaptive_depth.py --parts depth --stage-fields untied --tolerance 0.03 --K 3
    python experiments/adaptive_depth.py --dataset cifar10 --folder DIR --train-size 5000 --features 16 --pool

Its parts, on the same split and for the same seeds:

- "depth": Bogacki-Shampine networks start at eight blocks, or at one; their embedded error merges and duplicates blocks
  while they train. Beside them stand networks fixed at the first, the final and the deepest depth, an Euler network of
  as many evaluations, and networks that are doubled or stacked at given epochs, without regard to errors.
- "long": the same over a total time at which coarse networks diverge.
- "orders": networks of as many field evaluations a pass, in Euler blocks and in blocks of a higher order, each at the
  learning rate that is best on validation images. None of these evaluations is wasted: the closing stage of a method,
  which only its error reads, is not taken; what a pass costs with the errors stands beside it. Every embedded scheme is
  tested, from the last block on and by a pass of its own, and so are their ensembles.
- "action": the action in the loss of an adaptive network and of a fixed one: errors, blocks, accuracy.

``depth_search.py`` compares an adaptive training with the search over several depths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adaptive_depth_setup import DepthConfig, Job, train
from adaptive_depth_tables import COLUMNS, summarize, verdict

from lab import plotting
from lab.config import check_among, check_any
from lab.experiment import Experiment, Figures, Jobs, Outcome, Row, command
from lab.results import best_settings
from lab.training import parts_of

__all__ = ["COLUMNS", "EXPERIMENT", "Config", "figures", "jobs", "parts_of", "summarize", "train", "verdict"]

PARTS = ("depth", "long", "orders", "action")
RIVALS = ("least action", "tolerance")


@dataclass(frozen=True)
class Config(DepthConfig):
    """What is trained.

    Attributes:
        parts: of the experiment.
        stage_fields: fields per block in the parts "depth" and "long"; an untied one forwards its second-order output,
            which reads all of them, and is trained on the ensemble [K24, eq. 43]. Errors of chained and untied blocks
            do not vanish with h cubed: they need a larger tolerance, or every block is duplicated up to the cap.
        deep: blocks of the deep start.
        long_time: total time of the part "long".
        budget: field evaluations a pass of the networks of the part "orders", a multiple of 12.
        rates: learning rates that each of them chooses from.
        action_time: total time of the part "action".
        weights: of the action.
        rivals: of the weights: "least action", whose lambda grows, and "tolerance", ten times as large without action.
    """

    parts: tuple[str, ...] = PARTS
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10
    stage_fields: Literal["tied", "chained", "untied"] = "tied"
    deep: int = 8
    long_time: float = 8.0
    budget: int = 12
    rates: tuple[float, ...] = (0.02, 0.05)
    action_time: float = 4.0
    weights: tuple[float, ...] = (0.1, 1.0, 10.0)
    rivals: tuple[str, ...] = RIVALS
    output: Path = Path("runs/adaptive_depth")

    def __post_init__(self) -> None:
        check_any(self, "seeds", "parts", "rates", "weights")
        check_among(self, "parts", PARTS)
        check_among(self, "rivals", RIVALS)
        if self.budget % 12 or self.budget < 12:
            raise ValueError(f"budget must be a multiple of 12, so that blocks of all orders fit, got {self.budget}")


def jobs(config: Config) -> Jobs[Job]:
    """Those of each part; what a choice needs is trained before what is reported."""
    results: list[Row] = []
    for part in config.parts:
        results += yield from _JOBS[part](config)
    return results


def _job(config: Config, seed: int, **kind: Any) -> Job:
    common: dict[str, Any] = {
        "total_time": config.total_time,
        "tolerance": config.tolerance,
        "rate": config.learning_rate,
    }
    return Job(**common | kind, seed=seed)


def _of_seeds(config: Config, kinds: list[dict[str, Any]]) -> list[Job]:
    return [_job(config, seed, **kind) for kind in kinds for seed in config.seeds]


def _blocks(config: Config) -> dict[str, Any]:
    """What blocks are in the parts that adapt."""
    untied = {"forward": "order2", "readout": "ensemble"} if config.stage_fields == "untied" else {}
    return {"stage_fields": config.stage_fields} | untied


def _depth(config: Config) -> Jobs[Job]:
    """Adaptive, growing and fixed networks; then fixed ones of the depth and the cost at which the adaptive end."""
    deep, blocks = config.deep, _blocks(config) | {"part": "depth"}
    kinds: list[dict[str, Any]] = [
        *({"network": f"adaptive from {d}", "depth": d, "way": "adaptive"} for d in (1, deep)),
        *({"network": f"fixed {d}", "depth": d} for d in (1, deep)),
        *({"network": f"{way} to {deep}", "depth": deep, "way": way} for way in ("doubling", "stacking")),
    ]
    results = yield _of_seeds(config, [blocks | kind for kind in kinds])
    ends = [r["final_depth"] for r in results if r["network"] == f"adaptive from {deep}" and not r["diverged"]]
    final = statistics.mode(ends) if ends else deep
    euler = final * (4 if config.stage_fields == "untied" else 3)
    kinds = [{"part": "depth", "network": f"euler {euler}", "solver": "euler", "depth": euler}]
    kinds += [blocks | {"network": f"fixed {final}", "depth": final}] * (final not in (1, deep))
    results += yield _of_seeds(config, kinds)
    return results


def _long(config: Config) -> Jobs[Job]:
    """Fixed and adaptive networks over the long time."""
    blocks = _blocks(config) | {"part": "long", "total_time": config.long_time}
    kinds: list[dict[str, Any]] = [{"network": f"fixed {d}", "depth": d} for d in (1, 2)]
    kinds += [{"network": "adaptive from 1", "depth": 1, "way": "adaptive"}]
    return (yield _of_seeds(config, [blocks | kind for kind in kinds]))


def _orders(config: Config) -> Jobs[Job]:
    """Networks of one budget, of which each chooses its learning rate with a seed of its own."""
    n = config.budget
    untied: dict[str, Any] = {"stage_fields": "untied"}
    kinds: list[dict[str, Any]] = [
        {"network": f"euler, {n} blocks", "solver": "euler", "depth": n},
        {"network": f"euler, {n} blocks, fields for three", "solver": "euler", "depth": n, "together": 3},
        {"network": f"midpoint untied, {n // 2} blocks", "depth": n // 2, "forward": "midpoint"} | untied,
        {"network": f"order 3 tied, {n // 3} blocks", "depth": n // 3},
        {"network": f"order 3 untied, {n // 3} blocks", "depth": n // 3} | untied,
        {"network": f"order 3 chained, {n // 3} blocks", "depth": n // 3, "stage_fields": "chained"},
        {"network": f"eq. 43, {n // 4} blocks", "depth": n // 4, "forward": "order2"} | untied,
        {"network": f"eq. 43 on the ensemble, {n // 4} blocks", "depth": n // 4, "forward": "order2"}
        | untied
        | {"readout": "ensemble"},
    ]
    kinds = [kind | {"part": "orders"} for kind in kinds]
    chosen: dict[tuple[Any, ...], Row] = {(kind["network"],): {"rate": config.rates[0]} for kind in kinds}
    if len(config.rates) > 1:
        tried = [_job(config, 10_000, **kind, rate=rate, tuning=True) for kind in kinds for rate in config.rates]
        tuned = yield tried
        scored = [r | {"validation": float("-inf")} if r["diverged"] else r for r in tuned]
        chosen = best_settings(scored, ("rate",), within=("network",), score=lambda r: [r["validation"]])
    return (yield _of_seeds(config, [kind | chosen[kind["network"],] for kind in kinds]))


def _action(config: Config) -> Jobs[Job]:
    """Adaptive and fixed networks without the action, with weights of it, with multipliers; and a looser tolerance."""
    losses: list[dict[str, Any]] = [{"weight": weight} for weight in (0.0, *config.weights)]
    losses += [{"multipliers": True}] * ("least action" in config.rivals)
    kinds: list[dict[str, Any]] = []
    for loss in losses:
        words = "least action" if loss.get("multipliers") else f"weight {loss['weight']:g}"
        shared = {"part": "action", "total_time": config.action_time, "depth": config.deep} | loss
        kinds += [
            shared | {"network": f"{name} {config.deep}, {words}", "way": way}
            for name, way in (("adaptive from", "adaptive"), ("fixed", "fixed"))
        ]
    looser = {"network": f"adaptive from {config.deep}, tolerance x 10", "tolerance": 10 * config.tolerance}
    kinds += [kinds[0] | looser] * ("tolerance" in config.rivals)
    return (yield _of_seeds(config, kinds))


_JOBS: dict[str, Callable[[Config], Jobs[Job]]] = {
    "depth": _depth,
    "long": _long,
    "orders": _orders,
    "action": _action,
}


def figures(config: Config, outcome: Outcome) -> Figures:
    """Depth over epochs, errors of the blocks, accuracy against cost."""
    if "depth" not in config.parts:
        return {}

    def of(networks: str) -> plotting.Kinds:
        return plotting.epochs_of([row for row in outcome.metrics if row["part"] in ("depth", "long")], networks)

    rows = [row for row in outcome.rows if row["part"] in ("depth", "long")]
    return {
        "depth": lambda: plotting.depth_and_steps(of("adaptive")),
        "errors": lambda: plotting.block_errors(of("adaptive"), config.tolerance, config.K),
        "cost": lambda: plotting.accuracy_against_cost(rows, of("")),
    }


def quick(config: Config) -> Config:
    """Two seeds of few images and epochs."""
    config = replace(config, seeds=(0, 1), epochs=3, train_size=300, deep=4, max_depth=8)
    return replace(config, rates=(0.02,), weights=(1.0,), tolerance=config.tolerance)


EXPERIMENT = Experiment.of(
    __name__,
    quick=quick,
    selects=(
        *("seeds", "parts", "deep", "total_time", "long_time", "action_time", "budget", "rates", "weights"),
        *("rivals", "learning_rate", "tolerance", "stage_fields"),
    ),
    cost=lambda config, job: config.epochs,
    keys=("part", "network", "total_time", "seed"),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
