import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

import odenets
from odenets import models
from odenets.detection import Separation, Trajectory
from odenets.detection.features.separation import smoothed
from tests.odenets.detection.victims import refused

X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**options):
    torch.manual_seed(0)
    return models.small_network(**({"solver": "bs23", "depth": 2} | options)).eval()


def test_smoothing_is_that_of_scipy():
    x = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), 0.6, radius=1, axes=(2, 3), mode="reflect")
    np.testing.assert_allclose(smoothed(x, 0.6), expected, rtol=1e-12)


@torch.no_grad()
def test_features_are_those_of_the_two_paths():
    net, y = network().double(), smoothed(X.double(), 0.6)
    ours = Separation()(net, X.double())
    columns = [Trajectory()(net, X.double())]
    pairs = [*zip(net.steps(X.double()), net.steps(y), strict=True)]
    states = [(a.x1.flatten(1), b.x1.flatten(1)) for a, b in pairs]
    residues = [(a.residue.flatten(1), b.residue.flatten(1)) for a, b in pairs]
    means = [[s.x1.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(1) for s in pair] for pair in pairs]
    columns.append(torch.stack([(a - b).norm(dim=1) / a.norm(dim=1) for a, b in states], 1))
    columns.append(torch.stack([(a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1) for a, b in residues], 1))
    columns.append(torch.stack([(b.square().mean(1) / a.square().mean(1)).log() for a, b in residues], 1))
    columns.append(torch.stack([(a - b).norm(dim=1) / a.norm(dim=1) for a, b in means], 1))
    torch.testing.assert_close(ours, torch.cat(columns, 1))
    torch.testing.assert_close(Separation(alone=True)(net, X.double()), torch.cat(columns[1:], 1))


def test_logits_are_those_of_the_images():
    net = network()
    logits, features = Separation().output_and_features(net, X)
    torch.testing.assert_close(logits, net(X))
    assert torch.equal(features, Separation()(net, X))
    assert len(Separation().names(net)) == features.shape[1]


def test_a_flat_image_and_its_copy_take_the_same_path():
    distance, turn, growth, means = Separation(alone=True)(network(depth=1), torch.full((1, 1, 8, 8), 0.5))[0]
    assert max(distance, means) < 1e-5
    assert (turn - 1).abs() < 1e-5
    assert growth.abs() < 1e-5


def test_states_need_no_width_and_no_height():
    net = odenets.Network(nn.Flatten(), odenets.Flow(depth=2), nn.Linear(64, 3))
    net(X)
    assert Separation()(net, X).shape == (5, 12)


def test_bad_input():
    refused("width must be positive, got 0", Separation, width=0)
    refused("pass odenets.adapt", Separation(), nn.Flatten(), X, error=TypeError)
    refused(r"pixels in \[0, 1\]", Separation(), network(), X + 1)
