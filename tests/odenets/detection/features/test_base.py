"""Features of many images, and images that are checked."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from odenets import Flow, Network, models
from odenets.detection import Detector, Features, Pipeline, Trajectory, check_images, in_batches
from tests.odenets.detection.victims import refused, unchanged

X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_in_batches_is_the_whole_in_eval_mode():
    network = models.resnet9(1, 10, features=8, size=8, depth=2).train()
    features = in_batches(lambda x: Trajectory()(network, x), network, X, 2)
    torch.testing.assert_close(features, Trajectory()(network.eval(), X).detach())


class Noisy(nn.Module):
    """A field that draws in eval mode."""

    def forward(self, t, x):
        return torch.rand_like(x) * np.random.rand() * random.random()  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_in_batches_leaves_modes_and_random_states_also_after_an_exception(fails):
    network = Network(nn.Identity(), Flow(Noisy, solver="euler", h=1.0, depth=1), nn.Flatten()).train()
    network(X)
    network.head.eval()

    def call(part):
        values = Trajectory()(network, part)
        return values @ torch.zeros(7, 7) if fails else values

    with unchanged(network), pytest.raises(RuntimeError) if fails else nullcontext():
        assert in_batches(call, network, X, 2).shape == (5, 2)


def test_in_batches_needs_inputs_and_a_batch_size():
    network = models.small_network(depth=1)
    for x, batch_size in ((X, 0), (X[:0], 1)):
        refused(f"batch_size be at least 1, got {len(x)} and {batch_size}", in_batches, network, network, x, batch_size)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 8, 8), 1.5), r"pixels in \[0, 1\], got \[1.5, 1.5\]: normalize inside"),
        (torch.full((2, 1, 8, 8), torch.nan), "finite"),
        (torch.rand(8, 8), "batch"),
        (torch.ones(2, 1, 8, 8, dtype=torch.long), "floating"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"got torch\.uint8: divide bytes by 255"),
        (torch.full((2, 1, 8, 8), 255.0), r"got \[255, 255\].*divide what is in \[0, 255\] by 255"),
    ],
)
def test_images_are_checked(images, message):
    refused(message, check_images, images, error=(TypeError, ValueError))


class StepLengths(Features):
    """A kind of one's own: how far the state moves in each block, in deviations over training images."""

    def __init__(self):
        self.mean, self.std = torch.zeros(1), torch.ones(1)

    def fit(self, network, x, y):
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        lengths = in_batches(lambda part: self(network, part), network, x)
        self.mean, self.std = lengths.mean(0), lengths.std(0)
        return self

    def __call__(self, network, x):
        _, records = network.record(x, length=lambda step: (step.x1 - step.x0).flatten(1).norm(dim=1))
        return (records["length"].T - self.mean) / self.std


def test_features_of_a_users_own_class_serve_a_detector():
    torch.manual_seed(0)
    network = models.small_network(solver="bs23", depth=3).eval()
    clean, odd = 0.3 * torch.rand(60, 1, 8, 8), torch.rand(60, 1, 8, 8)
    features = StepLengths().fit(network, clean[:20], torch.zeros(20))
    torch.testing.assert_close(in_batches(lambda x: features(network, x), network, clean[:20]).mean(0), torch.zeros(3))
    pipeline = Pipeline(network, features, Detector(random_state=0)).fit(clean[:40], odd[:40])
    assert pipeline.evaluate(clean[40:], odd[40:]).auroc > 0.9
