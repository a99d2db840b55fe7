import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets import Flow
from odenets.fields import SymmetricField
from odenets.fields.operators import adjoint, square_norm
from tests.odenets.fields.matrices import matrix

SHAPES = {None: (5,), 1: (3, 4, 5), 3: (3, 4, 5), 5: (2, 3, 4)}


def field_and_states(kernel_size, activation, seed, spread=1.0):
    torch.manual_seed(seed)
    shape = SHAPES[kernel_size]
    field = SymmetricField(shape[0], hidden=4, kernel_size=kernel_size, activation=activation).double()
    x, y = spread * torch.randn(2, 6, *shape, dtype=torch.float64)
    return field, x, y, field.square_norm(None if kernel_size is None else shape[1:])


@pytest.mark.parametrize("kernel_size", SHAPES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_velocities_are_the_formula(kernel_size, sign):
    shape = SHAPES[kernel_size]
    field = SymmetricField(shape[0], hidden=4, kernel_size=kernel_size, sign=sign).double()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    K = matrix(lambda x: field.K(x) - field.K(zero), shape)
    x = torch.randn(3, *shape, dtype=torch.float64)
    expected = sign * (x.flatten(1) @ K.T + field.K(zero).flatten()).relu() @ K
    torch.testing.assert_close(field(0.0, x).flatten(1), expected)


@pytest.mark.parametrize("kernel_size", SHAPES)
def test_the_adjoint_is_exact(kernel_size):
    shape = SHAPES[kernel_size]
    weight = SymmetricField(shape[0], hidden=4, kernel_size=kernel_size).double().K.weight
    K = matrix(lambda x: nothing(weight)(x), shape)
    outputs = (4, *shape[1:])
    torch.testing.assert_close(matrix(lambda y: adjoint(weight, y), outputs), K.T)


def nothing(weight):
    """The linear map of a weight alone, as torch has it."""
    if weight.ndim == 2:
        layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    else:
        size = weight.shape[-1]
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], size, padding="same", bias=False)
    layer.weight = torch.nn.Parameter(weight)
    return layer


@pytest.mark.parametrize("kernel_size", SHAPES)
def test_the_norm_is_the_largest_singular_value(kernel_size):
    shape = SHAPES[kernel_size]
    field = SymmetricField(shape[0], hidden=4, kernel_size=kernel_size).double()
    K = matrix(nothing(field.K.weight), shape)
    state = torch.get_rng_state()
    norm = field.square_norm(shape[1:] or None)
    assert torch.equal(state, torch.get_rng_state())
    assert norm == pytest.approx(torch.linalg.matrix_norm(K, 2).item() ** 2, rel=1e-6)


def test_the_norm_of_nothing_is_zero():
    assert square_norm(torch.zeros(2, 3, 3, 3), (4, 4)) == 0.0


@pytest.mark.parametrize("kernel_size", [None, 3])
@given(
    activation=st.sampled_from(["relu", "tanh", "relu6"]),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 10**6),
    spread=st.floats(0.01, 100.0),
)
def test_fields_are_monotone_and_steps_not_expansive(kernel_size, activation, share, seed, spread):
    """While h times the squared norm is at most 2."""
    field, x, y, norm = field_and_states(kernel_size, activation, seed, spread)
    difference = (x - y).flatten(1)
    products = ((field(0.0, x) - field(0.0, y)).flatten(1) * difference).sum(1)
    assert (products <= 1e-9 * difference.square().sum(1)).all()
    flow = Flow(field, solver="euler", h=2 * share / norm)
    after = (flow(x) - flow(y)).flatten(1)
    assert (after.norm(dim=1) <= (1 + 1e-6) * difference.norm(dim=1)).all()


def test_longer_steps_may_expand():
    field = SymmetricField(1, activation="relu").double()
    field.K.bias.data.zero_()
    x = torch.tensor([[1.0]], dtype=torch.float64) * field.K.weight.sign().detach()
    assert Flow(field, solver="euler", h=2.5 / field.square_norm())(x).abs() > 1.4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SymmetricField(3, activation="gelu"),
            ValueError,
            "must be one of relu, tanh, relu6, which",
        ),
        (lambda: SymmetricField(3, sign=0), ValueError, "sign must be -1 or 1, got 0"),
        (lambda: SymmetricField(3, hidden=0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: SymmetricField(3, kernel_size=2), ValueError, "kernel_size must be odd"),
        (lambda: SymmetricField(3, kernel_size=3).square_norm(), ValueError, "size must be height and width"),
        (lambda: SymmetricField(3, kernel_size=3).square_norm((0, 4)), ValueError, "size, height must be at least 1"),
        (lambda: SymmetricField(3, kernel_size=3).square_norm((4.0, 4)), TypeError, "size, height must be a whole"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
