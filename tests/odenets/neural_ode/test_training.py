"""Neural ODEs learn: a spiral from short irregular windows, and spirals of either direction by a latent ODE."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from odenets import MLPField, NeuralODE
from solvers import Tolerance


class Cubic(nn.Module):
    """A perceptron of the cubes of the coordinates (Chen et al. 2018, torchdiffeq's ode_demo)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t, x):
        return self.net(x**3)


@pytest.fixture(scope="module")
def spiral():
    """Times of one solution, ``(1000,)``, and its states, ``(1000, 2)``."""
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    times = torch.linspace(0.0, 25.0, 1000)
    return times, NeuralODE(lambda t, x: x**3 @ matrix)(torch.tensor([[2.0, 0.0]]), at=times)[:, 0]


def windows(samples):
    """Where some windows begin, ``(B,)``, and five later places within the next ten, ``(B, 5)``."""
    starts = torch.randint(0, 990, (samples,))
    return starts, starts[:, None] + torch.rand(samples, 10).argsort(1)[:, :5].sort(1).values


def same_places(starts, later):
    """Windows that all have the places of the first one."""
    return starts, starts[:, None] + later[0] - starts[0]


def distance(ode, spiral, starts, later):
    """Of the states at these places from those of the spiral, a mean; with one step size the places are the first's."""
    times, states = spiral
    if ode.control == "sample":
        return (ode(states[starts], at=times[later] - times[starts, None]) - states[later]).abs().mean()
    starts, later = same_places(starts, later)
    ends = ode(states[starts], at=times[later[0]] - times[starts[0]])
    return (ends.transpose(0, 1) - states[later]).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("control", "gradient"),
    [("batch", "direct"), ("batch", "checkpoint"), ("batch", "backsolve"), ("sample", "direct")],
)
def test_the_spiral_is_learned_from_short_irregular_windows(spiral, control, gradient):
    steps = 300
    torch.manual_seed(0)
    ode = NeuralODE(Cubic(), solver="bs23", control=control, gradient=gradient)
    optimizer = torch.optim.Adam(ode.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times, states = spiral
    others = windows(200)

    def errors():
        with torch.no_grad():
            return distance(ode, spiral, *others), (ode(states[:1], at=times)[:, 0] - states).abs().mean()

    before = errors()
    for _ in range(steps):
        loss = distance(ode, spiral, *windows(20))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    after = errors()
    assert after[0] < before[0] / 3
    assert after[1] < before[1] / 1.5


def test_each_gradient_mode_trains_to_the_same_weights(spiral):
    spiral = tuple(part.double() for part in spiral)
    gradients, weights = [], []  # of each mode
    for mode in ({}, {"gradient": "checkpoint"}, {"gradient": "backsolve"}, {"control": "sample"}):
        torch.manual_seed(0)
        ode = NeuralODE(Cubic().double(), tolerance=Tolerance(1e-8, 1e-8), **mode)
        optimizer, row = torch.optim.SGD(ode.parameters(), 0.05), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = distance(ode, spiral, *same_places(*windows(20)))
            loss.backward()
            optimizer.step()
            row += [p.grad.clone() for p in ode.parameters()]
        gradients.append(row)
        weights.append([*ode.parameters()])
    for rows in (gradients, weights):
        for others in rows[1:]:
            for one, other in zip(rows[0], others, strict=True):
                assert_close(one, other, rtol=1e-5, atol=1e-7)


class Series(NamedTuple):
    """Observations: times and noisy points, filled up with each sample's last one, how many there are, true points."""

    times: Tensor  # (B, n)
    points: Tensor  # (B, n, 2)
    counts: Tensor  # (B,)
    truth: Tensor  # (B, n, 2)

    @property
    def there(self) -> Tensor:
        """Which are no repetitions, ``(B, n)``."""
        return torch.arange(self.times.shape[1]) < self.counts[:, None]


def series(samples, most=12, noise=0.1):
    """Spirals that turn to the left or to the right, seen at 6 to ``most`` times of their own within [0, 3]."""
    counts = torch.randint(6, most + 1, (samples,))
    times = 3 * torch.rand(samples, most)
    places = torch.arange(most).expand(samples, most)
    times = torch.where(places < counts[:, None], times, torch.inf).sort(1).values
    times = times.gather(1, torch.minimum(places, counts[:, None] - 1))
    direction = torch.where(torch.rand(samples, 1) < 0.5, 1.0, -1.0)
    angle, radius = direction * 2 * times + torch.rand(samples, 1), 0.5 + 0.5 * times
    truth = radius[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
    points = truth + noise * torch.randn_like(truth)
    last = torch.minimum(places, counts[:, None] - 1)[..., None].expand(-1, -1, 2)
    return Series(times, points.gather(1, last), counts, truth)


class LatentODE(nn.Module):
    """A variational autoencoder of series (Chen et al. 2018, section 5; Rubanova et al. 2019)."""

    def __init__(self, features=4):
        super().__init__()
        self.encoder = nn.GRU(3, 24, batch_first=True)
        self.posterior = nn.Linear(24, 2 * features)
        self.ode = NeuralODE(MLPField(features, 24, activation="tanh"), solver="bs23", control="sample")
        self.decoder = nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, 2))

    def encode(self, data):
        """Mean and logarithm of the variance at time 0, by a pass from the last observation to the first."""
        inputs = torch.cat([data.points, data.times[..., None]], -1)
        places = (data.counts[:, None] - 1 - torch.arange(inputs.shape[1])).clamp(min=0)
        inputs = inputs.gather(1, places[..., None].expand(-1, -1, 3))
        packed = pack_padded_sequence(inputs, data.counts, batch_first=True, enforce_sorted=False)
        return self.posterior(self.encoder(packed)[1][0]).chunk(2, -1)

    def forward(self, z, times):
        """Points at times of each sample, ``(B, n, 2)``."""
        return self.decoder(self.ode(z, at=times))

    def losses(self, data, noise, weight=1.0, deviation=0.3):
        """The negative evidence lower bound of each sample, ``(B,)``."""
        mean, log_variance = self.encode(data)
        points = self(mean + noise * (0.5 * log_variance).exp(), data.times)
        errors = (((points - data.points) / deviation) ** 2).sum(-1) / 2
        divergence = (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2
        return (errors * data.there).sum(1) + weight * divergence


def test_a_latent_ode_treats_each_series_as_if_it_were_alone():
    """Whatever their times and their number: those alone are not filled up."""
    model, data, noise = LatentODE().double(), Series(*(p.double() for p in series(6))), torch.randn(6, 4).double()
    data = data._replace(counts=data.counts.long())
    losses = model.losses(data, noise)
    gradients = torch.autograd.grad(losses.sum(), [*model.parameters()])
    alone = []
    for i, count in enumerate(data.counts):
        one = Series(*(p[i : i + 1, :count] for p in data[:2]), data.counts[i : i + 1], data.truth[i : i + 1, :count])
        alone.append(model.losses(one, noise[i : i + 1])[0])
    assert_close(torch.stack(alone), losses)
    for one, other in zip(torch.autograd.grad(sum(alone), [*model.parameters()]), gradients, strict=True):
        assert_close(one, other)


@pytest.mark.slow
def test_a_latent_ode_learns_spirals_of_both_directions():
    """Their points without the noise, from one latent state at time 0."""
    torch.manual_seed(0)
    model, steps = LatentODE(), 500
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for i in range(steps):
        data = series(50)
        loss = model.losses(data, torch.randn(50, 4), weight=min(1.0, i / 200)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    data = series(200)
    with torch.no_grad():
        points = model(model.encode(data)[0], data.times)
    there = data.there[..., None]
    error = ((points - data.truth) ** 2 * there).sum() / there.sum()
    variance = (data.truth**2 * there).sum() / there.sum()
    assert error < variance / 10
