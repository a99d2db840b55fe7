"""Features of trajectories against [K24, eq. 34] written out."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import odenets
from odenets import Flow, Network, measures, models
from odenets.detection import Trajectory
from tests.odenets.detection.victims import Affine, refused

X = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def written_out(residues):
    """[K24, eq. 34]: first the mean squares of all blocks, then their cosines with the ones."""
    flat = [r.flatten(1) for r in residues]
    squares = [r.square().mean(1) for r in flat]
    cosines = [torch.cosine_similarity(r, torch.ones_like(r), dim=1) for r in flat]
    return torch.stack(squares + cosines, 1)


def test_features_of_known_residues():
    fields = iter([Affine(0.5, 0.1), Affine(-1.0, 0.3)])
    network = Network(nn.Identity(), Flow(lambda: next(fields), solver="euler", h=1.0, depth=2), nn.Flatten())
    first = 0.5 * X + 0.1
    second = -(X + first) + 0.3
    torch.testing.assert_close(Trajectory()(network, X), written_out([first, second]))


def test_features_of_a_runge_kutta_network_are_those_of_its_steps():
    network = models.small_network(solver="bs23", depth=3).eval()
    steps = list(network.steps(X))
    torch.testing.assert_close(Trajectory()(network, X), written_out([s.residue for s in steps]))
    for kind, measure in (("action", measures.action), ("error", measures.error)):
        torch.testing.assert_close(Trajectory(kind)(network, X), torch.stack([measure(s) for s in steps], 1))
    stages = Trajectory("stages")(network, X).reshape(5, 6, 3)
    for i in range(3):
        expected = written_out([s.stages[i] for s in steps]).reshape(5, 2, 3)
        torch.testing.assert_close(stages[:, [i, 3 + i]], expected)
    torch.testing.assert_close(Trajectory("embedding")(network, X), written_out([s.x1 for s in steps]))


@pytest.mark.parametrize("make", [models.resnet110, models.resnext50])
def test_features_of_the_networks_of_k24(make):
    network = make(classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = Trajectory()(network, x)
        torch.testing.assert_close(features, written_out([s.residue for s in network.steps(x)]), rtol=1e-4, atol=1e-6)
    assert features.shape == (2, {models.resnet110: 108, models.resnext50: 32}[make])
    assert len(Trajectory().names(network)) == features.shape[1]


def test_features_of_an_adapted_network():
    network = odenets.adapt(resnet18(num_classes=10).eval())
    x = torch.rand(2, 3, 32, 32)
    features = Trajectory()(network, x)
    assert features.shape == (2, 16)
    torch.testing.assert_close(features, written_out([s.x1 - s.x0 for s in network.steps(x)]), rtol=1e-4, atol=1e-5)
    assert Trajectory().names(network)[8] == "cosine 1"


def test_further_vectors_are_orthogonal_to_the_ones_and_to_each_other():
    network = models.small_network(solver="euler", h=1.0, depth=2).eval()
    features = Trajectory(vectors=3)(network, X)
    assert features.shape == (5, 10)
    (r, _) = (s.residue.flatten(1) for s in network.steps(X))
    d, k = r.shape[1], torch.arange(4.0)
    waves = torch.cos(torch.pi * k[:, None] * (torch.arange(d) + 0.5) / d)
    torch.testing.assert_close(waves @ waves.T, torch.diag(waves.square().sum(1)), atol=1e-2, rtol=1e-5)
    expected = torch.cosine_similarity(r[:, None], waves[None, 1:], dim=2)
    torch.testing.assert_close(features[:, 4::2], expected, atol=1e-5, rtol=1e-4)


def test_further_vectors_hold_in_half_precision():
    """Its sum of squares is beyond a half's largest number."""
    flow = Flow(lambda: Affine(0.5, 0.1), solver="euler", h=1.0, depth=1)
    x = 200 * torch.rand(2, 3, 8, 8)
    expected = Trajectory(vectors=1)(flow, x)
    torch.testing.assert_close(Trajectory(vectors=1)(flow, x.half()).float(), expected, rtol=1e-2, atol=1e-3)


def test_vectors_made_in_inference_serve_gradients():
    flow = Flow(lambda: Affine(0.5, 0.1), solver="euler", h=1.0, depth=1)
    x = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    with torch.inference_mode():
        Trajectory(vectors=1)(flow, x)
    x.requires_grad_()
    Trajectory(vectors=1)(flow, x).sum().backward()
    assert x.grad is not None


def test_output_and_features_come_from_one_pass():
    network = models.small_network(solver="bs23", depth=2).eval()
    calls = []
    network.head.register_forward_hook(lambda *_: calls.append(1))
    output, features = Trajectory().output_and_features(network, X)
    assert len(calls) == 1
    assert torch.equal(output, network(X))
    assert torch.equal(features, Trajectory()(network, X))


def test_gradients_pass_through_features():
    network = models.small_network(solver="bs23", depth=2).double().eval()
    x, features = X[:2].double().requires_grad_(), Trajectory("residue", "cosine", "error")
    assert torch.autograd.gradcheck(lambda x: features(network, x), x, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_are_taken_to_the_precision_of_an_adapted_network(dtype):
    network, x = odenets.adapt(resnet18(num_classes=10).eval()), torch.rand(3, 3, 32, 32)
    expected = Trajectory()(network, x)
    values = Trajectory()(network.to(dtype), x)
    assert torch.equal(values, Trajectory()(network, x.to(dtype)))
    torch.testing.assert_close(values.float(), expected, rtol=0.1, atol=0.05)


def test_bf16_images_are_taken_to_a_network_in_single_precision():
    network = models.small_network(solver="bs23", depth=2).eval()
    assert torch.equal(Trajectory()(network, X.bfloat16()), Trajectory()(network, X.bfloat16().float()))


class Turning(nn.Module):
    """An encoder with complex weights and real states."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, x):
        assert x.dtype == torch.float32
        return (self.weight * x).real


def test_inputs_of_a_network_with_complex_weights_stay_real():
    network = Network(Turning(), Flow(lambda: Affine(0.5, 0.1), solver="euler", h=1.0, depth=2), nn.Flatten())
    assert Trajectory()(network, X).shape == (5, 4)
    assert torch.equal(Trajectory()(network, X.double()), Trajectory()(network, X))


def test_errors():
    network = models.small_network(solver="euler", h=1.0, depth=2)
    refused("kinds must be among residue, cosine", Trajectory, "norm")
    refused("vectors must not be negative", Trajectory, vectors=-1)
    refused("'stages' where a block has one", Trajectory("stages"), network, X)
    refused("carries no embedded error", Trajectory("error"), network, X)
    refused(r"must record its steps, got Linear: pass odenets.adapt", Trajectory(), nn.Linear(2, 2), X, error=TypeError)
