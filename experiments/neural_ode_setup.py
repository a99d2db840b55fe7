"""What the neural-ODE experiment trains: configuration, and the networks that torchdiffeq and this package solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torchdiffeq
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from lab import images
from lab.config import check_among, check_any, check_at_least
from lab.training import TrainingConfig
from odenets import Network
from odenets.fields import ConvField
from odenets.measures import StepFunction
from odenets.neural_ode import NeuralODE
from odenets.recording import Records
from odenets.training.data import TensorData
from solvers import Statistics, Step, Tolerance

Way = Literal["odeint bosh3", "odeint dopri5", "adjoint bosh3", "adjoint dopri5", "flow bs23", "flow dopri5"]


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What is trained.

    Attributes:
        ways: who solves the flow, by which method.
        rtol, atol: of every solve.
        weight: of the mean action in the objective that has it.
        total_time: the flow runs over ``[0, total_time]``.
        features: channels of the state.
        time: whether the field reads t.
        probes: batches on which a trained network is measured.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    ways: tuple[Way, ...] = ("odeint bosh3", "odeint dopri5", "adjoint dopri5", "flow bs23", "flow dopri5")
    rtol: float = 1e-3
    atol: float = 1e-6
    weight: float = 0.1
    total_time: float = 1.0
    features: int = 16
    time: bool = True
    epochs: int = 3
    learning_rate: float = 0.05
    probes: int = 5
    output: Path = Path("runs/neural_ode")

    def __post_init__(self) -> None:
        super().__post_init__()
        Tolerance(self.rtol, self.atol)
        for name in ("features", "epochs", "batch_size", "probes"):
            check_at_least(self, 1, name)
        check_any(self, "ways")
        check_among(self, "ways", get_args(Way))
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class Job:
    """One training."""

    way: Way
    action: bool
    seed: int

    @property
    def name(self) -> str:
        """Of the job's folder."""
        return f"{self.way.replace(' ', '-')}{'-action' * self.action}-seed{self.seed}"


class WithAction(nn.Module):
    """Velocity of the state ``(x, z)``, ``dz/dt = <v^2>``: z is the action of each sample, ``(B,)``."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Velocities of x and z."""
        v = self.field(t, state[0])
        return v, v.square().flatten(1).mean(1)


class TorchdiffeqODE(NeuralODE):
    """A neural ODE that torchdiffeq solves, or its adjoint; it knows the action, as an extra state."""

    def __init__(self, field: nn.Module, *, solver: str, adjoint: bool, tolerance: Tolerance, **options: Any) -> None:
        super().__init__(field, solver=solver, tolerance=tolerance, **options)
        solve: Callable[..., Any] = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.odeint = partial(solve, method=solver, rtol=tolerance.rtol, atol=tolerance.atol)

    def forward(self, x: Tensor, /, *args: Any, at: Any = None, **unknown: Any) -> Tensor:
        return self.record(x)[0]

    def steps(self, *_: Any, **__: Any) -> Iterator[Step]:
        raise NotImplementedError("torchdiffeq does not show its steps")

    def record(self, x: Tensor, /, *args: Any, check: bool = True, **measures: StepFunction) -> tuple[Tensor, Records]:
        if set(measures) - {"action"}:
            raise ValueError(f"torchdiffeq gives the solution and the action, not {sorted(measures)}")
        field, times = cast(nn.Module, self.field), x.new_tensor([self.t0, self.t1])
        self.statistics = Statistics()
        counting = field.register_forward_hook(self._count)
        try:
            if not measures:
                return self.odeint(field, x, times)[-1], Records({})
            states, action = self.odeint(WithAction(field), (x, x.new_zeros(len(x))), times)
            return states[-1], Records({"action": action[-1:]})
        finally:
            counting.remove()

    def _count(self, *_: object) -> None:
        self.statistics.evaluations += 1


def build(config: Config, dataset: TensorData, way: Way, seed: int) -> Network:
    """The classifier with the seed's weights, whoever solves its flow."""
    torch.manual_seed(seed)
    channels, size = dataset.x.shape[1], dataset.x.shape[-1]
    stride = max(2, size // 8)
    encoder = nn.Sequential(
        images.normalize(dataset),
        nn.Conv2d(channels, config.features, stride + 2, stride=stride, padding=(stride + 1) // 2, bias=False),
    )
    field = ConvField(config.features, activation="silu", time=config.time)
    cells = encoder(dataset.x[:1]).numel()
    head = nn.Sequential(Rearrange("b c h w -> b (c h w)"), nn.Linear(cells, dataset.classes))
    who, solver = way.split()
    options: dict[str, Any] = {"solver": solver, "t1": config.total_time}
    options["tolerance"] = Tolerance(config.rtol, config.atol)
    ode = NeuralODE(field, **options) if who == "flow" else TorchdiffeqODE(field, adjoint=who == "adjoint", **options)
    return Network(encoder, ode, head)
