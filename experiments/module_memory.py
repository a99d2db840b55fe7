"""Memory of module-wise training [K24, tables 9 and 31]: peaks of a training step against backpropagation end to end.

A training step is taken on tensors of the right shape and without numbers (torch's fake tensors), and the bytes of all
tensors that live at once are counted: activations, gradients and temporaries, with the weights and the optimizer's
state. On small networks the count is that of a real step to the byte. On a GPU the step is taken, and torch's allocator
tells. Beside the figures of [K24] stand those of backpropagation that computes every module again (checkpointing).

    python experiments/module_memory.py
    python experiments/module_memory.py --networks resnet50 swin_t
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.config import Config as Common
from lab.config import check_among
from lab.experiment import Columns, Experiment, Jobs, Outcome, Report, Row, Run, command
from lab.networks import vision
from lab.settings import read_settings
from lab.thesis import thesis
from odenets import adapt, models
from odenets.adapting import RULES
from odenets.analysis import measure_memory
from odenets.module_wise import ModuleWise, end_to_end_step, greedy, parallel_step, split_into_modules, trgl

METHODS = ("end-to-end", "checkpointed", "VanGL", "TRGL", "VanGL*", "TRGL*")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network, its images and its batches.

    Attributes:
        size: height and width of the images.
        batch_size: of training.
        classes: of the images.
        stem: of the network, see :func:`lab.networks.vision`.
        modules: numbers of modules.
        split: after how many blocks each of four modules ends, where [K24] says so.
        head: of the modules.
        at: what transitions belong to.
    """

    size: int
    batch_size: int
    classes: int = 200
    stem: Literal["imagenet", "cifar", "tinyimagenet"] = "imagenet"
    modules: tuple[int, ...] = (4,)
    split: tuple[int, ...] = ()
    head: str = "conv"
    at: Literal["end", "start"] = "end"


SETTINGS = read_settings(Setting, Path(__file__).with_suffix(".toml"))


@dataclass(frozen=True)
class Config(Common):
    """What to measure.

    Attributes:
        networks: resnet110 (table 9), vgg19, resnet50, resnet101, resnet152, swin_t (table 31).
        methods: end-to-end, checkpointed, VanGL, TRGL; with a star, of equally heavy modules.
        batch_size: samples in a batch; that of [K24] if 0.
        device: "cpu" counts on shapes alone; "cuda" takes the steps.
    """

    networks: tuple[str, ...] = tuple(SETTINGS)
    methods: tuple[str, ...] = METHODS
    batch_size: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    output: Path = Path("runs/module_memory")

    def __post_init__(self) -> None:
        check_among(self, "networks", SETTINGS)
        check_among(self, "methods", METHODS)
        if self.batch_size < 0 or self.batch_size == 1:
            raise ValueError(f"batch_size must be at least 2, or 0 for the thesis', got {self.batch_size}")


@dataclass(frozen=True)
class Job:
    """One training step of a network in K modules."""

    network: str
    method: str
    K: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.network}_{self.method.replace('*', '_balanced')}_{self.K}"


def modules_of(name: str, method: str, K: int, x: Tensor) -> ModuleWise:
    """The network of a setting in modules; with a star equally heavy ones, in four those of [K24]."""
    setting, heavy = SETTINGS[name], method.endswith("*")
    if name == "resnet110":
        network = models.resnet110(classes=setting.classes)
    else:
        model = vision(name, setting.classes, stem=setting.stem, size=setting.size)
        # by the names of their parts, for tensors without numbers do not tell how samples lie in the states
        network = adapt(model, displacement=True) if name == "vgg19" else adapt(model, blocks=RULES)
    split = setting.split if setting.split and K == 4 and not heavy else K
    balance = "memory" if heavy else "blocks"
    return split_into_modules(network, split, x[:2], balance=balance, head=setting.head, at=setting.at).train()


def step_of(network: ModuleWise, method: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A training step by a method, as in [K24] with SGD with momentum."""
    sgd = partial(torch.optim.SGD, lr=0.003, momentum=0.9, weight_decay=2e-4)
    if method in ("end-to-end", "checkpointed"):
        optimizer = sgd(_trained(network, method))
        return partial(end_to_end_step, network, greedy()(0, 1), optimizer, checkpointed=method == "checkpointed")
    make = trgl(0.5) if method.startswith("TRGL") else greedy()
    optimizers = [sgd(module.parameters()) for module in network.modules_in_order]
    return partial(parallel_step, network, [make(k, network.K) for k in range(network.K)], optimizers)


def peak(name: str, method: str, K: int, batch_size: int, device: str) -> Row:
    """The most bytes that live at once in a training step, weights and optimizer included."""
    setting = SETTINGS[name]
    with ExitStack() as shapes:
        if device == "cpu":
            shapes.enter_context(FakeTensorMode())
            shapes.enter_context(patch.object(nn.init, "trunc_normal_", lambda x, **_: x))  # which looks at numbers
        shapes.enter_context(torch.device(device))
        x, y = torch.rand(batch_size, 3, setting.size, setting.size), torch.randint(10, (batch_size,))
        network = modules_of(name, method, K, x)
        step = step_of(network, method)
        step(x, y)  # momentum is made in the first step
        highest = measure_memory(lambda: step(x, y), device).peak
        standing = sum(p.numel() * p.element_size() for p in {*_trained(network, method)})
    return {"bytes": highest + 2 * standing, "ends": network.ends}


def _trained(network: ModuleWise, method: str) -> list[nn.Parameter]:
    if method in ("end-to-end", "checkpointed"):
        parts = [p for module in network.modules_in_order for p in module.part.parameters()]
        return [*parts, *network.modules_in_order[-1].head.parameters()]
    return list(network.parameters())


def jobs(config: Config) -> Jobs[Job]:
    """Every network by every method in every number of modules."""
    ways = [(name, method) for name in config.networks for method in config.methods]
    numbers = {way: (1,) if way[1] == "end-to-end" else SETTINGS[way[0]].modules for way in ways}
    return (yield [Job(*way, K) for way in ways for K in numbers[way] if not (config.quick and K > 4)])


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Measure the second step of a training."""
    batch_size = config.batch_size or SETTINGS[job.network].batch_size
    result = peak(job.network, job.method, job.K, batch_size, config.device)
    report(1)
    return {"batch_size": batch_size, **result}


def summarize(config: Config, results: list[Row]) -> list[Row]:
    """One row per network, method and number of modules."""
    whole = {r["network"]: r["bytes"] for r in results if r["method"] == "end-to-end"}
    rows = []
    for result in results:
        row = {name: result[name] for name in ("network", "method", "K", "batch_size", "bytes", "ends")}
        if row["network"] in whole:
            row["saved"] = 100 * (1 - row["bytes"] / whole[row["network"]])
        table = ("9", row["K"]) if row["network"] == "resnet110" else ("31", row["network"])
        rows.append(row | {"thesis": thesis(*table, row["method"])})
    return rows


def _sizes(row: Mapping[str, Any]) -> str:
    """Of the modules, in blocks."""
    ends = row["ends"]
    return " ".join(str(b - a) for a, b in zip((0, *ends), ends, strict=False)) if row["K"] > 1 else ""


COLUMNS: Columns = {
    "network": "{network}",
    "method": "{method}",
    "K": "{K}",
    "blocks per module": _sizes,
    "batch": "{batch_size}",
    "MiB": lambda row: f"{row['bytes'] / 2**20:.0f}",
    "saved (%)": lambda row: f"{row['saved']:.0f}" if row["K"] > 1 else "",
    "thesis (%)": "{thesis:g}",
}


def verdict(config: Config, outcome: Outcome) -> list[str]:
    """What the table says, in sentences."""
    by_way = {(row["network"], row["method"], row["K"]): row for row in outcome.rows}
    lines = []
    for (name, method, K), row in by_way.items():
        plain = by_way.get((name, method.replace("TRGL", "VanGL"), K))
        if not method.startswith("TRGL") or plain is None:
            continue
        more = 100 * (row["bytes"] / plain["bytes"] - 1)
        text = f"{name}, K = {K}: {method} takes {more:.2f} % more than {plain['method']}"
        if checkpointed := by_way.get((name, "checkpointed", K)):
            text += f", and {row['bytes'] / checkpointed['bytes']:.2f} of checkpointed backpropagation"
        lines.append(text)
    return lines


EXPERIMENT = Experiment.of(
    __name__,
    quick=lambda config: replace(config, networks=("resnet110",), batch_size=8),
    selects=("networks", "methods"),
    seeds=lambda config, job: (),
)

if __name__ == "__main__":
    command(EXPERIMENT, __doc__)
