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
    refused("batch_size be at least 1, got 5 and 0", in_batches, network, network, X, 0)
    refused("batch_size be at least 1, got 0 and 1", in_batches, network, network, X[:0], 1)


def test_images_are_checked():
    x = torch.ones(2, 1, 8, 8)
    refused(r"pixels in \[0, 1\], got \[1.5, 1.5\]: normalize inside", check_images, 1.5 * x)
    refused(r"got \[255, 255\].*divide what is in \[0, 255\] by 255", check_images, 255 * x)
    refused("finite", check_images, torch.nan * x)
    refused("batch", check_images, x[0, 0])
    refused("floating", check_images, x.long(), error=TypeError)
    refused(r"got torch\.uint8: divide bytes by 255", check_images, x.byte(), error=TypeError)


class StepLengths(Features):
    """A kind of one's own: how far the state moves in each block."""

    def __call__(self, network, x):
        _, records = network.record(x, length=lambda step: (step.x1 - step.x0).flatten(1).norm(dim=1))
        return records["length"].T


def test_features_of_a_users_own_class_serve_a_detector():
    torch.manual_seed(0)
    network = models.small_network(solver="bs23", depth=3).eval()
    clean, odd = 0.3 * torch.rand(60, 1, 8, 8), torch.rand(60, 1, 8, 8)
    features = StepLengths().fit(network, clean, torch.zeros(60))
    pipeline = Pipeline(network, features, Detector(random_state=0)).fit(clean[:40], odd[:40])
    assert pipeline.evaluate(clean[40:], odd[40:]).auroc > 0.9


def test_a_kind_of_features_says_what_it_lacks():
    class Nothing(Features):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define __call__"):
        Nothing()(nn.Identity(), torch.rand(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"Looking.look is never called: its name is output_and_features"):

        class Looking(Features):
            def look(self, network, x):
                return x
