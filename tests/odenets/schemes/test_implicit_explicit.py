"""IMEX steps against dense solves with circular convolutions, their order, stability and field of view."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm
from torch import nn

import odenets
from odenets.schemes import ImplicitExplicit
from odenets.schemes.implicit_explicit import symbol

LAPLACIAN = [[0, -1, 0], [-1, 4, -1], [0, -1, 0]]


class Field(nn.Module):
    """A convolution and a bounded nonlinearity, in float64."""

    def __init__(self, channels=3):
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)

    def forward(self, t, x):
        return torch.tanh(self.layer(x))


def circular(kernel, x):
    """The convolution (correlation) of each channel with its kernel and edges that meet, by rolled copies."""
    total = 0
    for i in range(kernel.shape[1]):
        for j in range(kernel.shape[2]):
            shifts = kernel.shape[1] // 2 - i, kernel.shape[2] // 2 - j
            total = total + kernel[:, i, j, None, None] * x.roll(shifts, (-2, -1))
    return total


def applied(kernel, x):
    """``A x = B^T B x``."""
    return circular(kernel.flip(1, 2), circular(kernel, x))


def matrices(apply, shape, channels):
    """The dense matrix of an operator in each channel, ``(C, n, n)``."""
    size = shape[0] * shape[1]
    basis = torch.eye(size, dtype=torch.float64).view(size, 1, *shape).expand(-1, channels, -1, -1)
    return apply(basis).flatten(2).permute(1, 2, 0)


def drawn(scheme, depth=2, h=0.7, channels=3):
    flow = odenets.Flow(lambda: Field(channels), solver=scheme, depth=depth, h=h).double()
    with torch.no_grad():
        for block in flow.blocks:
            if scheme.learns:
                block.fields[1].kernel.normal_()
    return flow


@pytest.mark.parametrize("shape", [(6, 6), (5, 4), (3, 7), (2, 5), (1, 1)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_equals_the_dense_solve_in_outputs_and_gradients(shape, kernel_size):
    """``(I + h A) x1 = x0 + h A x0 + h v(x0)`` as it stands, with kernels that may be larger than the state."""
    flow = drawn(ImplicitExplicit(channels=3, kernel_size=kernel_size))
    x = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    wanted, n = x, shape[0] * shape[1]
    for block in flow.blocks:
        kernel = block.fields[1].kernel
        a = matrices(lambda x, k=kernel: applied(k, x), shape, 3)
        v, flat = block.fields[0](0.0, wanted).flatten(2)[..., None], wanted.flatten(2)[..., None]
        right = flat + 0.7 * (a @ flat) + 0.7 * v
        wanted = torch.linalg.solve(torch.eye(n, dtype=torch.float64) + 0.7 * a, right).view(x.shape)
    inputs = [x, *flow.parameters()]
    got = flow(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(x)
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(0.01, 100.0))
def test_the_symbol_is_not_negative_and_the_system_is_solved(height, width, seed, h):
    generator = torch.Generator().manual_seed(seed)
    scheme = ImplicitExplicit(channels=2)
    operator = scheme.learned(0, 1)
    with torch.no_grad():
        operator.kernel.copy_(torch.randn(2, 3, 3, generator=generator))
        values = operator((height, width))
        v = torch.randn(3, 2, height, width, generator=generator)
        r = scheme.residue([lambda t, x: v], operator, 0.0, v, h)
        left = r.double() + h * applied(operator.kernel.double(), r.double())
    assert (values >= 0).all()
    size = 1 + h * values.max()  # of the matrix, whose product with the solution is rounded
    assert (left - v).norm() <= 1e-6 * max(v.norm(), size * r.norm())


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("start", ["laplacian", "drawn"])
def test_the_residual_is_below_1e_5_in_float32(size, start):
    scheme = ImplicitExplicit(channels=64)
    operator = scheme.learned(0, 1)
    if start == "drawn":
        nn.init.normal_(operator.kernel)
    v = torch.randn(8, 64, size, size)
    with torch.no_grad():
        r = scheme.residue([lambda t, x: v], operator, 0.0, v, 0.5)
        left = r.double() + 0.5 * applied(operator.kernel.double(), r.double())
    assert (left - v).norm() <= 1e-5 * v.norm()


def test_the_symbol_is_the_fourier_transform_of_the_kernel():
    kernel = torch.randn(2, 3, 5, dtype=torch.float64)
    values, point = symbol(kernel, (4, 7)), np.array([3, 2])
    offsets = np.stack(np.meshgrid([-1, 0, 1], [-2, -1, 0, 1, 2], indexing="ij"), -1)
    phases = np.exp(-2j * np.pi * (offsets * point / np.array([4, 7])).sum(-1))
    np.testing.assert_allclose(values[:, 3, 2].numpy(), (kernel.numpy() * phases).sum((1, 2)), atol=1e-12)


def test_it_begins_as_a_laplacian():
    operator = ImplicitExplicit(channels=1).learned(0, 1)
    nine = torch.tensor([[-1.0, -4.0, -1.0], [-4.0, 20.0, -4.0], [-1.0, -4.0, -1.0]]) / 6
    torch.testing.assert_close(operator.kernel[0].detach(), nine)
    wider = ImplicitExplicit(channels=1, kernel_size=5).learned(0, 1).kernel.detach()
    torch.testing.assert_close(wider[0, 1:-1, 1:-1], nine)
    assert wider.sum().abs() < 1e-6
    line = ImplicitExplicit(channels=1, dims=1).learned(0, 1).kernel.detach()
    torch.testing.assert_close(line, torch.tensor([[-1.0, 2.0, -1.0]]))


def test_a_given_operator_is_solved_with_and_not_learned():
    flow = drawn(ImplicitExplicit(operator=LAPLACIAN), depth=1)
    assert len(flow.blocks[0].fields) == 1
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    kernel = torch.tensor(LAPLACIAN, dtype=torch.float64)[None]
    (step,) = flow.steps(x)
    left = step.residue + 0.7 * circular(kernel.expand(3, -1, -1), step.residue)
    torch.testing.assert_close(left, flow.blocks[0].fields[0](0.0, x))
    each = ImplicitExplicit(operator=torch.tensor(LAPLACIAN) * torch.tensor([1, 2, 3])[:, None, None])
    r = each.residue([lambda t, x: x], None, 0.0, x, 0.7)
    torch.testing.assert_close(r + 0.7 * circular(kernel * torch.tensor([1, 2, 3])[:, None, None], r), x)
    assert ImplicitExplicit(operator=LAPLACIAN) == ImplicitExplicit(operator=np.array(LAPLACIAN))


def test_order_one():
    """Against the exact solution of a linear equation, beside which A is another operator."""
    rate = torch.randn(9, 9, dtype=torch.float64) * 0.3
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    exact = (torch.from_numpy(expm(rate.numpy())) @ x.flatten()).view_as(x)
    scheme, errors = ImplicitExplicit(operator=LAPLACIAN), []
    for depth in (200, 400):
        state = x
        for _ in range(depth):
            velocities = [lambda t, y: (rate @ y.flatten()).view_as(y)]
            state = scheme.take(velocities, None, 0.0, state, 1 / depth).x1
        errors.append((state - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_it_is_stable_where_euler_diverges():
    """Of ``x' = -L x`` at a step for which the largest rate of L is 40 over h, with A half of L and more."""
    kernel = torch.tensor(LAPLACIAN, dtype=torch.float64)[None]

    class Diffusion(nn.Module):
        def forward(self, t, x):
            return -circular(kernel, x)

    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    for share, stable in ((0.5, True), (1.0, True), (0.4, False)):
        flow = odenets.Flow(Diffusion, solver=ImplicitExplicit(operator=kernel[0] * share), depth=100, h=5.0)
        assert (flow(x).norm() <= x.norm()) == stable
    euler = odenets.Flow(Diffusion, solver="euler", depth=100, h=5.0)
    assert euler(x).norm() > 1e50


def test_one_layer_sees_the_whole_image():
    class Pointwise(nn.Module):
        def forward(self, t, x):
            return torch.tanh(x)

    for solver, whole in ((ImplicitExplicit(channels=1), True), ("euler", False)):
        flow = odenets.Flow(Pointwise, solver=solver, depth=1).double()
        x = torch.randn(1, 1, 12, 15, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(flow(x)[0, 0, 3, 4], x)
        assert bool((gradient != 0).all()) == whole


def test_vectors_lines_and_volumes():
    flow = odenets.Flow(odenets.MLPField(3), solver="imex", depth=1, h=0.5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        flow(x)
        flow.blocks[0].fields[1].kernel.normal_()
    damped = flow.blocks[0].fields[0](0.0, x) / (1 + 0.5 * flow.blocks[0].fields[1].kernel.square())
    torch.testing.assert_close(flow(x), x + 0.5 * damped)
    for shape in ((2, 3, 7), (2, 3, 4, 5, 6)):
        scheme, v = ImplicitExplicit(channels=3, dims=len(shape) - 2), torch.randn(shape)
        operator = scheme.learned(0, 1)
        r = scheme.residue([lambda t, x: x], operator, 0.0, v, 1.0)
        over = tuple(range(2, len(shape)))
        wanted = torch.fft.irfftn(torch.fft.rfftn(v, dim=over) / (1 + operator(shape[2:])), s=shape[2:], dim=over)
        torch.testing.assert_close(r, wanted)


def test_chunks_of_a_batch_and_channels_last_change_nothing(monkeypatch):
    scheme = ImplicitExplicit(channels=5)
    operator, v = scheme.learned(0, 1), torch.randn(7, 5, 9, 8)
    whole = scheme.residue([lambda t, x: v], operator, 0.0, v, 0.3)
    monkeypatch.setattr("odenets.schemes.implicit_explicit._CACHED", 800)
    with torch.no_grad():
        torch.testing.assert_close(scheme.residue([lambda t, x: v], operator, 0.0, v, 0.3), whole)
        last = v.to(memory_format=torch.channels_last)
        r = scheme.residue([lambda t, x: last], operator, 0.0, last, 0.3)
    torch.testing.assert_close(r, whole)
    assert r.is_contiguous(memory_format=torch.channels_last)


def test_under_transforms_and_tangents():
    flow = drawn(ImplicitExplicit(channels=3))
    x, tangent = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    for p in flow.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(torch.func.vmap(lambda one: flow.record(one[None], check=False)[0][0])(x), flow(x))
    end, moved = torch.func.jvp(lambda x: flow.record(x, check=False)[0], (x,), (tangent,))
    torch.testing.assert_close(
        moved, (flow(x + 1e-6 * tangent) - flow(x - 1e-6 * tangent)) / 2e-6, rtol=1e-6, atol=1e-7
    )
    with torch.autograd.forward_ad.dual_level():
        dual = flow(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)
    torch.testing.assert_close(end, flow(x))


def test_narrow_dtypes_are_transformed_in_float32():
    flow = odenets.Flow(lambda: odenets.ConvField(4), solver=ImplicitExplicit(channels=4), depth=2)
    x = torch.randn(2, 4, 8, 8)
    wide = flow(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert flow(x).dtype == torch.float32
    half = copy.deepcopy(flow).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wide, rtol=0.1, atol=0.1)


def test_a_name_takes_its_channels_from_the_first_state():
    flow = odenets.Flow(lambda: odenets.ConvField(4), solver="imex", depth=2)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    known = odenets.Flow(lambda: odenets.ConvField(4), solver=ImplicitExplicit().of_channels(4), depth=2)
    flow.load_state_dict(known.state_dict())  # which makes them as well
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(flow(x), known(x))
    flow(x).square().mean().backward()
    kernel = flow.blocks[0].fields[1].kernel
    before = kernel.clone()
    optimizer.step()
    assert not torch.equal(kernel, before)
    fresh = odenets.Flow(lambda: odenets.ConvField(4), solver="imex", depth=1)
    with pytest.raises(ValueError, match="call network"):
        odenets.save_weights(fresh, "nowhere")
    with torch.inference_mode():
        fresh(x)
    fresh(x).sum().backward()


def test_a_graph_needs_an_operator_that_is_there():
    x = torch.randn(2, 4, 6, 6)
    known = odenets.Flow(lambda: odenets.ConvField(4), solver=ImplicitExplicit(channels=4), depth=2)
    torch.testing.assert_close(torch.compile(known, backend="aot_eager", fullgraph=True)(x), known(x))
    fresh = odenets.Flow(lambda: odenets.ConvField(4), solver="imex", depth=1)
    with pytest.raises(Exception, match=r"call the network once before torch\.compile|Observed exception"):
        torch.compile(fresh, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"kernel_size": 4}, ValueError, "kernel_size must be odd"),
        ({"kernel_size": 1}, ValueError, "kernel_size must be at least 3"),
        ({"dims": 1.5}, TypeError, "dims must be a whole number"),
        ({"operator": "laplacian"}, TypeError, "operator must be a kernel of numbers"),
        ({"operator": [[0.0, 1.0], [1.0, 0.0]]}, ValueError, "of odd sizes"),
        ({"operator": [[float("nan")]]}, ValueError, "finite"),
        ({"operator": -np.array(LAPLACIAN)}, ValueError, "IMEX solve with A not positive .* take -A"),
        ({"operator": [[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]}, ValueError, "not real"),
        ({"operator": [LAPLACIAN] * 2, "channels": 3}, ValueError, "one for each of 3 channels, got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ImplicitExplicit(**arguments)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (ImplicitExplicit(channels=3), (2, 4, 5, 5)),
        (ImplicitExplicit(channels=3), (2, 3)),
        (ImplicitExplicit(operator=[LAPLACIAN] * 3), (2, 4, 5, 5)),
        (ImplicitExplicit(operator=LAPLACIAN), (2, 4, 5)),
    ],
)
def test_states_of_another_shape_are_named(scheme, shape):
    class Zero(nn.Module):
        def forward(self, t, x):
            return 0 * x

    flow = odenets.Flow(Zero, solver=scheme)
    with pytest.raises(ValueError, match=rf"operator A of imex is, got shape \({shape[0]}, {shape[1]}"):
        flow(torch.randn(shape))
