"""Gradients that undo steps are those of backpropagation, in the memory of two parts of a state; states are undone."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import odenets
from odenets import measures
from odenets.analysis import measure_memory
from odenets.least_action import LeastAction
from odenets.normalization import StageBatchNorm
from odenets.schemes import CoupledHalves, HeavyBall, Momentum, ReversibleScheme
from odenets.schemes.names import SCHEMES
from tests.odenets.schemes.fields import Tanh

D = torch.float64
REVERSIBLE = {name: scheme for name, scheme in SCHEMES.items() if isinstance(scheme, ReversibleScheme)}
EVERY = [*REVERSIBLE.values(), Momentum(0.0), Momentum(0.5), Momentum(1e-6), HeavyBall(20.0)]


def pair(scheme, field=odenets.MLPField, depth=30, dtype=D, **settings):
    """A flow that undoes its steps and one of its blocks that keeps them, and a state of four features."""
    channels = 2 if isinstance(scheme, CoupledHalves) else 4
    settings = {"h": 0.2} | settings
    flow = odenets.Flow(lambda: field(channels), solver=scheme, depth=depth, **settings).to(dtype)
    kept = odenets.Flow.of(list(flow.blocks), flow.h, solver=replace(scheme, reversible=False), shared=flow.shared)
    return flow, kept, torch.randn(5, 4, dtype=dtype, requires_grad=True)


def gradients(flow, x, *args, inputs=None):
    y = flow(x, *args)
    inputs = [p for p in (x, *flow.parameters()) if p.requires_grad] if inputs is None else inputs
    return y, torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)


def assert_gradients(one, other, rtol):
    most = max(b.abs().max() for b in other if b is not None)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= rtol * most


@pytest.mark.parametrize("scheme", EVERY, ids=repr)
@pytest.mark.parametrize(("dtype", "rtol"), [(D, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"h": [0.1 + 0.2 * (m % 2) for m in range(30)]}])
def test_what_is_undone_has_the_gradient_of_what_is_kept(scheme, dtype, rtol, settings):
    flow, kept, x = pair(scheme, dtype=dtype, **settings)
    (y, ours), (wanted, theirs) = gradients(flow, x), gradients(kept, x)
    torch.testing.assert_close(y, wanted, rtol=10 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
    assert_gradients(ours, theirs, rtol)


@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(D, 1e-10), (torch.float32, 2e-5)])
def test_momentum_of_a_hundred_blocks_keeps_what_rounding_would_take(gamma, dtype, rtol):
    flow, kept, x = pair(Momentum(gamma), depth=100, dtype=dtype, h=0.1)
    assert_gradients(gradients(flow, x)[1], gradients(kept, x)[1], rtol)


class Counting(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer, self.calls = nn.Linear(channels, channels), 0

    def forward(self, t, x):
        self.calls += 1
        return torch.tanh(self.layer(x))


def peak(scheme, depth):
    torch.manual_seed(0)
    field = odenets.MLPField(32 if isinstance(scheme, CoupledHalves) else 64, hidden=256)
    flow, x = odenets.Flow(field, solver=scheme, depth=depth, shared=True), torch.randn(64, 64)

    def work():
        flow(x.clone().requires_grad_()).sum().backward()

    work()
    return measure_memory(work).peak


@pytest.mark.parametrize("name", REVERSIBLE)
def test_memory_of_training_does_not_grow_with_depth(name):
    scheme = REVERSIBLE[name]
    few, many = peak(scheme, 10), peak(scheme, 100)
    assert many <= 1.1 * few  # momentum keeps one pair of states on the way
    assert name not in ("revnet", "momentum") or peak(replace(scheme, reversible=False), 100) > 5 * many


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_training_step_calls_each_velocity_once_more(name):
    flow, _, x = pair(REVERSIBLE[name], Counting)
    flow(x).sum().backward()
    calls = sum(module.calls for module in flow.modules() if isinstance(module, Counting))
    assert calls == 2 * flow.evaluations


@pytest.mark.parametrize("name", REVERSIBLE)
@settings(max_examples=20)
@given(
    depth=st.integers(1, 20), h=st.floats(0.01, 0.3), size=st.floats(0.1, 10), dtype=st.sampled_from([torch.float32, D])
)
def test_states_are_undone(name, depth, h, size, dtype):
    torch.manual_seed(depth)
    scheme = HeavyBall(0.1) if name == "heavy_ball" else Momentum(0.98) if name == "momentum" else REVERSIBLE[name]
    flow, _, x = pair(scheme, Tanh, depth, h=h)
    flow, x = flow.to(dtype), (size * x.detach()).to(dtype)
    if dtype == torch.float32:
        for module in flow.modules():
            if isinstance(module, Tanh):
                module.layer.float()
    with torch.no_grad():
        *_, last = flow.steps(x)
        back = flow.inverse(last.x1, memory=last.residue if scheme.memory else None)
    scale = max(1.0, last.x1.abs().max().item())
    assert (back - x).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-12) * scale


@pytest.mark.parametrize("name", REVERSIBLE)
def test_parts_are_undone_with_what_is_handed_on(name):
    flow, _, x = pair(REVERSIBLE[name], depth=6)
    parts, states = [flow.part(m, m + 2) for m in (0, 2, 4)], [x]
    for part in parts:
        states.append(part(states[-1]))
    torch.testing.assert_close(states[-1], flow(x), rtol=1e-13, atol=1e-13)
    assert_gradients(
        torch.autograd.grad(states[-1].square().sum(), [x, *flow.parameters()]), gradients(flow, x)[1], 1e-10
    )
    for part, before, after in [*zip(parts, states, states[1:], strict=False)][:2]:
        torch.testing.assert_close(part.inverse(after), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_statistics_are_updated_once(name):
    flow, kept, x = pair(REVERSIBLE[name], lambda c: odenets.MLPField(c, norm="batch"), depth=3)
    norms = [module for module in flow.modules() if isinstance(module, StageBatchNorm)]

    def step(network):
        for norm in norms:
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
            norm.batches.zero_()
        grads = gradients(network, x)[1]
        return grads, [buffer.clone() for norm in norms for buffer in norm.buffers()]

    (ours, counted), (theirs, wanted) = step(flow), step(kept)
    assert_gradients(ours, theirs, 1e-10)
    torch.testing.assert_close(counted, wanted)
    with pytest.raises(
        ValueError, match=r"StageBatchNorm in training mode, and the inverse calls its fields once more"
    ):
        flow.inverse(x)


class Dropping(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layer, self.drop = nn.Linear(channels, channels), nn.Dropout(0.5)

    def forward(self, t, x):
        return self.drop(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("name", REVERSIBLE)
def test_random_numbers_are_drawn_again(name):
    flow, kept, x = pair(REVERSIBLE[name], Dropping, depth=4)
    ends = []
    for network in (flow, kept):
        torch.manual_seed(3)
        ends.append((*gradients(network, x), torch.get_rng_state()))
    (y, ours, state), (wanted, theirs, other) = ends
    torch.testing.assert_close(y, wanted, rtol=1e-13, atol=1e-13)
    assert_gradients(ours, theirs, 1e-10)
    assert torch.equal(state, other)
    with pytest.raises(ValueError, match="inverse: the flow draws random numbers"):
        flow.inverse(y.detach(), memory=torch.zeros_like(x) if REVERSIBLE[name].memory else None)


def test_what_fields_take_besides_gets_its_gradient():
    class Conditioned(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.layer = nn.Linear(channels, channels)

        def forward(self, t, x, c):
            return torch.tanh(self.layer(x) + c)

    for scheme in (SCHEMES["revnet"], SCHEMES["second_order"]):
        flow, kept, x = pair(scheme, Conditioned)
        c = torch.randn(5, 1, dtype=D, requires_grad=True)
        ours, theirs = (gradients(f, x, c.exp(), inputs=[x, c, *flow.parameters()])[1] for f in (flow, kept))
        assert_gradients(ours, theirs, 1e-10)


def test_what_is_frozen_gets_none():
    flow, kept, x = pair(SCHEMES["revnet"])
    for p in flow.blocks[3].parameters():
        p.requires_grad_(False)
    assert_gradients(gradients(flow, x)[1], gradients(kept, x)[1], 1e-10)
    x = x.detach()
    assert_gradients(gradients(flow, x)[1], gradients(kept, x)[1], 1e-10)
    flow.requires_grad_(False)
    assert not flow(x).requires_grad
    assert torch.autograd.grad(flow(x.requires_grad_()).sum(), x)[0].isfinite().all()


def test_what_one_block_alone_reads_gets_its_gradient():
    outside = torch.randn(4, 4, dtype=D, requires_grad=True)

    class Reading(nn.Module):
        def __init__(self, channels, reads=False):
            super().__init__()
            self.layer, self.reads = nn.Linear(channels, channels), [outside] if reads else []

        def forward(self, t, x):
            return torch.tanh(self.layer(x) + sum(x @ w for w in self.reads))

    blocks = [odenets.Block([Reading(4, reads=m == 2).double()], 0.2) for m in range(5)]
    x = torch.randn(5, 4, dtype=D, requires_grad=True)
    ours, theirs = (
        gradients(odenets.Flow.of(blocks, solver=replace(SCHEMES["momentum"], reversible=r)), x, inputs=[x, outside])
        for r in (True, False)
    )
    assert_gradients(ours[1], theirs[1], 1e-10)


def test_what_a_block_reads_at_a_later_pass_alone_is_not_lost():
    outside, read = torch.randn(4, 4, dtype=D, requires_grad=True), []

    class Later(nn.Module):
        def __init__(self, reads=False):
            super().__init__()
            self.layer, self.reads = nn.Linear(4, 4, dtype=D), read if reads else []

        def forward(self, t, x):
            return torch.tanh(self.layer(x) + sum(x @ w for w in self.reads))

    flow = odenets.Flow.of([odenets.Block([Later(m == 4)], 0.2) for m in range(5)], solver="momentum")
    x = torch.randn(5, 4, dtype=D)
    flow(x).sum().backward()
    read.append(outside)
    end = flow(x).sum()
    with pytest.raises(RuntimeError, match=r"flow reads a tensor of shape \(4, 4\).*its gradient would be lost"):
        end.backward()


def test_measured_steps_are_kept_and_have_the_same_gradient():
    flow, _, x = pair(SCHEMES["hamiltonian"])
    y, records = flow.record(x, action=measures.action)
    assert_gradients(torch.autograd.grad(y.square().sum(), [x, *flow.parameters()]), gradients(flow, x)[1], 1e-10)
    records["action"].sum()
    network = odenets.Network(nn.Identity(), flow, nn.Linear(4, 3, dtype=D))
    LeastAction()(network, x, torch.arange(5) % 3).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_autocast_is_as_the_forward_pass_had_it():
    flow, kept, x = pair(SCHEMES["revnet"], dtype=torch.float32)
    ends = []
    for network in (flow, kept):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        ends.append((y, torch.autograd.grad(y.square().sum(), [x, *flow.parameters()])))
    assert ends[0][0].dtype == torch.float32
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(ends[0][1], ends[1][1], strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_transforms_and_tangents_keep_the_steps():
    flow, kept, x = pair(SCHEMES["momentum"], depth=3)
    x = x.detach()
    wanted = torch.func.jacrev(kept)(x)
    torch.testing.assert_close(torch.func.jacrev(flow)(x), wanted)
    parameters = dict(flow.named_parameters())
    loss = lambda p, x: torch.func.functional_call(flow, p, (x[None],)).sum()  # noqa: E731
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    flow(x).sum().backward()
    for name, p in flow.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad)
    way = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        end = torch.autograd.forward_ad.unpack_dual(flow(torch.autograd.forward_ad.make_dual(x, way)))
    torch.testing.assert_close(end.tangent, torch.einsum("bdce,ce->bd", wanted, way))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_flow_is_checkpointed(reentrant):
    flow, kept, x = pair(SCHEMES["revnet"], depth=3)
    checkpoint(flow, x, use_reentrant=reentrant).square().sum().backward()
    assert_gradients([x.grad], gradients(kept, x)[1][:1], 1e-10)


def test_threads_train_one_network():
    flow, _, _ = pair(SCHEMES["revnet"])
    inputs = torch.randn(4, 5, 4, dtype=D)
    wanted = [gradients(flow, x.clone().requires_grad_())[1][0] for x in inputs]
    got = [None] * 4

    def work(i):
        got[i] = gradients(flow, inputs[i].clone().requires_grad_())[1][0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(got, wanted)


def test_gradients_may_be_taken_twice_and_the_output_overwritten():
    flow, kept, x = pair(SCHEMES["second_order"])
    y = flow(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    ours, theirs = (torch.autograd.grad(f(x).relu_().sum(), x)[0] for f in (flow, kept))
    torch.testing.assert_close(ours, theirs)


class Growing(nn.Module):
    """``x``, by which one mode of coupled halves grows, and the other one on the way back."""

    def __init__(self, channels):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, t, x):
        return self.rate * x


def test_what_cannot_be_undone_is_refused():
    flow, kept, x = pair(SCHEMES["revnet"])
    growing, _, _ = pair(SCHEMES["revnet"], Growing, depth=60, h=0.5)
    with pytest.raises(RuntimeError, match=r"solver='revnet': undone, 60 steps end .* away from where they began"):
        growing(x.detach()).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"solver='revnet' has no second derivatives.*RevNet\(\.\.\., reversible=False"
    ):
        torch.autograd.grad(flow(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(kept(x).sum(), x, create_graph=True)[0].requires_grad
    with pytest.raises(TypeError, match="solver='revnet' takes float32 or float64"):
        pair(SCHEMES["revnet"], dtype=torch.bfloat16)[0](x.bfloat16())
    with pytest.raises(ValueError, match=r"solver must be a scheme whose steps can be undone, got bs23: 'revnet'"):
        odenets.Flow(odenets.MLPField(4)).inverse(x.float())
    with pytest.raises(ValueError, match="memory must not be given with revnet"):
        flow.inverse(x, memory=x)
    with pytest.raises(ValueError, match=r"memory must be the residue of the last step.*got NoneType"):
        pair(SCHEMES["momentum"])[0].inverse(x)
    with pytest.raises(ValueError, match=r"inverse would make 5\.4e\+08 times of rounding in 30 steps of momentum"):
        pair(Momentum(0.5), dtype=torch.float32, depth=30)[0].inverse(x.float(), memory=x.float())


def test_it_is_loaded_whether_it_undoes_or_keeps(tmp_path):
    flow, kept, x = pair(SCHEMES["momentum"])
    flow(x)
    odenets.save_weights(flow, tmp_path / "weights.safetensors")
    with torch.no_grad():
        wanted = flow(x)
        for p in kept.parameters():
            p.zero_()
    kept(x)
    odenets.load_weights(kept, tmp_path / "weights.safetensors")
    torch.testing.assert_close(kept(x), wanted)
