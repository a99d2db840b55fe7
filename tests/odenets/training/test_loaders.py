"""Trainings on DataLoaders and other iterables: what a loop of one's own makes, and what a kill leaves."""

import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import odenets
from odenets import Flow, MLPField, Network
from odenets.errors import DivergedError
from odenets.least_action import LeastAction
from odenets.training import Batches, CrossEntropy, Run, Task, evaluate, fit
from tests.odenets.checks import assert_same
from tests.odenets.training.small import IMAGES, TENS, TWENTY, sgd, tiny

DATASET = TensorDataset(TWENTY.x, TWENTY.y)


class Noisy(Dataset):
    """Images with noise of every global generator."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return TWENTY.x[i] + noise, int(TWENTY.y[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATASET)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def in_loop(network, loader, epochs, draw=iter):
    """A loop of one's own."""
    optimizer = sgd(network.parameters())
    for _ in range(epochs):
        for x, y in draw(loader):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATASET, 6, shuffle=True, generator=seeded()),
        lambda: DataLoader(DATASET, 6, shuffle=True),
        lambda: DataLoader(DATASET, 6, shuffle=True, drop_last=True, num_workers=2),
        lambda: DataLoader(Noisy(), 6, shuffle=True, num_workers=2),
        lambda: DataLoader(Noisy(), 6, shuffle=True),
        lambda: DataLoader(DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET), 7, False)),
        lambda: DataLoader(DATASET, 6, sampler=WeightedRandomSampler(torch.arange(1.0, 21), 15)),
        lambda: DataLoader(Stream(), 6),
        lambda: [(TWENTY.x[:9], TWENTY.y[:9]), [TWENTY.x[9:], TWENTY.y[9:]]],
    ],
    ids=["seeded", "shuffled", "workers", "noisy workers", "noisy", "batches", "weighted", "stream", "list"],
)
def test_a_training_is_the_loop_of_ones_own(make):
    one, two = tiny(), tiny()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    in_loop(one, make(), 2)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    training = fit(two, make(), epochs=2, optimizer=sgd)
    assert_same(one, two)
    assert training.evaluations == 2 * sum(len(y) for _, y in make()) * two.evaluations


def test_dictionaries_with_a_collate_and_a_generator_for_one_epoch():
    def stream():
        yield from ({"image": x, "label": y} for x, y in TENS.epoch(0))

    def pair(batch):
        return batch["image"], batch["label"]

    one, two = tiny(), tiny()
    fit(one, TENS, epochs=1, optimizer=sgd)
    fit(two, stream(), epochs=1, optimizer=sgd, collate=pair, validation=[*stream()])
    assert_same(one, two)
    found, expected = evaluate(one, stream(), collate=pair), evaluate(one, TENS)
    assert (found.metric, found.loss) == pytest.approx((expected.metric, expected.loss))
    with pytest.raises(ValueError, match=r"batches is an iterator \(generator\), which gives one epoch, got epochs=2"):
        fit(tiny(), stream(), epochs=2, optimizer=sgd, collate=pair)


def test_a_lazy_network_is_made_from_a_batch_of_its_first_epoch():
    """As if it had been made beforehand: no random number and no sample is lost."""

    def make():
        torch.manual_seed(2)
        return Network(nn.Flatten(), Flow(depth=1), nn.Linear(64, 10))

    def data():
        return DataLoader(Noisy(), 6, shuffle=True)

    one, two, three = make(), make(), make()
    state = torch.get_rng_state()
    for net, made in ((one, False), (two, True)):
        random.seed(5), np.random.seed(5)  # noqa: NPY002
        torch.set_rng_state(state)
        if made:
            net(IMAGES[:2])
            torch.set_rng_state(state)
        fit(net, data(), epochs=2, optimizer=sgd)
    assert_same(one, two)
    fit(three, iter([(TWENTY.x, TWENTY.y)]), epochs=1, optimizer=sgd)
    assert len(list(three.parameters())) == len(list(one.parameters()))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), 6, shuffle=True, generator=seeded(), num_workers=2),
        lambda: DataLoader(Noisy(), 6, shuffle=True),
        lambda: DataLoader(DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET, generator=seeded()), 7, False)),
        lambda: DataLoader(DATASET, 6, sampler=DistributedSampler(DATASET, num_replicas=1, rank=0), num_workers=2),
        lambda: DataLoader(DATASET, 6, True, num_workers=2, persistent_workers=True, generator=seeded()),
        lambda: DataLoader(DATASET, 6, True, num_workers=2, persistent_workers=True),
    ],
    ids=["workers", "global generators", "sampler's generator", "epoch's sampler", "persistent", "persistent, global"],
)
def test_a_resumed_training_sees_the_batches_of_one_that_never_stopped(tmp_path, make, lazy):
    def net():
        if not lazy:
            return tiny()
        torch.manual_seed(0)
        return Network(nn.Flatten(), Flow(depth=1), nn.Linear(64, 10))

    whole, resumed = net(), net()
    validation = DataLoader(DATASET, 7, shuffle=True)

    def seed(value):
        torch.manual_seed(value), random.seed(value), np.random.seed(value)  # noqa: NPY002

    seed(1)
    fit(whole, make(), epochs=4, optimizer=sgd, validation=validation)
    run, begun = Run(tmp_path / "run", {}), net()
    seed(1)
    fit(begun, make(), epochs=2, optimizer=sgd, validation=validation, run=run)
    seed(7)
    fit(resumed, make(), epochs=4, optimizer=sgd, validation=validation, run=run)
    assert_same(whole, resumed)


def test_an_epoch_that_is_trained_again_sees_the_same_batches():
    """Where it has diverged: the seeded sampler goes back too."""
    seen, broken = [], [True]

    class Seeing(CrossEntropy):
        def loss(self, network, batch, output, records):
            seen.append(batch[1].tolist())
            return super().loss(network, batch, output, records) * (float("nan") if len(seen) == 6 else 1)

    class Again:
        recovers = True

        def on_divergence(self, training):
            return broken.pop()

    loader = DataLoader(DATASET, 5, shuffle=True, generator=seeded())
    fit(tiny(), loader, epochs=2, optimizer=sgd, objective=Seeing(), callbacks=[Again()])
    assert seen[4:6] == seen[6:8]
    assert len(seen) == 10
    with pytest.raises(DivergedError):
        fit(tiny(), loader, epochs=1, optimizer=sgd, loss_limit=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_any_batch_and_resumed_ends_with_the_same_weights(tmp_path, workers):
    script = Path(__file__).with_name("train_killed.py")
    drawn = random.Random(workers)
    batches = drawn.randrange(1, 5), drawn.randrange(5, 9), drawn.randrange(1, 9)  # after each begin
    command = [sys.executable, script, tmp_path, str(workers), *map(str, batches)]
    done = subprocess.run(command, capture_output=True, timeout=1200, text=True)
    assert done.stdout.split() == ["0", "-9", "-9", "-9", "0"], done.stderr
    assert (tmp_path / "killed" / "weights.txt").read_text() == (tmp_path / "whole" / "weights.txt").read_text()


def test_an_adapted_model_of_torchvision_trains_on_a_loader_with_workers():
    dataset = TensorDataset(torch.rand(48, 3, 32, 32), torch.arange(48) % 10)
    training = fit(
        odenets.adapt(torchvision.models.resnet18(num_classes=10)),
        DataLoader(dataset, 16, shuffle=True, num_workers=2),
        epochs=1,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        objective=LeastAction(),
    )
    assert training.rows[0]["depth"] == 8
    assert training.objective.multiplier > 1  # type: ignore[operator]


def test_a_regression_has_its_loss_and_no_accuracy():
    x = torch.linspace(-1, 1, 40)[:, None]
    data = TensorDataset(x, x.square())

    def mae(output, y):
        return (output - y).abs().mean()

    def network():
        torch.manual_seed(0)
        return Network(nn.Linear(1, 4), Flow(partial(MLPField, 4, 8), depth=2), nn.Linear(4, 1))

    net = network()
    loader = DataLoader(data, 8, shuffle=True, generator=seeded())
    adam = partial(torch.optim.Adam, lr=0.01)
    training = fit(net, loader, epochs=2, optimizer=adam, objective=Task(F.mse_loss), metric=mae, validation=loader)
    row = training.rows[-1]
    with torch.no_grad():
        assert row["validation_loss"] == pytest.approx(F.mse_loss(net(x), x.square()).item(), rel=1e-5)
        assert row["validation_mae"] == pytest.approx(mae(net(x), x.square()).item(), rel=1e-5)
    assert row["train_mae"] > 0
    measured = evaluate(net, loader, objective=Task(F.mse_loss), metric=mae)
    assert (measured.loss, measured.metric, measured.name) == (row["validation_loss"], row["validation_mae"], "mae")
    with pytest.raises(AttributeError, match="evaluation has the metric 'mae', not the accuracy"):
        _ = measured.accuracy
    plain = fit(network(), loader, epochs=1, optimizer=adam, objective=LeastAction(Task(F.mse_loss)), validation=loader)
    assert {"train_loss", "validation_loss"} <= set(plain.rows[0])
    assert not any("accuracy" in name for name in plain.rows[0])


def test_float64_samples_train_a_float32_network():
    data = [(IMAGES.double(), torch.rand(20, 10, dtype=torch.float64).softmax(1))]
    assert fit(tiny(), data, epochs=1, optimizer=sgd).rows[0]["train_loss"] > 0


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_scheduler_takes_a_step_each_epoch_or_each_step(tmp_path, interval):
    """Its state is in the checkpoint."""
    rates = []

    class Seeing(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    options = {"optimizer": partial(Seeing, lr=1.0), "lr_scheduler": halving, "lr_interval": interval}
    run, data = Run(tmp_path / "run", {}), [(TWENTY.x[:10] / 1e3, TWENTY.y[:10])] * 2
    fit(tiny(), data, epochs=1, **options, run=run)
    fit(tiny(), data, epochs=2, **options, run=run)
    assert rates == ([1, 1, 0.5, 0.5] if interval == "epoch" else [1, 0.5, 0.25, 0.125])


def test_a_plateau_is_one_of_the_validation_loss_or_of_the_training_loss(tmp_path):
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.9)
    still = partial(torch.optim.SGD, lr=1e-6)
    for validation in (None, TENS):
        run = Run(tmp_path / str(validation is None), {})
        options = {"optimizer": still, "lr_scheduler": plateau, "validation": validation}
        whole = fit(tiny(), TENS, epochs=4, **options)
        fit(tiny(), TENS, epochs=2, **options, run=run)
        resumed = fit(tiny(), TENS, epochs=4, **options, run=run)
        assert [row["learning_rate"] for row in whole.rows] == [row["learning_rate"] for row in resumed.rows]
        assert whole.rows[-1]["learning_rate"] < 1e-7
        loss = "train_loss" if validation is None else "validation_loss"
        assert resumed.lr_scheduler.best == whole.rows[0][loss]  # type: ignore[union-attr]


def test_batches_of_a_subclass_keep_their_epoch_and_its_state(tmp_path):
    class Brighter(Batches):
        def __init__(self, data, size, factor):
            super().__init__(data, size, seed=0)
            object.__setattr__(self, "factor", factor)

        def epoch(self, epoch):
            return ((self.factor * x, y) for x, y in super().epoch(epoch))

    one, two = tiny(), tiny()
    in_loop(one, Brighter(TWENTY, 10, 3.0), 2)
    fit(two, Brighter(TWENTY, 10, 3.0), epochs=2, optimizer=sgd)
    assert_same(one, two)


def test_a_learning_rate_in_a_tensor_is_that_of_its_epoch():
    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    adam = partial(torch.optim.Adam, lr=torch.tensor(0.125), foreach=False)
    rows = fit(tiny(), TENS, epochs=3, optimizer=adam, lr_scheduler=halving).rows
    assert [row["learning_rate"] for row in rows] == [0.125, 0.0625, 0.03125]
