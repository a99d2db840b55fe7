import copy
import dataclasses
import math
import pickle

import pytest
import torch

from odenets import models
from odenets.training import data, datasets
from odenets.training.evaluation import evaluate

DIGITS, MOONS = datasets.load("digits")[0], datasets.load("moons")[0]


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("digits", (1, 8, 8), 10), ("circles", (2,), 2), ("moons", (2,), 2)]
)
def test_sets_of_scikit_learn(name, shape, classes):
    train, test = datasets.load(name)
    assert train.x.shape[1:] == shape
    assert train.classes == classes
    again, _ = datasets.load(name)
    assert torch.equal(train.x, again.x)
    if name == "digits":
        assert (len(train), len(test)) == (1437, 360)
        assert train.x.mean().item() == pytest.approx(train.mean[0], abs=2e-3)
        assert train.x.std().item() == pytest.approx(train.std[0], abs=2e-3)


def test_split_is_stratified_and_disjoint():
    train, test = datasets.load("digits")
    tagged = data.TensorData("tagged", torch.arange(len(train)).float()[:, None], train.y, 10, (0.0,), (1.0,))
    parts = datasets.split(tagged, test, validation=0.2, size=500, seed=3)
    ids = [set(part.x[:, 0].tolist()) for part in (parts.train, parts.validation)]
    assert len(ids[0]) == 400
    assert not ids[0] & ids[1]
    counts = parts.train.y.bincount()
    assert counts.max() - counts.min() <= 3
    other = datasets.split(tagged, test, validation=0.2, size=500, seed=4)
    assert set(other.train.x[:, 0].tolist()) != ids[0]


def test_batches_depend_on_seed_and_epoch_alone():
    train, _ = datasets.load("digits")
    batches = data.Batches(train, 100, seed=1, crop=1, flip=True)
    first = list(batches.epoch(2))
    torch.randn(7)
    for (a, _), (b, _) in zip(first, batches.epoch(2), strict=True):
        assert torch.equal(a, b)
    assert len(first) == len(batches) == 15
    assert not torch.equal(first[0][0], next(batches.epoch(3))[0])
    assert sum(len(y) for _, y in first) == len(train)


@pytest.mark.parametrize("options", [{}, {"crop": 1}, {"flip": True}])
def test_a_loop_draws_one_epoch_after_the_other(options):
    train, _ = datasets.load("digits")
    batches = data.Batches(train.subset(torch.arange(60)), 20, seed=1, **options)
    for epoch in range(3):
        for (a, b), (c, d) in zip(batches, batches.epoch(epoch), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert not torch.equal(next(batches.epoch(0))[0], next(batches.epoch(1))[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda batches: pickle.loads(pickle.dumps(batches))])
def test_what_is_not_a_loop_over_the_batches_takes_no_epoch_from_it(copied):
    train, _ = datasets.load("moons")
    batches = data.Batches(train, 100, seed=0)
    net = models.points_network()
    before = evaluate(net, batches)
    for draw in (batches.epoch(4), batches.inputs(), batches.in_order()):
        list(draw)
    next(iter(batches))
    twin = copied(batches)
    for own in (batches, twin):  # a copy goes on from where it is taken, by itself
        assert torch.equal(next(iter(own))[1], next(batches.epoch(1))[1])
    assert evaluate(net, batches) == before
    assert torch.equal(next(iter(dataclasses.replace(batches)))[1], next(batches.epoch(0))[1])


def test_without_a_seed_every_epoch_is_in_order():
    train, _ = datasets.load("moons")
    batches = data.Batches(train, 300)
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in batches]), train.x)
        assert torch.equal(torch.cat([y for _, y in batches]), train.y)


def test_order_has_neither_shuffle_nor_augmentation():
    train, _ = datasets.load("digits")
    x, y = map(torch.cat, zip(*data.Batches(train, 100, seed=0, crop=2, flip=True).in_order(), strict=True))
    assert torch.equal(x, train.x)
    assert torch.equal(y, train.y)


def test_a_class_too_small_for_a_part_is_told():
    y = torch.tensor([0] * 50 + [1] * 2)
    rare = data.TensorData("rare", torch.zeros(52, 1), y, 2, (0.0,), (1.0,))
    with pytest.warns(UserWarning, match=r"the part of 3 samples holds none of class\(es\) \[1\]"):
        datasets.hold_out(rare, 3)


def test_augmentation_moves_pixels_and_keeps_them():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(500, -1, -1, -1) + 1
    set_ = data.TensorData("ramp", x, torch.zeros(500, dtype=torch.long), 1, (0.0,), (1.0,))
    (seen, _), *_ = data.Batches(set_, 500, seed=0, crop=1).epoch(0)
    padded = torch.nn.functional.pad(x[0, 0], (1, 1, 1, 1))
    windows = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(image.flatten().tolist()) for image in seen} == windows
    (seen, _), *_ = data.Batches(set_, 500, seed=0, flip=True).epoch(0)
    assert {tuple(i.flatten().tolist()) for i in seen} == {
        tuple(x[0].flatten().tolist()),
        tuple(x[0].flip(2).flatten().tolist()),
    }


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: datasets.load("digit"), ValueError, "unknown data set 'digit'; known are digits, circles"),
        (
            lambda: datasets.load("mnist", "/no/such/folder"),
            FileNotFoundError,
            "folder '/no/such/folder' does not exist",
        ),
        (lambda: datasets.load("digits", "/tmp"), ValueError, "folder is for torchvision's sets"),
        (lambda: datasets.split(*datasets.load("moons"), validation=1.0), ValueError, "validation must be a fraction"),
        (lambda: datasets.split(*datasets.load("moons"), size=10**6), ValueError, "size must be in"),
        (lambda: data.Batches(MOONS, 0), ValueError, "size must be at least 1"),
        (
            lambda: data.Batches(DIGITS, 9, crop=1),
            ValueError,
            "crop and flip must be drawn by a seed",
        ),
        (lambda: data.Batches(DIGITS, 9, 0, crop=-1), ValueError, "crop not be negative"),
        (
            lambda: data.Batches(MOONS, 9, 0, crop=1),
            ValueError,
            r"for images .* of shape \(800, 2\)",
        ),
        (lambda: data.Batches(MOONS, 9, 0, flip=True), ValueError, "crop and flip are for images"),
        (
            lambda: datasets.hold_out(MOONS, 1.0),
            ValueError,
            r"part must be a fraction in \(0, 1\) or",
        ),
        (lambda: datasets.hold_out(MOONS, 0), ValueError, "got 0"),
        (
            lambda: datasets.hold_out(MOONS, 800),
            ValueError,
            "a number of samples below 800, got 800",
        ),
        (
            lambda: datasets.hold_out(DIGITS, 9),
            ValueError,
            "as many samples as there are classes, 10",
        ),
        (
            lambda: datasets.hold_out(MOONS.subset(torch.arange(1)), 0.5),
            ValueError,
            "each class two",
        ),
        (
            lambda: datasets.subsample(MOONS, 0.5),
            TypeError,
            "size must be a number of samples, got 0.5",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold mnist as torchvision stores it"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.tensor([[math.nan]]), torch.tensor([0]), ValueError, "x must be finite"),
        (torch.ones(1, 1), torch.tensor([3]), ValueError, r"y must lie in \[0, 2\)"),
        (torch.ones(2, 1), torch.tensor([0]), ValueError, "x and y must be of one length"),
        (torch.ones(2, 1), torch.tensor([[0], [1]]), ValueError, r"y must have shape \(N,\), got \(2, 1\)"),
        (torch.ones(1, 1, dtype=torch.int), torch.tensor([0]), TypeError, "x must be floating"),
    ],
)
def test_contents_are_checked(x, y, error, message):
    with pytest.raises(error, match=message):
        data.TensorData("mine", x, y, 2, (0.0,), (1.0,))
