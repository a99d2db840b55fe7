"""What the comparison of architectures trains and measures: a network of each scheme on one budget."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lab import images
from lab.config import check_among, check_at_least
from lab.experiment import Report, Row, Run
from lab.training import TrainingConfig, fit_network, parts_of
from odenets import Network, measures, models, recalibrate
from odenets.analysis import measure_memory
from odenets.errors import DivergedError
from odenets.fields import ConvField, FixupField, ScaledField, VelocityField
from odenets.fixup import fixup
from odenets.schemes import CoupledHalves, Equilibrium, Fractal, Noisy, ReversibleScheme, mean_over_paths
from odenets.schemes.names import method_of
from odenets.training.data import TensorData

__all__ = ["ARCHITECTURES", "BUDGETS", "SIZES", "Config", "Job", "build", "epochs_of", "measure", "train"]

BUDGETS = ("parameters", "evaluations")
"""What all networks have alike: as many parameters in as many blocks, or as many evaluations of fields of one width."""


@dataclass(frozen=True)
class Architecture:
    """A scheme, its fields and what else its network has.

    Attributes:
        scheme: of the blocks.
        fields: of them; those that the scheme is published with if not given.
        settings: other arguments of the network.
        draw: draws its weights anew, if not None.
        rates: factor of its learning rates.
    """

    scheme: Any
    fields: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[Network], Network] | None = None
    rates: float = 1.0

    @property
    def iterates(self) -> bool:
        """Whether a step is found by iterations, as many as training makes them."""
        return isinstance(self.scheme, Equilibrium)


def skip_init(channels: int) -> ScaledField:
    """The branch of a pre-activation block without norms, times a scalar that begins at 0."""
    return ScaledField(ConvField(channels, norm=None))


def fixup_field(channels: int) -> FixupField:
    """Two convolutions with scalar biases and a multiplier."""
    return FixupField(*(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)))


IMPLICIT = partial(Architecture, Equilibrium(tolerance=1e-2), rates=1 / 3)
"""Implicit Euler steps, found as nearly as a training needs them; fields that grow fast make them slow."""

ARCHITECTURES: dict[str, Architecture] = {
    "ResNet (Euler)": Architecture("euler"),
    "small h (0.1)": Architecture("euler", settings={"h": 0.1}),
    "SkipInit": Architecture("euler", skip_init),
    "Fixup": Architecture("euler", fixup_field, draw=fixup),
    "shared block": Architecture("euler", settings={"shared": True}),
    "stochastic depth": Architecture("stochastic_depth"),
    "noisy": Architecture("noisy"),
    "bs23": Architecture("bs23"),
    "rk4": Architecture("rk4"),
    "RKCNN": Architecture("rkcnn"),
    "LM-ResNet": Architecture("lm"),
    "Adams-Bashforth 2": Architecture("ab2"),
    "PolyNet (poly-2)": Architecture("poly2"),
    "PolyNet (mpoly-2)": Architecture("mpoly2"),
    "PolyNet (2-way)": Architecture("two_way"),
    "FractalNet": Architecture(Fractal(columns=2)),
    "transformer (Lie-Trotter)": Architecture("lie_trotter"),
    "transformer (Strang)": Architecture("strang"),
    "implicit Euler": IMPLICIT(settings={"h": 0.25}),
    "deep equilibrium": IMPLICIT(settings={"h": 0.25, "blocks": 1}),
    "IMEX-Net": Architecture("imex"),
    "RevNet": Architecture("revnet"),
    "Hamiltonian": Architecture("hamiltonian"),
    "Hamiltonian (Verlet)": Architecture("hamiltonian_verlet"),
    "two-step midpoint": Architecture("two_step_midpoint"),
    "Momentum ResNet": Architecture("momentum"),
    "heavy ball": Architecture("heavy_ball"),
    "hyperbolic CNN": Architecture("second_order"),
    "parabolic CNN": Architecture("euler", "parabolic"),
}
"""By the names of the table."""

SIZES = (1.0, 8.0, 64.0)
"""Factors of the step size at which it is tried whether a training survives."""


PATHS = 10
"""Of a noisy network, whose mean output is what predicts."""


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What is trained and measured.

    Attributes:
        architectures: that are compared.
        budgets: what they have alike.
        parameters: of a network, at most, on the budget of parameters.
        blocks: of each of its flows there.
        evaluations: of a network, at most, on the budget of evaluations.
        channels: of the fields of its first flow there.
        flows: of a network; each has twice the channels of the one before.
        stride: of the convolution before the first.
        rates: learning rates of Adam; of several, that of each network on each budget is chosen on validation images,
            by trainings of a seed of their own.
        short_epochs: epochs of the trainings that ask for the largest step size.
        noise: deviation of the noise on test images, whose pixels lie in [0, 1].
        attack: size of a step against the label, by the sign of the gradient.
    """

    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    budgets: tuple[str, ...] = BUDGETS
    parameters: int = 6_000
    blocks: int = 2
    evaluations: int = 4
    channels: int = 8
    flows: int = 1
    stride: int = 1
    rates: tuple[float, ...] = (0.03,)
    short_epochs: int = 1
    noise: float = 0.2
    attack: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 3
    batch_size: int = 48
    output: Path = Path("runs/architectures")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, "architectures", ARCHITECTURES)
        check_among(self, "budgets", BUDGETS)
        check_at_least(self, 1, "blocks", "flows", "stride", "epochs", "short_epochs", "evaluations", "parameters")
        if not self.rates:
            raise ValueError("rates must hold at least one learning rate")


@dataclass(frozen=True)
class Job:
    """One network.

    Attributes:
        architecture: of the table.
        budget: what it has alike with the others; "step size" is that of parameters, for fewer epochs.
        rate: learning rate.
        seed: of weights and batches.
        size: factor of its step size.
        tuning: whether it serves the choice of a rate.
    """

    architecture: str
    budget: str
    rate: float
    seed: int
    size: float = 1.0
    tuning: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        words = "".join(c if c.isalnum() else "_" for c in self.architecture)
        return f"{words}_{self.budget}_lr{self.rate:g}_h{self.size:g}_seed{self.seed}"


def build(config: Config, job: Job, dataset: TensorData) -> Network:
    """The network of a job with its seed's weights: of the width or the depth that the budget allows."""
    channels, blocks = sizes_of(config, job.architecture, job.budget)
    torch.manual_seed(job.seed)
    shape = dataset.x.shape[1], dataset.classes
    network = _network(config, job.architecture, channels, blocks, *shape, normalize=images.normalize(dataset))
    if draw := ARCHITECTURES[job.architecture].draw:
        draw(network)
    for flow in network.flows:
        flow.resize([job.size * h for h in flow.h])
    return network


@cache
def sizes_of(config: Config, architecture: str, budget: str) -> tuple[int, int]:
    """Channels of the first state, and blocks of each flow, of a network on a budget.

    The widest network of the configured blocks, or the deepest of the configured width, that keeps to it; one block
    where none does.
    """

    def cost(channels: int, blocks: int) -> int:
        with torch.device("meta"):
            network = _network(config, architecture, channels, blocks, 1 + 2 * (config.dataset == "cifar10"), 10)
        return network.evaluations if budget == "evaluations" else sum(p.numel() for p in network.parameters())

    halves = isinstance(method_of(ARCHITECTURES[architecture].scheme), CoupledHalves)  # whose fields see one of them
    if budget == "evaluations":
        channels, depths = config.channels * (1 + halves), range(1, config.evaluations + 1)
        return channels, depths[bisect_right(depths, config.evaluations, 1, key=lambda n: cost(channels, n)) - 1]
    widths = range(4, 40 * config.channels, 1 + halves)
    return widths[bisect_right(widths, config.parameters, 1, key=lambda c: cost(c, config.blocks)) - 1], config.blocks


def _network(
    config: Config, name: str, channels: int, blocks: int, in_channels: int, classes: int, **more: Any
) -> Network:
    architecture, settings = ARCHITECTURES[name], {"blocks": blocks, **ARCHITECTURES[name].settings} | more
    return models.network(
        architecture.scheme, architecture.fields, in_channels, classes, stride=config.stride,
        channels=[channels * 2**i for i in range(config.flows)], **settings,
    )  # fmt: skip


def train(config: Config, job: Job, run: Run, report: Report) -> Row:
    """Train a network and measure it; of one that diverges only that is told."""
    parts = parts_of(config)
    network = build(config, job, parts.train)
    config = replace(config, epochs=epochs_of(config, job))
    batches = images.batches(parts.train, config.batch_size, job.seed)
    try:
        fit_network(config, network, batches, run, report, rate=job.rate, optimizer=torch.optim.Adam, loss_limit=1e3)
        recalibrate(network, parts.train.x.split(500))  # else norms that lag behind decide
    except (DivergedError, RuntimeError) as error:  # of which the latter may tell what a scheme cannot compute
        told = ("gradient would be wrong", "no equilibrium is found")
        if not isinstance(error, DivergedError) and not any(text in str(error) for text in told):
            raise
        report(config.epochs)
        return {"diverged": True, "validation": 0.0}
    network.eval()
    torch.manual_seed(job.seed)
    found: Row = {"diverged": False, "validation": accuracy(network, parts.validation)}
    return found if job.tuning or job.budget == "step size" else found | measure(config, network, parts.test)


def epochs_of(config: Config, job: Job) -> int:
    """Epochs that a job trains."""
    return config.short_epochs if job.budget == "step size" else config.epochs


def measure(config: Config, network: Network, test: TensorData) -> Row:
    """Cost, accuracy, robustness and path of a network on test images."""
    x, y = test.x[: config.batch_size], test.y[: config.batch_size]
    copied = copy.deepcopy(network).train()  # whose batch norms see these images, and the network's do not
    memory = measure_memory(partial(_task, copied, x, y), x.device).left
    with torch.no_grad():
        _, records = network.record(
            test.x, action=measures.action, norm=lambda step: step.x1.flatten(1).square().mean(1).sqrt()
        )
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "depth": network.depth,
        "evaluations": calls_of(network, x),
        "channels": next(iter(network.steps(x))).x0.shape[1],
        "memory": memory / len(x),
        "inverse": inverse_error(network, x),
        "test": accuracy(network, test),
        "noise": accuracy(network, test, lambda x, y: (x + config.noise * torch.randn_like(x)).clamp(0, 1)),
        "attack": accuracy(network, test, lambda x, y: _attacked(network, x, y, config.attack)),
        "action": records["action"].sum(0).mean().item(),
        "norms": records["norm"].mean(1).tolist(),
    }


@torch.no_grad()
def calls_of(network: Network, x: Tensor) -> int:
    """Field calls of a pass, those of the iterations of implicit steps among them."""
    calls: list[nn.Module] = []
    fields = {field for flow in network.flows for block in flow.blocks for field in block.fields}
    handles = [
        field.register_forward_hook(lambda field, *_: calls.append(field))
        for field in fields if isinstance(field, VelocityField)
    ]  # fmt: skip
    network(x)
    for handle in handles:
        handle.remove()
    return len(calls)


@torch.no_grad()
def inverse_error(network: Network, x: Tensor) -> float | None:
    """Largest error of the first states, over their size, computed back from the last ones; None where none are."""
    flow, state = network.flows[0], network.encode(x)
    if not isinstance(flow.tableau, ReversibleScheme):
        return None
    *_, last = flow.steps(state)
    memory = {"memory": last.residue} if flow.tableau.memory else {}
    return ((flow.inverse(last.x1, **memory) - state).abs().max() / state.abs().max()).item()


def accuracy(network: Network, part: TensorData, change: Any = None) -> float:
    """The share of images, perhaps changed, that a network is right on."""
    right, paths = 0, PATHS if isinstance(network.flows[0].tableau, Noisy) else 1
    for x, y in zip(part.x.split(500), part.y.split(500), strict=True):
        x = x if change is None else change(x, y)
        with torch.no_grad():
            right += int((mean_over_paths(network, x, paths=paths).argmax(1) == y).sum())
    return right / len(part)


def _attacked(network: Network, x: Tensor, y: Tensor, size: float) -> Tensor:
    """Images after a step against their labels, by the sign of the gradient (Goodfellow et al. 2015)."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), y, reduction="sum"), x)
    return (x.detach() + size * gradient.sign()).clamp(0, 1)


def _task(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(x), y)
