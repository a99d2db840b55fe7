"""What a backward pass reads is what the forward pass read, in every way that calls the field again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from solvers import Tolerance, integrate, odeint, odeint_adjoint
from tests.solvers.gradients.ways import (
    SOLVES,
    TIGHT,
    X0,
    D,
    Held,
    Net,
    by,
    close,
    directly,
    every,
    gradients,
    solving_backwards,
)


class Unregistered(nn.Module):
    """A list of modules, a plain tensor, and a tensor computed from a parameter before the solve."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.nets, self.encoder = [nn.Linear(2, 2, dtype=D)], nn.Linear(2, 2, dtype=D)
        self.scale = torch.full((2,), 0.5, dtype=D, requires_grad=True)
        self.context = self.encoder(torch.ones(2, dtype=D)).exp()

    def forward(self, t, x):
        return torch.tanh(self.nets[0](x)) * self.scale + self.context


@every
@pytest.mark.parametrize("replaced", [False, True])
def test_whatever_a_module_reads_gets_its_gradient(way, replaced):
    def tensors(net):
        return [net.scale, net.nets[0].weight, *net.encoder.parameters()]

    def change(net):
        if replaced:
            net.context, net.scale = torch.zeros(2, dtype=D), torch.zeros(2, dtype=D)

    expected = gradients(Unregistered, lambda net: directly(net, X0), tensors=tensors)
    close(gradients(Unregistered, lambda net: SOLVES[way](net, X0), change, tensors), expected)


@solving_backwards
def test_a_tensor_computed_outside_that_would_lose_its_gradient_is_refused(way):
    context = torch.ones(2, dtype=D, requires_grad=True).exp()

    class Closed(nn.Module):
        def forward(self, t, x):
            return x * context

    with pytest.raises(ValueError, match=r"reads a tensor computed outside of it .*would be lost: hand over"):
        SOLVES[way](Closed(), X0)


class Normed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer(nn.Linear(2, 2, dtype=D))

    def forward(self, t, x):
        return torch.tanh(self.layer(x))


PARAMETRIZATIONS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm, hook": nn.utils.weight_norm,
}


@every
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights(way, name):
    make = lambda: Normed(PARAMETRIZATIONS[name]).eval()  # noqa: E731
    expected = gradients(make, lambda net: directly(net, X0))
    close(gradients(make, lambda net: SOLVES[way](net, X0), lambda net: net.train()), expected)


@every
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_field_that_changes_with_each_call_is_refused(way, norm):
    net = Normed(partial(norm, n_power_iterations=1)).train()
    with pytest.raises(ValueError, match=r"changes at every call, by a buffer.*eval mode, or use"):
        SOLVES[way](net, X0)


@every
def test_cached_parametrizations_give_the_gradient_or_are_refused(way):
    net = Normed(nn.utils.parametrizations.weight_norm)
    with nn.utils.parametrize.cached():
        if way.startswith("checkpoint"):
            with pytest.raises(RuntimeError, match=r"leave parametrize.cached\(\) before the solve, or use gradient="):
                SOLVES[way](net, X0)
            return
        x1 = SOLVES[way](net, X0)
    tensors = list(net.parameters())
    close(torch.autograd.grad(x1.sum(), tensors), torch.autograd.grad(directly(net, X0).sum(), tensors))


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.drop = nn.Linear(2, 2, dtype=D), nn.BatchNorm1d(2, dtype=D), nn.Dropout(0.5)
        self.norm.running_mean.fill_(0.3)
        self.drop.eval()

    def forward(self, t, x):
        return torch.tanh(self.layer(self.drop(self.norm(x))))


@every
@pytest.mark.parametrize("training", [True, False])
def test_the_backward_pass_has_the_modes_of_the_forward_pass(way, training):
    def make():
        net = BatchNormed()
        net.norm.train(training)
        return net

    modes = []

    def change(net):
        net.train(not training)
        modes.append([m.training for m in net.modules()])

    expected = gradients(make, lambda net: directly(net, X0))
    close(gradients(make, lambda net: SOLVES[way](net, X0), change), expected)
    assert modes[0] == [not training] * 4


@every
@pytest.mark.parametrize("closure", [False, True])
def test_running_statistics_are_updated_by_the_forward_pass_only(way, closure):
    net, reference = BatchNormed(), BatchNormed()
    if way == "odeint_adjoint":
        odeint(reference, X0, torch.tensor([0.0, 0.5], dtype=D), rtol=1e-6, atol=1e-7)
    else:
        by("direct", **({"steps": {"c": 5, "b": 12}[way[0]]} if "steps" in way else TIGHT))(reference, X0)
    parameters = list(net.parameters()) if closure and not way.startswith("checkpoint") else None
    x1 = SOLVES[way]((lambda t, x: net(t, x)) if closure else net, X0, parameters)
    for _ in range(2):
        x1.sum().backward(retain_graph=True)
    assert net.norm.num_batches_tracked == reference.norm.num_batches_tracked
    torch.testing.assert_close(net.norm.running_mean, reference.norm.running_mean)


@every
def test_random_fields(way):
    """Steps that are known are taken again with the same numbers; else the field is another one, and is refused."""
    net = BatchNormed()
    net.norm.eval()
    net.drop.train()

    def solve(way):
        torch.manual_seed(5)
        return torch.autograd.grad(way(net, X0).sum(), list(net.layer.parameters()))

    if way == "checkpoint, steps":
        torch.testing.assert_close(solve(SOLVES[way]), solve(by("direct", steps=5)))
        return
    with pytest.raises(ValueError, match=r"draws random numbers at every call .*Draw once before the solve, or use"):
        solve(SOLVES[way])


@every
def test_noise_drawn_once_for_a_solve_is_no_random_field(way):
    class Noisy(Net):
        noise = None

        def forward(self, t, x):
            if self.noise is None:
                self.noise = torch.randn_like(x)
            return super().forward(t, x) + self.noise

    net = Noisy()
    SOLVES[way](net, X0).sum().backward()
    assert net.a.weight.grad.abs().sum() > 0


class Hamiltonian(nn.Module):
    """Velocity from the gradient of a scalar, which the field takes itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(2, 4, dtype=D), nn.Tanh(), nn.Linear(4, 1, bias=False, dtype=D))

    def forward(self, t, x):
        (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)


@every
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_field_that_differentiates_inside_needs_no_graph_of_the_solve(way, with_gradient):
    net = Hamiltonian()
    parameters = list(net.parameters())
    expected = torch.autograd.grad(directly(net, X0.clone().requires_grad_()).square().sum(), parameters)
    x = X0.clone().requires_grad_(with_gradient)
    close(torch.autograd.grad(SOLVES[way](net, x).square().sum(), parameters), expected)


@every
def test_what_is_missing_a_gradient_for_another_reason_is_told(way):
    class Wrong(Net):
        def forward(self, t, x):
            return torch.autograd.grad(self.a(x.detach()).sum(), torch.ones(1))[0]

    with pytest.raises(RuntimeError, match="does not require grad"):
        SOLVES[way](Wrong(), X0)


@every
@pytest.mark.parametrize("transform", ["grad", "grad of weights", "vjp", "jacrev"])
def test_transforms_are_refused_with_what_to_use(way, transform):
    net, solve = Held(SOLVES[way]), SOLVES[way]
    weights = {name: p.detach() for name, p in net.named_parameters()}
    calls = {
        "grad": lambda: torch.func.grad(lambda x: solve(net.field, x).sum())(X0),
        "grad of weights": lambda: torch.func.grad(lambda w: functional_call(net, w, (X0,)).sum())(weights),
        "vjp": lambda: torch.func.vjp(lambda x: solve(net.field, x), X0),
        "jacrev": lambda: torch.func.jacrev(lambda x: solve(net.field, x))(X0),
    }
    with pytest.raises(RuntimeError, match=r"transforms of torch.func .*: use (odeint|gradient='direct')"):
        calls[transform]()


@every
def test_autocast_holds_in_the_backward_pass(way):
    seen = []

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t, x):
            seen.append(self.layer(x).dtype)
            return torch.tanh(self.layer(x))

    net, x = Field(), X0.float()
    with torch.autocast("cpu", torch.bfloat16):
        if way == "odeint_adjoint":
            x1 = odeint_adjoint(net, x, torch.tensor([0.0, 0.5]), rtol=1e-2, atol=1e-2)[-1]
        else:
            options = {"steps": 3} if "steps" in way else {"tolerance": Tolerance(1e-2, 1e-2)}
            x1 = integrate(net, x, 0.0, 0.5, gradient=way.split(",")[0], **options).x1
    forward = len(seen)
    x1.sum().backward()
    assert len(seen) > forward
    assert set(seen) == {torch.bfloat16}
