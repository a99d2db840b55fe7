"""What is passed as parameters and arguments."""

import pytest
import torch
from torch import nn

from solvers import Tolerance, integrate, odeint_adjoint
from solvers.gradients.captured import tensors_of
from tests.solvers.gradients.ways import SOLVES, TIGHT, X0, D, Net, by, close, directly, every, solving_backwards


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
    (result,) = torch.autograd.grad(SOLVES[way](field, X0, parameters).sum(), w)
    close(result, expected)


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
    tensors = list(layer.parameters())
    args = {
        "tuple": lambda: ((tuple(tensors),), lambda t, x, p: torch.tanh(x @ p[0].T + p[1])),
        "dictionary": lambda: (({"p": [tensors]},), lambda t, x, d: torch.tanh(x @ d["p"][0][0].T + d["p"][0][1])),
        "module": lambda: ((layer,), lambda t, x, m: torch.tanh(m(x))),
        "computed": lambda: ((layer(torch.ones(2, dtype=D)).exp(),), lambda t, x, c: x * c),
        "also a parameter": lambda: ((*tensors, tensors[0]), lambda t, x, w, b, again: torch.tanh(x @ w.T + b) @ again),
    }[nested]
    passed, field = args()
    expected = torch.autograd.grad(by("direct", **TIGHT)(field, X0, args=passed).sum(), tensors)
    passed, field = args()
    x1 = SOLVES[way](field, X0, tensors if nested in ("computed", "also a parameter") else (), passed)
    close(torch.autograd.grad(x1.sum(), tensors), expected)


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


@solving_backwards
def test_a_real_parameter_of_a_complex_state(way):
    w, x = nn.Parameter(torch.tensor(2.0, dtype=D)), torch.ones(1, 1, dtype=torch.complex128)
    field = lambda t, x: -1j * w * x  # noqa: E731
    expected = torch.autograd.grad(directly(field, x).real.sum(), w)
    close(torch.autograd.grad(SOLVES[way](field, x, [w]).real.sum(), w), expected)


@pytest.mark.parametrize("way", ["odeint_adjoint", "backsolve"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adjoint_of_a_narrow_state_is_carried_in_float32(way, dtype):
    """x' = -w x, and a field that adds little at every step: the sum over 200 steps keeps what is small."""
    w, x = nn.Parameter(torch.tensor(0.5, dtype=dtype)), torch.ones(1, 4, dtype=dtype)
    if way == "odeint_adjoint":
        t, options = torch.tensor([0.0, 1.0]), {"step_size": 0.25}
        back = {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.005}}
        x1 = odeint_adjoint(lambda t, y: -w * y, x, t, method="rk4", options=options, adjoint_params=[w], **back)[-1]
        (result,) = torch.autograd.grad(x1.float().sum(), w)
    else:
        tolerance = Tolerance(1e-2, 1e-2, max_step=0.25)
        x1 = integrate(lambda t, y: -w * y, x, 0.0, 1.0, tolerance=tolerance, gradient=way, parameters=[w]).x1
        (result,) = torch.autograd.grad(x1.float().sum(), w)
    assert result.dtype == dtype
    assert result.item() == pytest.approx(-4 * torch.tensor(-0.5).exp().item(), rel=0.03)


@every
def test_frozen_parameters_get_none_and_the_state_still_does(way):
    net, x = Net(), X0.clone().requires_grad_()
    net.b.requires_grad_(False)
    net.idle = nn.Parameter(torch.ones(2, dtype=D))
    SOLVES[way](net, x).sum().backward()
    assert net.b.weight.grad is None
    assert way.startswith("checkpoint") or torch.equal(net.idle.grad, torch.zeros(2, dtype=D))
    assert net.a.weight.grad.abs().sum() > 0
    close(x.grad, torch.autograd.grad(directly(net, x).sum(), x)[0])
