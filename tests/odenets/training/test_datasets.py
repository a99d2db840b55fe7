import pytest
import torch

from odenets.training.data import TensorData
from odenets.training.datasets import hold_out, load, split, subsample

DIGITS, MOONS = load("digits")[0], load("moons")[0]


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("digits", (1, 8, 8), 10), ("circles", (2,), 2), ("moons", (2,), 2)]
)
def test_sets_of_scikit_learn(name, shape, classes):
    train, test = load(name)
    assert train.x.shape[1:] == shape
    assert train.classes == classes
    again, _ = load(name)
    assert torch.equal(train.x, again.x)
    if name == "digits":
        assert (len(train), len(test)) == (1437, 360)
        assert train.x.mean().item() == pytest.approx(train.mean[0], abs=2e-3)
        assert train.x.std().item() == pytest.approx(train.std[0], abs=2e-3)


def test_split_is_stratified_and_disjoint():
    train, test = load("digits")
    tagged = TensorData(torch.arange(len(train)).float()[:, None], train.y)
    parts = split(tagged, test, validation=0.2, size=500, seed=3)
    ids = [set(part.x[:, 0].tolist()) for part in (parts.train, parts.validation)]
    assert len(ids[0]) == 400
    assert not ids[0] & ids[1]
    counts = parts.train.y.bincount()
    assert counts.max() - counts.min() <= 3
    other = split(tagged, test, validation=0.2, size=500, seed=4)
    assert set(other.train.x[:, 0].tolist()) != ids[0]


def test_a_class_too_small_for_a_part_is_told():
    y = torch.tensor([0] * 50 + [1] * 2)
    rare = TensorData(torch.zeros(52, 1), y)
    with pytest.warns(UserWarning, match=r"the part of 3 samples holds none of class\(es\) \[1\]"):
        hold_out(rare, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load("digit"), ValueError, "unknown data set 'digit'; known are digits, circles"),
        (lambda: load("mnist", "/no/such/folder"), FileNotFoundError, "folder '/no/such/folder' does not exist"),
        (lambda: load("digits", "/tmp"), ValueError, "folder is for torchvision's sets"),
        (lambda: split(MOONS, MOONS, validation=1.0), ValueError, "validation must be a fraction"),
        (lambda: split(MOONS, MOONS, size=10**6), ValueError, "size must be in"),
        (lambda: hold_out(MOONS, 1.0), ValueError, r"part must be a fraction in \(0, 1\) or"),
        (lambda: hold_out(MOONS, 0), ValueError, "got 0"),
        (lambda: hold_out(MOONS, 800), ValueError, "a number of samples below 800, got 800"),
        (lambda: hold_out(DIGITS, 9), ValueError, "as many samples as there are classes, 10"),
        (lambda: hold_out(MOONS.subset(torch.arange(1)), 0.5), ValueError, "each class two"),
        (lambda: subsample(MOONS, 0.5), TypeError, "size must be a number of samples, got 0.5"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold mnist as torchvision stores it"):
        load("mnist", tmp_path)
