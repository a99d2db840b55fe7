"""Correlations of gradients: closed forms of linear, gated and wide ReLU networks, which theory knows."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from odenets import Flow, MLPField, Network, NeuralODE, adapt, initialize, models, recalibrate
from odenets.analysis import shattered_gradients
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Velocity

WIDTH = 400


def test_the_gradient_of_a_linear_network_is_the_same_everywhere():
    flow = Flow(lambda: Velocity(lambda m, t, x: m.layer(x), layer=nn.Linear(6, 6)), solver="heun", depth=3)
    network = Network(nn.Linear(4, 6), flow, nn.Linear(6, 2))
    shattered = shattered_gradients(network, torch.randn(7, 4), output=1)
    assert shattered.places == ("input", "blocks.0", "blocks.1", "blocks.2")
    torch.testing.assert_close(shattered.correlation, torch.ones(4).double())
    torch.testing.assert_close(shattered.autocorrelation, torch.ones(4, 7).double())


def test_correlations_are_those_of_the_formula():
    """Of ``f = |x|^2 / 2``, whose gradient is x."""
    x = torch.randn(6, 3, dtype=torch.float64)
    shattered = shattered_gradients(Calling(lambda m, x: x.square().sum(1) / 2), x)
    for k in range(6):
        pairs = [(x[i], x[i + k]) for i in range(6 - k)]
        product = sum(a @ b for a, b in pairs)
        sizes = sum(a @ a for a, _ in pairs) * sum(b @ b for _, b in pairs)
        torch.testing.assert_close(shattered.autocorrelation[0, k], product / sizes.sqrt())
    mean = sum(x[i] @ x[j] for i in range(6) for j in range(6) if i != j) / 30
    torch.testing.assert_close(shattered.correlation[0], mean / (x.square().sum() / 6))


def gated(features, samples):
    """``W (g x)`` with gates that are open for half of the features, by chance and apart for each sample."""
    layer = nn.Linear(features, features, bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / features))
    gates = torch.randint(2, (samples, features)).float()
    return Velocity(lambda m, t, x: m.layer(gates * x), layer=layer)


def test_residual_gradients_decay_as_three_quarters_to_the_depth():
    """Theorem 2: at each block the variance doubles, and the covariance grows by 1 + 2 / 4."""
    torch.manual_seed(0)
    flow = Flow(lambda: gated(WIDTH, 24), solver="euler", h=1.0, depth=6)
    network = Network(nn.Identity(), flow, nn.Linear(WIDTH, 1))
    shattered = shattered_gradients(network, torch.randn(24, WIDTH))
    expected = 0.75 ** torch.arange(6, 0, -1).double()
    torch.testing.assert_close(shattered.correlation, expected, rtol=0.1, atol=0.02)
    torch.testing.assert_close(shattered.autocorrelation[:, 1], expected, rtol=0.15, atol=0.03)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_plain_gradients_decay_as_a_half_to_the_depth(depth):
    """Theorem 1: at each layer the variance stays, and the covariance becomes a half."""
    torch.manual_seed(0)
    layers = [gated(WIDTH, 24) for _ in range(depth)]
    network = nn.Sequential(
        *(Calling(lambda m, x: m.field(0.0, x), field=layer) for layer in layers), nn.Linear(WIDTH, 1)
    )
    shattered = shattered_gradients(network, torch.randn(24, WIDTH))
    assert shattered.places == ("input",)
    assert shattered.correlation.item() == pytest.approx(0.5**depth, rel=0.1, abs=0.01)


def of_gates(c):
    """Share of the features of which both of two Gaussians of that correlation are positive, times two."""
    return 1 - math.acos(c) / math.pi


def of_relus(c):
    """Correlation of their ReLUs, the mean of the products over that of the squares (Cho and Saul 2009)."""
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def relu_network(depth, residual):
    """``W relu(x)`` layer by layer, or added to the state."""

    def relu_layer():
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(layer.weight, std=math.sqrt(2 / WIDTH))
        return Velocity(lambda m, t, x: m.layer(x.relu()), layer=layer)

    fields, head = [relu_layer() for _ in range(depth)], nn.Linear(WIDTH, 1)
    if residual:
        return Network(nn.Identity(), Flow(iter(fields).__next__, solver="euler", h=1.0, depth=depth), head)
    return nn.Sequential(*(Calling(lambda m, x: m.field(0.0, x), field=field) for field in fields), head)


@pytest.mark.parametrize("residual", [False, True])
def test_wide_networks_of_relus_have_the_correlations_of_their_kernels(residual):
    """Inputs become more alike with the depth, so that more gates are open together than the theorems assume."""
    torch.manual_seed(0)
    depth, c = 4, 0.2
    x = math.sqrt(c) * torch.randn(WIDTH) + math.sqrt(1 - c) * torch.randn(12, WIDTH)
    drawn = [shattered_gradients(relu_network(depth, residual), x).correlation[0] for _ in range(6)]
    expected = 1.0
    for _ in range(depth):
        expected *= (1 + of_gates(c)) / 2 if residual else of_gates(c)
        c = (c + of_relus(c)) / 2 if residual else of_relus(c)
    assert torch.stack(drawn).mean().item() == pytest.approx(expected, rel=0.1)


def test_an_adapted_model_is_measured_as_the_network_of_its_steps():
    torch.manual_seed(0)
    network = models.points_network(depth=3, solver="euler")
    fields = [block.fields[0] for block in network.flows[0].blocks]
    blocks = [Calling(lambda m, x: x + m.field(0.0, x), field=field) for field in fields]
    adapted = adapt(nn.Sequential(nn.Flatten(), *blocks, network.head), blocks=["1", "2", "3"])
    x = torch.randn(8, 2)
    theirs, ours = shattered_gradients(adapted, x), shattered_gradients(network, x)
    torch.testing.assert_close(theirs.correlation[-3:], ours.correlation)
    assert theirs.places[-3:] == ("1", "2", "3")


def plain_network(depth, width=32):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), *layers, nn.Linear(width, 10))


def test_on_a_line_between_digits_plain_gradients_shatter_and_residual_ones_do_not():
    torch.manual_seed(0)
    x, _ = load_digits(return_X_y=True)
    first, last = torch.tensor(x[:2] / 16).float() * 4 - 2
    line = first + torch.linspace(-1, 2, 64)[:, None] * (last - first)
    plain, network = plain_network(24), models.points_network(64, 10, hidden=32, depth=24, total_time=1.0)
    recalibrate(network, [line])
    alike = []
    for one in (initialize(plain, "kaiming"), network):
        with unchanged(one):
            alike.append(shattered_gradients(one, line).correlation[0].item())
    assert alike[1] > 0.9
    assert alike[0] < alike[1] - 0.1


def test_the_network_is_left_as_it_was():
    network, x = models.resnet9(features=4, size=8, depth=2).train(), torch.rand(5, 1, 8, 8)
    with unchanged(network), torch.inference_mode():
        shattered = shattered_gradients(network, x)
    assert shattered.correlation.shape == (3,)
    assert all(p.grad is None for p in network.parameters())
    double = shattered_gradients(copy.deepcopy(network).double(), x)
    torch.testing.assert_close(double.correlation, shattered.correlation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: shattered_gradients(torch.relu, torch.randn(3, 2)), TypeError, "must be a module, got builtin"),
        (lambda: shattered_gradients(nn.Linear(2, 1), torch.arange(4)), TypeError, "floating tensor.*got torch.int64"),
        (lambda: shattered_gradients(nn.Linear(2, 1), torch.randn(1, 2)), ValueError, r"at least two.*got \(1, 2\)"),
        (
            lambda: shattered_gradients(nn.Linear(2, 1), torch.randn(4, 2), output=1),
            ValueError, "output must be below the number of outputs, 1, got 1",
        ),
        (
            lambda: shattered_gradients(nn.LSTM(2, 2), torch.randn(4, 2)),
            TypeError, "a tensor of one row for each input, got tuple",
        ),
        (
            lambda: shattered_gradients(
                Calling(lambda m, x: m.layer(torch.ones(4, 2)), layer=nn.Linear(2, 1)), torch.randn(4, 2)),
            ValueError, "output 0 must depend on the state at 'input'",
        ),
        (
            lambda: shattered_gradients(NeuralODE(MLPField(2), control="sample"), torch.randn(4, 2)),
            ValueError, "steps are those of the batch",
        ),
    ],
)  # fmt: skip
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()
