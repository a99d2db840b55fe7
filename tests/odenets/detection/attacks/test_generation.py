"""Adversarial images of a network."""

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.detection import PRESETS, Attacked, preset, run_attack
from tests.odenets.detection.victims import SHORT, refused, same, victim


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.03, 0.2])
def test_fgm_is_one_step_along_the_sign_of_the_gradient(batch, eps, dtype):
    x, y = batch
    network = copy.deepcopy(victim()).to(dtype)
    moving = x.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(moving), y, reduction="sum"), moving)
    result = run_attack(network, preset("FGM", eps=eps), x, y, batch_size=5)
    clear = gradient.abs() > 1e-5 * gradient.abs().max()
    torch.testing.assert_close(result.images[clear], (x + eps * gradient.sign().float()).clamp(0, 1)[clear])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(PRESETS, [torch.float32, torch.bfloat16]),
        *itertools.product(["FGM", "APGD", "DF", "BA"], [torch.float64, torch.float16]),
    ],
)
def test_every_preset_attacks_networks_of_any_precision_in_float32(batch, name, dtype):
    x, y = batch[0][:4], batch[1][:4]
    network = copy.deepcopy(victim()).to(dtype)
    result = run_attack(network, preset(name, **SHORT[name]), x.to(dtype), y.int(), batch_size=4)
    assert result.images.dtype == result.l2.dtype == torch.float32
    assert result.images.shape == x.shape
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert torch.equal(result.predicted, network.eval()(result.images.to(dtype)).argmax(1))
    assert torch.equal(result.clean, network(x.to(dtype)).argmax(1))
    assert {p.dtype for p in network.parameters()} == {dtype}
    moved = (result.images - x.to(dtype).float()).flatten(1)
    torch.testing.assert_close(result.linf, moved.abs().max(1).values)
    torch.testing.assert_close(result.l2, moved.square().sum(1).sqrt())
    if name in ("FGM", "BIM", "APGD", "AA"):
        assert result.linf.max() <= 0.03 + 1e-6
    elif name != "DF" or dtype.itemsize > 2:  # it stops at a boundary that half precision blurs
        assert result.success_rate > 0.5


def test_only_a_right_prediction_that_became_wrong_is_a_success():
    y = torch.tensor([0, 0, 0, 0])
    clean, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    result = Attacked(torch.zeros(4, 1, 8, 8), y, clean, predicted, torch.zeros(4), torch.arange(4.0))
    assert result.success.tolist() == [False, True, False, False]
    assert result.success_rate == 0.5
    fooled = result.subset(result.success)
    assert (len(fooled), fooled.l2.tolist(), fooled.success_rate) == (1, [1.0], 1.0)
    assert np.isnan(result.subset(torch.tensor([2, 3])).success_rate)


def test_autoattack_leaves_misclassified_images_and_they_are_no_success(batch):
    x, y = batch
    wrong = (y + 1) % 10
    labels = torch.where(torch.arange(len(y)) < 6, wrong, y)
    result = run_attack(victim(), preset("AA", eps=0.2, **SHORT["AA"]), x, labels, batch_size=12)
    assert torch.equal(result.images[:6], x[:6])
    assert not result.success[:6].any()
    assert (result.predicted != labels)[:6].all()
    right = result.clean == labels
    assert not right[:6].any()
    assert result.success_rate == pytest.approx(result.success[right].double().mean().item())
    assert result.success_rate > 0.5


def test_draws_follow_the_seed(batch):
    attack, x, y = preset("HSJ", **SHORT["HSJ"]), batch[0][:3], batch[1][:3]
    one, other = (run_attack(victim(), attack, x, y, seed=seed).images for seed in (0, 1))
    assert not torch.equal(one, other)


def test_networks_of_two_classes_are_attacked(batch):
    x, _ = batch
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    result = run_attack(network, preset("FGM", eps=0.5), x, network(x).argmax(1))
    assert result.success_rate > 0.5


def test_images_and_labels_are_checked(batch):
    x, attack = batch[0][:2], partial(run_attack, victim(), "FGM")
    refused(r"images must have pixels in \[0, 1\], got \[1.5, 1.5\]", attack, 0 * x + 1.5, torch.tensor([0, 1]))
    refused(r"labels must lie in \[0, classes\).*got 10.*\(1, 10\)", attack, x, torch.tensor([0, 10]))
    refused("labels must not be negative, got -1", attack, x, torch.tensor([0, -1]))
    refused(r"one entry for each of 2 images, got shape \(1,\)", attack, x, torch.tensor([0]))
    refused("labels must be an int64 tensor, got torch.float32", attack, x, torch.zeros(2), error=TypeError)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integers_serve(batch, dtype):
    result = run_attack(victim(), "FGM", batch[0], batch[1].to(dtype))
    assert result.labels.dtype == torch.int64
    assert same(result, run_attack(victim(), "FGM", *batch))


class Noisy(nn.Module):
    """Another answer in every pass."""

    def __init__(self):
        super().__init__()
        self.network = victim()

    def forward(self, x):
        return self.network(x + 0.3 * torch.randn_like(x))


def test_success_against_a_network_that_draws_is_told_to_be_of_one_draw(batch):
    with pytest.warns(UserWarning, match="network seems to draw random numbers in eval mode, .* of one draw"):
        run_attack(Noisy(), "FGM", *batch)


class Rounded(nn.Module):
    """Sees pixels at two levels."""

    def __init__(self):
        super().__init__()
        self.network = victim()

    def forward(self, x):
        return self.network(x.round())


@pytest.mark.parametrize("name", ["FGM", "BIM"])
def test_images_that_an_attack_leaves_as_they_are_are_told(batch, name, tmp_path):
    x, y = batch
    y, attack = victim()(x.round()).argmax(1), preset(name, eps=0.1, **SHORT[name])
    for _ in range(2):  # the second time from the disk
        with pytest.warns(UserWarning, match=rf"{name} leaves 12 of 12 images as they are.*gradient is 0"):
            run_attack(Rounded(), attack, x, y, cache=tmp_path)
    run_attack(Rounded(), preset(name, eps=0.0), x, y)
