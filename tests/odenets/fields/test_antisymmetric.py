import pytest
import torch

from odenets import Flow
from odenets.fields import AntisymmetricField
from tests.odenets.fields.matrices import matrix


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize(("kernel_size", "shape"), [(None, (5,)), (1, (2, 3, 4)), (3, (2, 3, 4)), (5, (2, 3, 3))])
def test_the_operator_is_antisymmetric_but_for_the_diffusion(gamma, kernel_size, shape):
    field = AntisymmetricField(shape[0], gamma, kernel_size=kernel_size).double()
    field.K.bias.data.zero_()
    field.activation = torch.nn.Identity()
    A = matrix(lambda x: field(0.0, x), shape)
    K = matrix(lambda x: field.K(x), shape)
    torch.testing.assert_close(A, K - K.T - gamma * torch.eye(len(K), dtype=torch.float64))
    torch.testing.assert_close(A + A.T, -2 * gamma * torch.eye(len(A), dtype=torch.float64))


@pytest.mark.parametrize("kernel_size", [None, 3])
def test_velocities_are_the_formula(kernel_size):
    field = AntisymmetricField(3, 0.1, kernel_size=kernel_size).double()
    x = torch.randn(2, 3, *(4, 4) * (kernel_size is not None), dtype=torch.float64)
    shape = x.shape[1:]
    bias = field.K.bias.detach().reshape(3, *(1,) * (x.ndim - 2)).expand(shape).flatten()
    K = matrix(lambda x: field.K(x) - bias.reshape(shape), shape)
    A = K - K.T - 0.1 * torch.eye(len(K), dtype=torch.float64)
    torch.testing.assert_close(field(0.0, x).flatten(1), torch.tanh(x.flatten(1) @ A.T + bias))


def test_norms_of_states_and_gradients_stay_over_200_steps_of_rk4():
    field = AntisymmetricField(6, kernel_size=3).double()
    field.activation = torch.nn.Identity()
    field.K.bias.data.zero_()
    flow = Flow(field, solver="rk4", depth=200, total_time=20.0, shared=True)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    y = flow(x)
    (gradient,) = torch.autograd.grad((y * x.detach()).sum(), x)
    assert y.norm().item() == pytest.approx(x.norm().item(), rel=1e-3)
    assert gradient.norm().item() == pytest.approx(x.norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (-0.1, ValueError, "gamma must be finite and not negative, got -0.1"),
        (float("nan"), ValueError, "gamma must be finite and not negative, got nan"),
        ("0.1", TypeError, "gamma must be a number, got '0.1'"),
    ],
)
def test_bad_diffusions_are_named(gamma, error, message):
    with pytest.raises(error, match=message):
        AntisymmetricField(3, gamma)
