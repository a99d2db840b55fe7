"""A network under attack: restored, in any precision, and checked."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Network
from odenets.detection import PRESETS, preset, run_attack
from odenets.detection.isolation import frozen
from tests.odenets.detection.victims import SHORT, digits, refused, same, unchanged, victim


def partly_trained() -> Network:
    """With modes, gradients and parameters without them that differ from part to part."""
    x, y = digits()[1].x[:12], digits()[1].y[:12]
    network = copy.deepcopy(victim()).train()
    network.head.eval()
    network.head[1].weight.requires_grad_(False)
    F.cross_entropy(network(x), y).backward()
    return network


def test_frozen_restores_each_module_also_after_an_exception():
    network = partly_trained()

    def draw_and_die():
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
        raise KeyboardInterrupt(torch.rand(3))

    with unchanged(network), pytest.raises(KeyboardInterrupt), frozen(network):
        draw_and_die()


class Drawing(nn.Module):
    """Draws in eval mode too."""

    def __init__(self):
        super().__init__()
        self.network = partly_trained()

    def forward(self, x):
        return self.network(x + 1e-3 * torch.rand_like(x) * np.random.rand() * random.random())  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:network seems to draw random numbers")
@pytest.mark.parametrize("make", [partly_trained, Drawing])
@pytest.mark.parametrize("name", ["FGM", "CW", "HSJ"])
def test_an_attack_leaves_no_trace(batch, name, make):
    network, images = make(), batch[0].clone()
    with unchanged(network):
        run_attack(network, preset(name, **SHORT[name]), *batch)
    assert torch.equal(batch[0], images)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, torch.inference_mode) for name in PRESETS), ("FGM", torch.no_grad), ("APGD", torch.no_grad)],
)
def test_the_mode_of_the_caller_does_not_matter(batch, name, mode):
    x, y = batch[0][:2], batch[1][:2]
    expected = run_attack(victim(), preset(name, **SHORT[name]), x, y)
    with mode():
        result = run_attack(victim(), preset(name, **SHORT[name]), x.clone(), y.clone())
        assert not torch.is_grad_enabled()
    assert same(result, expected)


def test_a_network_made_in_inference_mode_is_attacked(batch):
    with torch.inference_mode():
        network = copy.deepcopy(victim())
        assert all(p.is_inference() for p in network.parameters())
        result = run_attack(network, "FGM", *batch)
    assert same(result, run_attack(victim(), "FGM", *batch))


@pytest.mark.parametrize("gain", [1.0, 60.0])
def test_gradients_below_half_precision_reach_the_pixels(gain):
    """Confident predictions have gradients below 6e-8, a half's least number."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).half()
    with torch.no_grad():
        network[3].weight.mul_(gain)
    x = 0.2 + 0.6 * torch.rand(40, 1, 4, 4)
    wide = copy.deepcopy(network).double()
    y = wide(x.half().double()).argmax(1)
    moving = x.half().double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(wide(moving), y, reduction="sum"), moving)
    moved = run_attack(network, preset("FGM", eps=0.1), x, y).images - x
    clear = gradient.abs() > 1e-2 * gradient.abs().amax((1, 2, 3), keepdim=True)
    assert (gradient.abs().amax((1, 2, 3)) / 40 < 6e-8).any() == (gain > 1)
    assert (moved.sign() == gradient.sign())[clear & (gradient != 0)].double().mean() > 0.98


class Wrapped(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.network, self.how = victim(), how

    def forward(self, x):
        return self.how(self.network(x))


@pytest.mark.parametrize("name", ["FGM", "HSJ"])
@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        (lambda z: (z, None), TypeError, "got a tuple: wrap it in a module that returns the logits alone"),
        (lambda z: [z], TypeError, "got a list"),
        (lambda z: {"scores": z}, TypeError, "got a dict"),
        (lambda z: None, TypeError, "got a NoneType"),
        (lambda z: z.argmax(1), TypeError, "got a tensor of torch.int64"),
        (lambda z: z[:, 0], ValueError, r"got shape \(1,\) for 1 inputs"),
        (lambda z: z[:, :1], ValueError, r"with at least 2 classes, got shape \(1, 1\)"),
        (lambda z: z[:, :, None, None], ValueError, r"got shape \(1, 10, 1, 1\)"),
        (lambda z: z.repeat(2, 1), ValueError, r"got shape \(2, 10\) for 1 inputs"),
    ],
)
def test_what_a_network_must_return_is_named(batch, name, how, error, match):
    match = "network must return logits, one floating tensor .*" + match
    refused(match, run_attack, Wrapped(how), preset(name, **SHORT[name]), *batch, error=error)


def test_probabilities_are_no_logits_for_gradients(batch):
    x, y = batch[0][:2], batch[1][:2]
    with pytest.warns(UserWarning, match="network seems to return probabilities, .*FGM.*leave the softmax out"):
        run_attack(Wrapped(lambda z: z.softmax(1)), "FGM", x, y)
    run_attack(Wrapped(lambda z: z.softmax(1)), preset("HSJ", **SHORT["HSJ"]), x, y)  # by predictions alone
    run_attack(Wrapped(lambda z: z.log_softmax(1)), "FGM", x, y)


def test_logits_and_gradients_that_are_not_finite_are_no_attack(batch):
    refused("network must return finite logits, got NaN", run_attack, Wrapped(lambda z: z * torch.nan), "FGM", *batch)
    root = Wrapped(lambda z: z + 0 * (z - z.detach()).abs().sqrt())  # its gradient is 0 * infinity
    for name in ("FGM", "DF"):
        attack, match = preset(name, **SHORT[name]), "network must have finite gradients to be attacked, got NaN"
        refused(match, run_attack, root, attack, *batch)


@pytest.mark.parametrize("name", ["FGM", "DF", "CW"])
def test_a_network_without_gradients_is_attacked_by_predictions_alone(batch, name):
    x, y = batch[0][:2], batch[1][:2]
    network, match = Wrapped(torch.Tensor.detach), 'pass gradients from its logits to the images.*"HSJ" or "BA"'
    refused(f"network must {match}", run_attack, network, preset(name, **SHORT[name]), x, y)
    run_attack(network, preset("BA", **SHORT["BA"]), x, y)
