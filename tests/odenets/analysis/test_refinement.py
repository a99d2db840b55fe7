import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField, Network, adapt, models
from odenets.analysis.refinement import iterative_refinement
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling


class DownTheLoss(nn.Module):
    """The velocity of a gradient flow of the loss, for labels that are all 0."""

    def __init__(self, head, rate):
        super().__init__()
        self.head, self.rate = [head], rate

    def forward(self, t, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(self.head[0](x), torch.zeros(len(x), dtype=torch.long), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
        return -self.rate * gradient


@pytest.mark.parametrize("rate", [1e-3, -1e-3])
def test_a_step_down_the_gradient_has_cosine_minus_one(rate):
    head = nn.Linear(3, 2)
    network = Network(nn.Identity(), Flow(DownTheLoss(head, rate), solver="euler", h=1.0), head)
    x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
    refinement = iterative_refinement(network, zip(x.split(5), y.split(5), strict=True))
    torch.testing.assert_close(refinement.cosine, torch.tensor([-1.0 if rate > 0 else 1.0]))
    (step,) = network.steps(x)
    expected = ((step.x1 - step.x0).norm(dim=1) / x.norm(dim=1)).mean()
    torch.testing.assert_close(refinement.ratio, expected.reshape(1))


@pytest.mark.parametrize("solver", ["euler", "bs23"])
def test_blocks_of_several_flows_are_those_of_finite_differences(solver):
    torch.manual_seed(0)
    net = models.resnet_km(2, 1, 1, 3, channels=4, solver=solver, total_time=1.0, norm="group").double().train()
    x, y = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.tensor([1])
    refinement = iterative_refinement(net, [(x, y)])
    assert net.training
    assert refinement.ratio.shape == refinement.cosine.shape == (2,)
    net.eval()
    last = list(net.steps(x))[-1]
    moved = (last.x1 - last.x0).detach()

    def loss(start):
        return F.cross_entropy(net.head(net.flows[1](start)), y)

    x0, eps = last.x0.detach(), 1e-6
    along = ((loss(x0 + eps * moved) - loss(x0 - eps * moved)) / (2 * eps)).item()
    gradient = torch.autograd.functional.jacobian(loss, x0)
    assert refinement.cosine[1].item() == pytest.approx(along / (gradient.norm() * moved.norm()).item(), rel=1e-4)


def test_inputs_are_taken_to_the_precision_of_the_network():
    net, x, y = models.points_network(depth=2), torch.rand(4, 2), torch.tensor([0, 1, 1, 0])
    single, double = iterative_refinement(net, [(x, y)]), iterative_refinement(net.double(), [(x, y)])
    torch.testing.assert_close(single.cosine, double.cosine.float())


def residual(field):
    return Calling(lambda m, x: x + m.field(0.0, x), field=field)


def test_an_adapted_model_is_measured_as_the_network_of_its_steps():
    fields, head = [MLPField(3), MLPField(3)], nn.Linear(3, 2)
    model = nn.Sequential(nn.Linear(2, 3), *map(residual, fields), nn.Dropout(), head)
    model[1].eval()
    network = Network(model[0], Flow(iter(fields).__next__, solver="euler", depth=2, h=1.0), head)
    batches = [(torch.randn(n, 2), torch.arange(n) % 2) for n in (5, 3)]
    expected = iterative_refinement(network, batches)
    adapted = adapt(model, blocks=["1", "2"])
    with unchanged(model), torch.inference_mode():
        measured = iterative_refinement(adapted, batches)
    torch.testing.assert_close(measured.ratio, expected.ratio)
    torch.testing.assert_close(measured.cosine, expected.cosine)
    assert all(p.grad is None for p in model.parameters())


def transformer(first, second, flat):
    """Two steps; between them the state may pass with its tokens in one row."""

    def forward(m, x):
        x = x + m.attn(0.0, m.norm1(x))
        between = x.flatten(1, -2) if flat else x
        return (between + m.mlp(0.0, m.norm2(between))).reshape(x.shape)

    return Calling(forward, norm1=nn.Identity(), attn=first, norm2=nn.Identity(), mlp=second)


@pytest.mark.parametrize("flat", [False, True])
def test_both_steps_of_a_transformer_block_have_a_gradient(flat):
    fields, head = [MLPField(3) for _ in range(4)], nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    blocks = [transformer(*fields[:2], flat), transformer(*fields[2:], flat)]
    network = Network(nn.Linear(2, 3), Flow(iter(fields).__next__, solver="euler", depth=4, h=1.0), head)
    batches = [(torch.randn(5, 2, 2, 2), torch.arange(5) % 2)]
    expected = iterative_refinement(network, batches)
    measured = iterative_refinement(adapt(nn.Sequential(network.encoder, nn.Sequential(*blocks), head)), batches)
    torch.testing.assert_close(measured.ratio, expected.ratio)
    torch.testing.assert_close(measured.cosine, expected.cosine)


def test_a_model_is_refused_whose_states_have_no_gradient():
    adds = Calling(lambda m, x: x.add_(torch.sin(1.0 + 0 * x)))
    adapted = adapt(nn.Sequential(nn.Linear(3, 3), adds), blocks=["1"])
    with pytest.raises(ValueError, match="block '1' has a state that is changed in place"):
        iterative_refinement(adapted, [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))])


def test_modes_are_restored_each_module_its_own_also_after_an_error():
    net = models.resnet_km(2, 1, 1, 3, channels=4, norm="group").train()
    net.head.eval()
    batches = [(torch.rand(1, channels, 8, 8), torch.tensor([0])) for channels in (1, 2)]
    with unchanged(net), pytest.raises(RuntimeError):
        iterative_refinement(net, batches)


def test_errors():
    with pytest.raises(TypeError, match=r"got Sequential: pass adapt\(network\)"):
        iterative_refinement(nn.Sequential(nn.Linear(3, 2)), [])
    tupled = adapt(Calling(lambda m, x: (m.layer(x), x), layer=nn.Linear(3, 3)), blocks=["layer"])
    with pytest.raises(TypeError, match="network must return logits, got tuple"):
        iterative_refinement(tupled, [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(ValueError, match="at least one batch"):
        iterative_refinement(models.points_network(), [])
    with pytest.raises(TypeError, match=r"batches must hold pairs \(inputs, labels\), got Tensor"):
        iterative_refinement(models.points_network(), torch.randn(3, 2))
    with pytest.raises(ValueError, match="readout 'ensemble'"):
        iterative_refinement(models.points_network(readout="ensemble"), [])
