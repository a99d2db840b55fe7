"""What a backward pass reads is what the forward pass read, in every way that calls the field again."""

import collections
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from solvers import Tolerance, integrate, odeint, odeint_adjoint
from solvers.gradients.captured import tensors_of

D = torch.float64
X0 = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.3]], dtype=D)


def adjoint(field, x, parameters=None):
    t = torch.tensor([0.0, 0.5], dtype=D)
    return odeint_adjoint(field, x, t, rtol=1e-6, atol=1e-7, adjoint_params=parameters)[-1]


def by(gradient, **options):
    def solve(field, x, parameters=None, args=()):
        more = {"parameters": parameters, "args": args, **options}
        return integrate(field, x, 0.0, 0.5, gradient=gradient, solver="dopri5", **more).x1

    return solve


TIGHT = {"tolerance": Tolerance(1e-6, 1e-7)}
SOLVES = {
    "odeint_adjoint": adjoint,
    "backsolve": by("backsolve", **TIGHT),
    "backsolve, steps": by("backsolve", steps=12),
    "checkpoint": by("checkpoint", **TIGHT),
    "checkpoint, steps": by("checkpoint", steps=5),
}
directly = by("direct", **TIGHT)
every = pytest.mark.parametrize("way", SOLVES)
solving_backwards = pytest.mark.parametrize("way", ["odeint_adjoint", "backsolve", "backsolve, steps"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 2, dtype=D), nn.Linear(2, 2, dtype=D)
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        return torch.tanh(self.a(x)) * self.b(x)

    def velocity(self, t, x):
        return self(t, x)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def gradients(make, solve, change=lambda net: None, tensors=lambda net: list(net.parameters())):
    net = make()
    wanted = tensors(net)
    x1 = solve(net)
    change(net)
    return torch.autograd.grad(x1.square().sum(), wanted)


def replace_data(net):
    for p in net.parameters():
        p.data = p.data + 1


CHANGES = {
    "the module is replaced": lambda net: setattr(net, "a", nn.Linear(2, 2, dtype=D)),
    "it is deleted": lambda net: delattr(net, "a"),
    "a parameter is replaced": lambda net: setattr(net.a, "weight", nn.Parameter(torch.ones(2, 2, dtype=D))),
    "other weights are assigned": lambda net: net.load_state_dict(nn.Module.state_dict(Other()), assign=True),
    "the data is replaced": replace_data,
}


class Other(Net):
    def __init__(self):
        super().__init__()
        nn.init.ones_(self.a.weight)


FIELDS = {
    "module": lambda net: net,
    "method": lambda net: net.velocity,
    "partial": lambda net: functools.partial(net.velocity),
    "closure": lambda net: lambda t, x: net(t, x),
}


@every
@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_a_module_after_the_forward_pass_does_not_matter(way, change):
    expected = gradients(Net, lambda net: directly(net, X0))
    close(gradients(Net, lambda net: SOLVES[way](net, X0), CHANGES[change]), expected)


@every
@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_hold_modules(way, kind):
    """The parameters of methods and partials are known; a closure says them. Replaced modules are found in all."""
    expected = gradients(Net, lambda net: directly(net, X0))

    def solve(net):
        parameters = net.parameters() if kind == "closure" and not way.startswith("checkpoint") else None
        return SOLVES[way](FIELDS[kind](net), X0, parameters)

    close(gradients(Net, solve, CHANGES["the module is replaced"]), expected)


@every
@pytest.mark.parametrize("change", ["step", "load_state_dict"])
def test_weights_changed_in_place_are_noticed(way, change):
    net = Net()
    x1 = SOLVES[way](net, X0)
    if change == "step":
        with torch.no_grad():
            net.a.weight += 1
    else:
        net.load_state_dict(Other().state_dict())
    with pytest.raises(RuntimeError, match=r"changed in place since the forward pass.*call backward\(\) before"):
        x1.sum().backward()


@every
def test_a_closure_whose_tensor_is_replaced_is_noticed(way):
    w = torch.ones(2, dtype=D, requires_grad=True)
    parameters = None if way.startswith("checkpoint") else [w]
    x1 = SOLVES[way](lambda t, x: -x * w, X0, parameters)
    w.data = torch.zeros(2, dtype=D)
    with pytest.raises(RuntimeError, match="was replaced since the forward pass"):
        x1.sum().backward()


class Held(nn.Module):
    """Calls a solve, as the field of a larger network."""

    def __init__(self, solve):
        super().__init__()
        self.field, self.head, self.solve = Net(), nn.Linear(2, 1, dtype=D), solve

    def forward(self, x):
        return self.head(self.solve(self.field, x))


@every
@pytest.mark.parametrize("leaves", [True, False])
def test_functional_calls(way, leaves):
    net = Held(SOLVES[way])
    other = {name: (1.1 * p.detach()).requires_grad_() for name, p in net.named_parameters()}
    x1 = functional_call(net, {name: p if leaves else p * 1 for name, p in other.items()}, (X0,))
    found = torch.autograd.grad(x1.sum(), list(other.values()))
    net.load_state_dict({name: p.detach() for name, p in other.items()})
    close(found, torch.autograd.grad(net.head(directly(net.field, X0)).sum(), list(net.parameters())))


def replica(module):
    """As ``nn.parallel.replicate`` wires them: weights are tensors on a graph, and no parameters."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for m, copy in copies.items():
        copy._former_parameters = collections.OrderedDict()
        for name, child in m._modules.items():
            setattr(copy, name, copies[child])
        for name, p in m._parameters.items():
            copy._former_parameters[name] = w = p * 1.0
            setattr(copy, name, w)
    return copies[module]


@every
@pytest.mark.parametrize("part", ["field", "method", "network"])
def test_replicas_of_data_parallel(way, part):
    net = Held(SOLVES[way])
    expected = torch.autograd.grad(net.head(directly(net.field, X0)).sum(), list(net.parameters()))
    copy = replica(net)
    if part == "network":
        x1 = copy(X0)
    else:
        x1 = copy.head(SOLVES[way](copy.field if part == "field" else copy.field.velocity, X0))
    close(torch.autograd.grad(x1.sum(), list(net.parameters())), expected)


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
def test_cached_parametrizations_give_the_gradient_or_are_refused(way):
    net = Normed(nn.utils.parametrizations.weight_norm)
    with nn.utils.parametrize.cached():
        if way.startswith("checkpoint"):
            with pytest.raises(RuntimeError, match=r"leave parametrize.cached\(\) before the solve, or use gradient="):
                SOLVES[way](net, X0)
            return
        x1 = SOLVES[way](net, X0)
    wanted = list(net.parameters())
    close(torch.autograd.grad(x1.sum(), wanted), torch.autograd.grad(directly(net, X0).sum(), wanted))


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


@every
@pytest.mark.parametrize("kept", ["x1", "loss", "by a method", "by a closure"])
def test_a_solution_kept_on_its_module_is_freed_with_it(way, kept):
    net = Net()
    if kept == "by a closure":
        parameters = None if way.startswith("checkpoint") else tensors_of("parameters", net)
        net.kept = [(lambda m: SOLVES[way](lambda t, x: m(t, x), X0, parameters))(net)]
    else:
        net.kept = SOLVES[way](net.velocity if kept == "by a method" else net, X0)
        net.kept = net.kept if kept == "x1" else net.kept.sum()
    reference = weakref.ref(net)
    del net
    if reference() is not None:  # only a cycle waits for the collector
        gc.collect()
    assert reference() is None


@every
@pytest.mark.parametrize("kind", ["module", "method", "closure"])
def test_a_module_that_nobody_holds_any_more_still_gives_its_gradient(way, kind):
    expected = gradients(Net, lambda net: directly(net, X0))
    net = Net()
    wanted = list(net.parameters())
    x1 = SOLVES[way](FIELDS[kind](net), X0, None if kind != "closure" or way.startswith("checkpoint") else wanted)
    del net
    close(torch.autograd.grad(x1.square().sum(), wanted), expected)


@every
def test_the_module_itself_is_called_again_and_left_as_it_is(way):
    net = Net()
    x1 = SOLVES[way](net, X0)
    calls, before = net.calls, {name: id(p) for name, p in net.named_parameters()}
    net.eval()
    x1.sum().backward(retain_graph=True)
    assert net.calls > calls
    assert not net.training
    assert {name: id(p) for name, p in net.named_parameters()} == before
    first = net.a.weight.grad.clone()
    x1.sum().backward()
    torch.testing.assert_close(net.a.weight.grad, 2 * first)


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
@pytest.mark.parametrize("wanted", [True, False])
def test_a_field_that_differentiates_inside_needs_no_graph_of_the_solve(way, wanted):
    net = Hamiltonian()
    parameters = list(net.parameters())
    expected = torch.autograd.grad(directly(net, X0.clone().requires_grad_()).square().sum(), parameters)
    x = X0.clone().requires_grad_(wanted)
    close(torch.autograd.grad(SOLVES[way](net, x).square().sum(), parameters), expected)


@every
def test_what_is_missing_a_gradient_for_another_reason_is_told(way):
    class Wrong(Net):
        def forward(self, t, x):
            return torch.autograd.grad(self.a(x.detach()).sum(), torch.ones(1))[0]

    with pytest.raises(RuntimeError, match="does not require grad"):
        SOLVES[way](Wrong(), X0)


@every
def test_frozen_parameters_get_none_and_the_state_still_does(way):
    net, x = Net(), X0.clone().requires_grad_()
    net.b.requires_grad_(False)
    SOLVES[way](net, x).sum().backward()
    assert net.b.weight.grad is None
    assert net.a.weight.grad.abs().sum() > 0
    close(x.grad, torch.autograd.grad(directly(net, x).sum(), x)[0])


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


# -- what is passed as parameters and arguments -------------------------------------------------------------------


def of_weight(make):
    """Gradients to a weight that a closure reads, directly and with ``make(weight)`` as parameters."""
    w = nn.Parameter(torch.tensor([[0.5, -0.3], [0.2, 0.8]], dtype=D))
    field = lambda t, x: torch.tanh(x @ w)  # noqa: E731
    (expected,) = torch.autograd.grad(directly(field, X0).sum(), w)
    return field, make(w), w, expected


@solving_backwards
@pytest.mark.parametrize(
    "make",
    [
        lambda w: (w,),
        lambda w: [w, w, torch.ones(2, dtype=D), nn.Parameter(torch.ones(1, dtype=D))],
        lambda w: (p for p in [w]),
        lambda w: {"w": w},
        lambda w: {w},
        lambda w: nn.ParameterList([w]),
    ],
    ids=["tuple", "repeated, frozen, unused", "generator", "dictionary", "set", "module"],
)
def test_collections_of_parameters(way, make):
    field, parameters, w, expected = of_weight(make)
    (found,) = torch.autograd.grad(SOLVES[way](field, X0, parameters).sum(), w)
    close(found, expected)


@solving_backwards
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: w, TypeError, "must be a collection of tensors, got one tensor"),
        (lambda w: "w", TypeError, "must be a collection of tensors, got str"),
        (lambda w: 1.0, TypeError, "must be a collection of tensors, got float"),
        (lambda w: [w, None], TypeError, "must hold tensors, got NoneType at position 1"),
        (lambda w: [("w", w)], TypeError, "must hold tensors, got tuple at position 0"),
        (lambda w: iter(()), ValueError, "the iterator yields nothing, it can be read once only"),
        (lambda w: tuple(w), ValueError, "hand over the tensor that is read"),
        (lambda w: [w.T], ValueError, "hand over the tensor that is read"),
    ],
)
def test_what_is_no_collection_of_parameters_is_refused(way, make, error, message):
    field, parameters, *_ = of_weight(make)
    name = "adjoint_params" if way == "odeint_adjoint" else "parameters"
    with pytest.raises(error, match=f"{name}.*{message}"):
        SOLVES[way](field, X0, parameters)


@solving_backwards
def test_a_closure_over_a_module_must_say_its_parameters(way):
    net = Net()
    with pytest.raises(ValueError, match="torch module"):
        SOLVES[way](lambda t, x: net(t, x), X0)


def test_a_tensor_is_collected_once():
    w = nn.Parameter(torch.ones(2))
    assert tensors_of("parameters", [w, nn.ParameterList([w]), w]) == [w]


BACKSOLVES = pytest.mark.parametrize("way", ["backsolve", "backsolve, steps"])


@BACKSOLVES
@pytest.mark.parametrize("nested", ["tuple", "dictionary", "module", "computed", "also a parameter"])
def test_tensors_in_args_get_their_gradient(way, nested):
    layer = nn.Linear(2, 2, dtype=D)
    wanted = list(layer.parameters())
    args = {
        "tuple": lambda: ((tuple(wanted),), lambda t, x, p: torch.tanh(x @ p[0].T + p[1])),
        "dictionary": lambda: (({"p": [wanted]},), lambda t, x, d: torch.tanh(x @ d["p"][0][0].T + d["p"][0][1])),
        "module": lambda: ((layer,), lambda t, x, m: torch.tanh(m(x))),
        "computed": lambda: ((layer(torch.ones(2, dtype=D)).exp(),), lambda t, x, c: x * c),
        "also a parameter": lambda: ((*wanted, wanted[0]), lambda t, x, w, b, again: torch.tanh(x @ w.T + b) @ again),
    }[nested]
    passed, field = args()
    expected = torch.autograd.grad(by("direct", **TIGHT)(field, X0, args=passed).sum(), wanted)
    passed, field = args()
    x1 = SOLVES[way](field, X0, wanted if nested in ("computed", "also a parameter") else (), passed)
    close(torch.autograd.grad(x1.sum(), wanted), expected)


@solving_backwards
def test_the_first_state_may_also_be_a_parameter(way):
    x = X0.clone().requires_grad_()
    field = lambda t, y: -y + torch.sin(x)  # noqa: E731
    expected = torch.autograd.grad(directly(field, x).square().sum(), x)
    close(torch.autograd.grad(SOLVES[way](field, x, [x]).square().sum(), x), expected)


@solving_backwards
def test_a_complex_parameter_of_a_real_state(way):
    c = torch.tensor(0.3 + 0.7j, dtype=torch.complex128, requires_grad=True)
    field = lambda t, x: (c * x * (1 + 1j)).real  # noqa: E731
    expected = torch.autograd.grad(directly(field, X0).sum(), c)
    close(torch.autograd.grad(SOLVES[way](field, X0, [c]).sum(), c), expected)


@pytest.mark.parametrize("way", ["odeint_adjoint", "backsolve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adjoint_of_a_narrow_state_is_carried_in_float32(way, dtype):
    """x' = -w x, and a field that adds little at every step: the sum over 200 steps keeps what is small."""
    w, x = nn.Parameter(torch.tensor(0.5, dtype=dtype)), torch.ones(1, 4, dtype=dtype)
    if way == "odeint_adjoint":
        t, options = torch.tensor([0.0, 1.0]), {"step_size": 0.25}
        back = {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.005}}
        x1 = odeint_adjoint(lambda t, y: -w * y, x, t, method="rk4", options=options, adjoint_params=[w], **back)[-1]
        (found,) = torch.autograd.grad(x1.float().sum(), w)
    else:
        tolerance = Tolerance(1e-2, 1e-2, max_step=0.25)
        x1 = integrate(lambda t, y: -w * y, x, 0.0, 1.0, tolerance=tolerance, gradient=way, parameters=[w]).x1
        (found,) = torch.autograd.grad(x1.float().sum(), w)
    assert found.dtype == dtype
    assert found.item() == pytest.approx(-4 * torch.tensor(-0.5).exp().item(), rel=0.03)
