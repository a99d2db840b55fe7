import pytest
import torch
from torch import nn

from odenets import Block, Flow, MLPField, Network, ReversibleFlow, load_weights, measures, save_weights
from odenets.analysis.memory import measure_memory
from odenets.depth import SampleSteps

D = torch.float64
SOLVERS = ["euler", "heun", "bs23", "rk4"]


def flow(depth=4, solver="bs23", coupling=0.99, **settings):
    return ReversibleFlow(MLPField(3).double(), solver=solver, depth=depth, coupling=coupling, **settings)


def start():
    return torch.randn(5, 3, dtype=D, requires_grad=True)


@pytest.mark.parametrize("settings", [{}, {"stage_fields": "untied"}, {"shared": True}, {"h": [0.1, 0.4, 0.2, 0.3]}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_undone_has_the_gradient_of_what_is_kept(solver, settings):
    network, x = flow(solver=solver, **settings), start()
    undone = network(x)
    last = [*network.steps(x, closing=False)][-1].x1
    torch.testing.assert_close(undone, last, rtol=1e-13, atol=1e-13)
    inputs = (x, *network.parameters())
    grads = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (undone, last)]
    for one, two in zip(*grads, strict=True):  # a field of a closing stage has none
        one, two = (torch.zeros(()) if g is None else g for g in (one, two))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


def test_it_is_near_the_flow_of_the_same_blocks():
    network, x = flow(depth=40, solver="rk4"), start()
    plain = Flow.of(list(network.blocks), solver="rk4")
    torch.testing.assert_close(network(x), plain(x), rtol=1e-4, atol=1e-5)


def test_measures_see_its_steps_and_their_gradients():
    network, x = flow(), start()
    y, records = network.record(x, action=measures.action)
    torch.testing.assert_close(y, network(x))
    assert records["action"].shape == (4, 5)
    records["action"].sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        torch.testing.assert_close(network(x), y)


def test_memory_does_not_grow_with_depth():
    def peak(depth):
        torch.manual_seed(0)
        network, x = flow(depth=depth, solver="euler", shared=True), torch.randn(256, 3, dtype=D)

        def work():
            network(x.clone().requires_grad_()).sum().backward()

        work()
        return measure_memory(work).peak

    assert peak(100) <= 1.02 * peak(10)


def test_a_network_of_it_learns_and_is_saved(tmp_path):
    network = Network(nn.Linear(2, 3).double(), flow(), nn.Linear(3, 2).double())
    x, labels = torch.randn(32, 2, dtype=D), torch.randint(2, (32,))
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.02), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_weights(network, tmp_path / "weights.safetensors")
    other = Network(nn.Linear(2, 3).double(), flow(), nn.Linear(3, 2).double())
    load_weights(other, tmp_path / "weights.safetensors")
    torch.testing.assert_close(other(x), network(x))
    assert "coupling=0.99" in repr(other)
    plain = Network(nn.Linear(2, 3).double(), Flow(MLPField(3).double(), depth=4), nn.Linear(3, 2).double())
    with pytest.raises(ValueError, match=r"must have the coupling that it was saved with, 0\.99, got None"):
        load_weights(plain, tmp_path / "weights.safetensors")


def test_evaluations_are_counted():
    network = flow(solver="rk4")
    seen = []
    for block in network.blocks:
        block.fields[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        [*network.steps(start(), closing=False)]
    assert len(seen) == network.evaluations - network.tableau.interior  # the last z is not needed


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"solver": "kvaerno5"}, ValueError, "explicit method"),
        ({"stage_fields": "chained"}, ValueError, "chained"),
        ({"coupling": 1.1}, ValueError, "coupling must be a number"),
    ],
)
def test_what_cannot_be_undone_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        flow(**settings)


def test_blocks_of_the_pair_are_not_walked_one_by_one():
    network = flow().float()
    with pytest.raises(ValueError, match="no sample skips"):
        SampleSteps(network, tolerance=0.1)(torch.randn(4, 3))


class Parts(nn.Module):
    """A field that reads a tensor outside of it, and drops some of its output."""

    def __init__(self, outside=None, drop=0.0):
        super().__init__()
        self.layer, self.drop, self.read = nn.Linear(3, 3).double(), drop, outside

    def forward(self, t, x):
        x = nn.functional.dropout(x, self.drop, self.training) if self.drop else x
        return torch.tanh(self.layer(x)) + (0 if self.read is None else torch.sin(x @ self.read[0]))


@pytest.mark.parametrize("reading", range(4))
def test_what_one_block_alone_reads_gets_its_gradient(reading):
    outside, grads = [torch.randn(3, 3, dtype=D, requires_grad=True)], []
    blocks = [Block([Parts(outside if m == reading else None)], 0.25) for m in range(4)]
    for network in (ReversibleFlow.of(blocks, solver="rk4"), Flow.of(blocks, solver="rk4")):
        grads += torch.autograd.grad(network(torch.ones(2, 3, dtype=D)).sum(), outside)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_dropout_of_a_later_block_is_refused():
    blocks = [Block([Parts(drop=0.1 * m)], 0.25) for m in range(4)]
    with pytest.raises(ValueError, match="draws random numbers"):
        ReversibleFlow.of(blocks, solver="euler")(torch.ones(2, 3, dtype=D))


def test_half_precision_and_second_derivatives_are_refused_and_autocast_is_not():
    network, x = flow().bfloat16(), start()
    with pytest.raises(TypeError, match="ReversibleFlow takes float32 or float64"):
        network(x.bfloat16())
    with pytest.raises(RuntimeError, match=r"no second derivatives.*odenets\.Flow"):
        torch.autograd.grad(flow()(x).sum() + x.square().sum(), x, create_graph=True)
    network = flow().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x.float())
    y.sum().backward()
    assert y.dtype == torch.float32


def test_states_that_end_far_apart_are_told_once():
    class Decay(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones((), dtype=D))

        def forward(self, t, x):
            return -self.rate * x

    network = ReversibleFlow(Decay, solver="rk4", depth=60, total_time=20.0)
    with pytest.warns(UserWarning, match="two states of a ReversibleFlow end further apart"):
        network(start()).sum().backward()
    network(start()).sum().backward()  # warnings are errors
    assert network._said_apart


def test_dropout_is_refused_and_full_passes_too():
    class Noisy(nn.Module):
        def forward(self, t, x):
            return nn.functional.dropout(x, 0.5, self.training)

    network = ReversibleFlow(lambda: Noisy(), solver="heun", depth=3)
    with pytest.raises(ValueError, match="draws random numbers"):
        network(torch.randn(4, 2, requires_grad=True))
    assert network.eval()(torch.randn(4, 2)).shape == (4, 2)
    with pytest.raises(ValueError, match="full_passes"):
        flow().outputs(start(), full_passes=True)
