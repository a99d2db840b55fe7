import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch.utils.data import TensorDataset

from odenets import models
from odenets.training.data import Batches, Split, TensorData
from odenets.training.datasets import hold_out, load
from odenets.training.evaluation import evaluate

DIGITS, MOONS = load("digits")[0], load("moons")[0]


def test_batches_depend_on_seed_and_epoch_alone():
    batches = Batches(DIGITS, 100, seed=1, crop=1, flip=True)
    first = list(batches.epoch(2))
    torch.randn(7)
    for (a, _), (b, _) in zip(first, batches.epoch(2), strict=True):
        assert torch.equal(a, b)
    assert len(first) == len(batches) == 15
    assert not torch.equal(first[0][0], next(batches.epoch(3))[0])
    assert sum(len(y) for _, y in first) == len(DIGITS)


@pytest.mark.parametrize("options", [{}, {"crop": 1}, {"flip": True}])
def test_a_loop_draws_one_epoch_after_the_other(options):
    batches = Batches(DIGITS.subset(torch.arange(60)), 20, seed=1, **options)
    for epoch in range(3):
        for (a, b), (c, d) in zip(batches, batches.epoch(epoch), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert not torch.equal(next(batches.epoch(0))[0], next(batches.epoch(1))[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda batches: pickle.loads(pickle.dumps(batches))])
def test_what_is_not_a_loop_over_the_batches_takes_no_epoch_from_it(copied):
    batches = Batches(MOONS, 100, seed=0)
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
    batches = Batches(MOONS, 300)
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in batches]), MOONS.x)
        assert torch.equal(torch.cat([y for _, y in batches]), MOONS.y)


def test_order_has_neither_shuffle_nor_augmentation():
    x, y = map(torch.cat, zip(*Batches(DIGITS, 100, seed=0, crop=2, flip=True).in_order(), strict=True))
    assert torch.equal(x, DIGITS.x)
    assert torch.equal(y, DIGITS.y)


def test_augmentation_moves_pixels_and_keeps_them():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).expand(500, -1, -1, -1) + 1
    set_ = TensorData(x, torch.zeros(500))
    (seen, _), *_ = Batches(set_, 500, seed=0, crop=1).epoch(0)
    padded = torch.nn.functional.pad(x[0, 0], (1, 1, 1, 1))
    windows = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(image.flatten().tolist()) for image in seen} == windows
    (seen, _), *_ = Batches(set_, 500, seed=0, flip=True).epoch(0)
    assert {tuple(i.flatten().tolist()) for i in seen} == {
        tuple(x[0].flatten().tolist()),
        tuple(x[0].flip(2).flatten().tolist()),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(MOONS, 0), "size must be at least 1"),
        (lambda: Batches(DIGITS, 9, crop=1), "crop and flip must be drawn by a seed"),
        (lambda: Batches(DIGITS, 9, 0, crop=-1), "crop must not be negative"),
        (lambda: Batches(MOONS, 9, 0, crop=1), r"for images .* of shape \(800, 2\)"),
        (lambda: Batches(MOONS, 9, 0, flip=True), "crop and flip are for images"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
        TensorData(x, y, "mine", 2)


def test_pairs_of_tensors_are_data_of_any_targets():
    x, y = torch.rand(7, 3), torch.rand(7, 2)
    for data in ((x, y), [x, y], TensorData(x, y), TensorDataset(x, y)):
        batches = Batches(data, 4)
        assert [len(part) for part, _ in batches.epoch(0)] == [4, 3]
        assert torch.equal(torch.cat([part for _, part in batches.epoch(0)]), y)
    kept = TensorData(x, torch.arange(7), "mine", 7).subset(torch.tensor([5])).to("cpu")
    assert (kept.name, kept.classes, kept.y.tolist()) == ("mine", 7, [5])
    assert TensorData(x, y).classes is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(MOONS.x, MOONS.y, 16), r"got Tensor: Batches\(\(x, y\), size\)"),
        (lambda: Batches(MOONS, MOONS.y), r"size must be a whole number of samples, got a tensor"),
        (lambda: Batches(MOONS, 2.0), "size must be a whole number of samples, got 2.0"),
        (lambda: Batches(TensorDataset(MOONS.x), 16), "got a TensorDataset of 1: a DataLoader takes"),
        (lambda: Batches((MOONS.x, MOONS.x, MOONS.y), 16), "got tuple of 3: a DataLoader takes"),
        (lambda: Batches((MOONS.x.numpy(), MOONS.y), 16), "x must be a tensor, got ndarray"),
        (lambda: TensorData("mine", MOONS.x, MOONS.y), r"name must be a string, got Tensor: TensorData\(x, y"),
        (lambda: TensorData(MOONS.x, MOONS.y.int(), classes=2), "y must be int64 labels of 2 classes, got torch.int32"),
        (lambda: hold_out(TensorData(MOONS.x, MOONS.x), 0.5), r"y must be labels \(N,\), int64 and not negative"),
    ],
)
def test_data_of_another_kind_is_named_with_the_remedy(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_data_show_shapes_and_not_their_numbers():
    data = TensorData(torch.rand(300, 3, 8, 8), torch.arange(300) % 7, name="crops", classes=7)
    text = "TensorData(x=float32 (300, 3, 8, 8), y=int64 (300,), name='crops', classes=7, mean=(), std=())"
    assert repr(data) == text
    assert repr(Batches(data, 50)) == f"Batches(data={text}, size=50, seed=None, crop=0, flip=False)"
    assert len(repr(Split(data, data, data))) < 400
