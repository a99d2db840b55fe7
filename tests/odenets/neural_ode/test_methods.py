"""A NeuralODE among modules and tensors: what trackers of other libraries report does not happen here."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from odenets import MLPField, NeuralODE, measures
from solvers import Tolerance
from solvers.errors import NonFiniteError
from tests.odenets.networks import Velocity

TIGHT = Tolerance(1e-9, 1e-9)
GRADIENTS = ("direct", "checkpoint", "backsolve")
MODES = [*({"gradient": g} for g in GRADIENTS), *({"gradient": g, "control": "sample"} for g in GRADIENTS[:2])]


def field():
    torch.manual_seed(0)
    return MLPField(3, 8, activation="tanh", time=True).double()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_it_is_copied_after_it_was_trained(x, mode):
    """torchdyn 174: a parameter vector of the field is no leaf, and cannot be copied."""
    ode = NeuralODE(field(), **mode)
    ode(x).sum().backward()
    assert torch.equal(copy.deepcopy(ode)(x), ode(x))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_states_load_and_hold_the_field_alone(x, mode):
    """torchdyn 9: excess keys of the adjoint."""
    ode, other = NeuralODE(field(), **mode), NeuralODE(MLPField(3, 8, activation="tanh", time=True).double(), **mode)
    ode(x).sum().backward()
    other.load_state_dict(ode.state_dict())
    assert torch.equal(other(x), ode(x))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_it_is_cast_after_it_was_made_and_used(x, mode):
    """torchdyn 116: copies of the parameters stay on the first device."""
    ode = NeuralODE(field().float(), **mode)
    ode(x.float()).sum().backward()
    ode.zero_grad()
    ode.double()(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in ode.parameters())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_frozen_parameters_take_no_gradient_from_the_others(x, mode):
    """torchdiffeq 118: one parameter without gradient, and none has any."""
    ode, direct = NeuralODE(field(), tolerance=TIGHT, **mode), NeuralODE(field(), tolerance=TIGHT)
    for one in (ode, direct):
        one.field.first.requires_grad_(False)
        one(x).square().sum().backward()
    assert ode.field.first.weight.grad is None
    assert_close(ode.field.second.weight.grad, direct.field.second.weight.grad, rtol=1e-5, atol=1e-6)
    ode.requires_grad_(False)
    x.requires_grad_()
    ode(x).sum().backward()
    assert x.grad.abs().min() > 0
    assert not ode(x.detach()).requires_grad


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_x_stays_as_it_is_and_states_are_the_callers(x, mode):
    """torchdiffeq 238 and 72: the first state changes; a state is written to before the backward pass."""
    before, ode = x.clone(), NeuralODE(field(), tolerance=TIGHT, **mode)
    plain = torch.autograd.grad(ode(x).sum(), [*ode.parameters()])
    end, states = ode(x), ode(x, at=[0.0, 0.5, 1.0])
    end += 1
    states *= 1
    states[0] += 1
    assert torch.equal(x, before)
    for loss in (end.sum(), states[-1].sum()):
        for one, other in zip(torch.autograd.grad(loss, [*ode.parameters()]), plain, strict=True):
            assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_layer_behind_it_may_work_in_place(x, mode):
    layers = nn.Sequential(NeuralODE(field(), **mode), nn.ReLU(inplace=True))
    layers(x).sum().backward()
    assert layers[0].field.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_weights_that_are_not_finite_say_where(x, mode):
    """torchdiffeq 58 and 244: "underflow in dt nan"."""
    ode = NeuralODE(field(), **mode)
    nn.init.constant_(ode.field.second.bias, torch.nan)
    with pytest.raises(NonFiniteError, match=r"not finite at the first state.*stage 0|NaN or infinity.*stage 0"):
        ode(x)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_a_sample_without_time_has_the_gradient_one(x, gradient):
    """torchode 44: NaN where a sample's start is its end."""
    ode = NeuralODE(field(), control="sample", gradient=gradient, t1=torch.tensor([1.0, 0.0, -1.0, 0.0, 0.5]))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(ode(x).sum(), x)
    assert_close(slope[[1, 3]], torch.ones_like(slope[[1, 3]]))
    assert slope.isfinite().all()
    states = ode(x, at=torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5], [-1.0, -1.0]]))
    assert torch.equal(states[[0, 2]], x[[0, 2], None].expand(-1, 2, -1))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ends", [(0.3, 1.7), (0.7879, 0.0)], ids=str)
def test_the_field_is_called_between_start_and_end(x, mode, ends):
    """torchode 7: times far outside."""
    seen = []

    def velocity(module, t, x):
        seen.append(torch.as_tensor(t, dtype=torch.float64).detach().flatten())
        return module.layer(x) * t

    ode = NeuralODE(Velocity(velocity, layer=nn.Linear(3, 3).double()), t0=ends[0], t1=ends[1], **mode)
    ode(x, at=[ends[0], 0.5 * (ends[0] + ends[1]), ends[1]]).sum().backward()
    assert min(ends) <= torch.cat(seen).min()
    assert torch.cat(seen).max() <= max(ends)


def test_second_derivatives_with_control_of_each_sample(x):
    """torchode 36."""
    results = []
    for control in ("batch", "sample"):
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            NeuralODE(field(), tolerance=TIGHT, control=control)(z).square().sum(), z, create_graph=True
        )
        results.append(torch.autograd.grad(slope.square().sum(), z)[0])
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nothing_of_a_solve_stays_behind(x, mode):
    """Of its graph or states, once its result is gone."""
    ode = NeuralODE(field(), **mode)
    states: list[weakref.ref] = []

    def keep(module, inputs, output):
        states.append(weakref.ref(output))

    with_hook = ode.field.register_forward_hook(keep)
    end = ode(x)
    end.sum().backward()
    with_hook.remove()
    del end
    assert len(states) > 10
    assert not any(state() is not None for state in states)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_matrix_in_the_call_gets_its_gradient(x, gradient):
    """torchdiffeq 178: a weight that a network computes, assigned to the field, gets none."""
    matrix = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    ode = NeuralODE(lambda t, x, w: x @ w, gradient=gradient, tolerance=TIGHT)
    end = ode(x, matrix)
    assert_close(end, x @ torch.linalg.matrix_exp(matrix), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad((x @ torch.linalg.matrix_exp(matrix)).sum(), matrix)
    assert_close(torch.autograd.grad(end.sum(), matrix), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_recorded_can_be_kept_without_its_graph(x, mode):
    with torch.no_grad():
        end, records = NeuralODE(field(), **mode).record(x, action=measures.action)
    assert not end.requires_grad
    assert not records["action"].requires_grad
