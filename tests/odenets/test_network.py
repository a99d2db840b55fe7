import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, Recorder, Records, adapt, measures
from tests.odenets.networks import Velocity


@pytest.fixture
def network():
    flows = [Flow(lambda: MLPField(4), depth=2), Flow(lambda: MLPField(6), depth=3, total_time=2.0)]
    return Network(nn.Linear(3, 4), flows, nn.Linear(6, 2), transitions=[nn.Linear(4, 6)])


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_one_function_through_forward_record_steps_and_by_hand(network):
    output = network(X)
    recorded, records = network.record(X, action=measures.action, error=measures.error)
    assert torch.equal(output, recorded)
    *_, last = network.steps(X)
    torch.testing.assert_close(network.head(last.x1), output)
    first, second = network.flows
    torch.testing.assert_close(network.head(second(network.transitions[0](first(network.encoder(X))))), output)
    assert records.starts == (0, 2)
    assert records["action"].shape == records["error"].shape == (5, 5)
    torch.testing.assert_close(records["action"], torch.stack([measures.action(step) for step in network.steps(X)]))


@pytest.mark.parametrize("readout", ["solution", "ensemble"])
def test_a_network_takes_what_a_flow_overrides(readout):
    """Such as one that another library integrates."""

    class Doubling(Flow):
        def record(self, x, /, *, readout="solution", check=True, **measures):
            return 2 * x, Records(dict.fromkeys(measures, x[None, :, 0]))

        def steps(self, x, **options):
            return iter([])

        def outputs(self, x, **options):
            return {"only": 2 * x}

    net = Network(nn.Identity(), [Doubling(), Doubling()], nn.Identity(), transitions=[nn.Identity()], readout=readout)
    output, records = net.record(X, first=measures.action)
    assert torch.equal(output, 4 * X)
    assert torch.equal(net(X), 4 * X)
    assert torch.equal(net.ensemble(X), 4 * X)
    assert torch.equal(records["first"], torch.stack([X[:, 0], 2 * X[:, 0]]))
    assert list(net.steps(X)) == []


def test_a_network_that_diverges_can_be_measured():
    flows = [Flow(Velocity(lambda m, t, x: x * torch.inf), solver="bs23", shared=True) for _ in range(2)]
    net = Network(nn.Identity(), flows, nn.Identity(), transitions=[nn.Identity()])
    assert net.record(X, action=measures.action)[1]["action"].shape == (2, 5)
    assert len(list(net.steps(X))) == 2
    assert not net.ensemble(X).isfinite().any()


def test_sizes(network):
    assert network.depth == 5
    assert network.evaluations == 15
    network.readout = "ensemble"
    assert network.evaluations == 6 + 10


def test_outputs_of_the_last_flow(network):
    outputs = network.outputs(X)
    assert set(outputs) == {"euler", "midpoint", "order2", "order3", "ensemble"}
    torch.testing.assert_close(outputs["order3"], network(X))
    *_, last = network.steps(X)
    for name in ("euler", "midpoint", "order2"):
        torch.testing.assert_close(outputs[name], network.head(last.output(name)))
    torch.testing.assert_close(network.ensemble(X), outputs["ensemble"])
    network.readout = "ensemble"
    torch.testing.assert_close(network(X), outputs["ensemble"])


def test_full_passes_are_the_networks_of_the_other_methods(network):
    outputs = network.outputs(X, full_passes=True)
    for name in ("euler", "midpoint"):
        other = Flow(lambda: MLPField(6), solver=name, depth=3, total_time=2.0)
        other.load_state_dict(network.flows[1].state_dict())
        state = other(network.transitions[0](network.flows[0](network.encoder(X))))
        torch.testing.assert_close(outputs[name], network.head(state))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_another_dtype_are_named(network, dtype):
    with pytest.raises(TypeError, match=f"x must have the dtype of the network, {dtype}, got torch.float32"):
        network.to(dtype)(X)
    assert network(X.to(dtype)).dtype == dtype
    assert network.ensemble(X.to(dtype)).dtype == dtype


@pytest.mark.filterwarnings("ignore:the branches of .* end in a batch norm")
def test_what_records_its_steps_is_a_recorder(network):
    network(X)
    adapted = adapt(resnet18(), torch.rand(2, 3, 32, 32))
    assert all(isinstance(each, Recorder) for each in (network, network.flows[0], adapted))
    assert not isinstance(network.head, Recorder)


def test_an_error_of_the_encoder_stays_its_own(network):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network(X[:, :2])


def test_inputs_of_another_device_are_named(network):
    with pytest.raises(ValueError, match="x must be on the device of the network, cpu, got meta"):
        network(X.to("meta"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Network(nn.Identity(), [], nn.Identity()), "at least one flow"),
        (lambda f: Network(nn.Identity(), [f, f], nn.Identity()), "2 flows need 1 transitions, got 0"),
        (lambda f: Network(nn.Identity(), f, nn.Identity(), readout="mean"), "readout must be 'solution' or 'ens"),
        (lambda f: Network(nn.Identity(), f, nn.Identity())(torch.full((2, 3), float("nan"))), "finite"),
        (lambda f: Network(nn.Identity(), f, nn.Identity())(torch.empty(0, 3)), "at least one sample"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(Flow(MLPField(3)))


class Conditioned(nn.Module):
    def forward(self, t, x, c, scale=1.0):
        return scale * (c - x)


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
def test_what_follows_x_reaches_every_field(stage_fields):
    flow = Flow(Conditioned, solver="bs23", depth=3, stage_fields=stage_fields)
    network = Network(
        nn.Identity(),
        [flow, NeuralODE(Conditioned(), steps=3, solver="bs23")],
        nn.Identity(),
        transitions=[nn.Identity()],
    )
    x, c = torch.randn(2, 5, 6)
    bound = Flow(lambda: Velocity(lambda m, t, x: 2 * (c - x)), solver="bs23", depth=3)
    expected = bound(bound(x))
    torch.testing.assert_close(network(x, c, 2.0), expected)
    torch.testing.assert_close(network.record(x, c, 2.0, action=measures.action)[0], expected)
    torch.testing.assert_close([*network.steps(x, c, 2.0)][-1].x1, expected)
    torch.testing.assert_close(flow.outputs(x, c, 2.0)["order2"], bound.outputs(x)["order2"])
    torch.testing.assert_close(flow.ensemble(x, c, 2.0, full_passes=True), bound.ensemble(x, full_passes=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Flow(MLPField(6))(X, X),
            r"t, x and 1 further, as v\(t, x, c\), but MLPField takes \(t, x\) \(no further arg",
        ),
        (lambda: Flow(MLPField(6), stage_fields="untied")(X, X), "field must take t, x and 1 further"),
        (lambda: Flow(Conditioned)(X), r"field must take t and x.*missing a required argument: 'c'"),
        (lambda: Flow(nn.Linear(6, 6)), "field must take t and x.*wrap a network without t"),
        (lambda: Flow(lambda: nn.Linear(6, 6)), "field must take t and x"),
        (lambda: Flow(lambda t, x: -x), "got a function of t and x.*odenets.NeuralODE takes it as it is"),
        (lambda: Flow(MLPField(6), steps=3), "Flow takes no 'steps'"),
        (lambda: Flow(MLPField(6))(X, "ensemble"), "readout, full_passes and check are keywords"),
    ],
)
def test_fields_of_other_arguments_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_inputs_of_integers_are_named(dtype):
    network = Network(nn.Linear(3, 4), Flow(MLPField(4)), nn.Linear(4, 2))
    with pytest.raises(
        TypeError, match=r"x must be of the floating dtype of the network, torch.float32.*x.float\(\) / 255"
    ):
        network(torch.ones(5, 3, dtype=dtype))
    assert Network(nn.Embedding(9, 4), Flow(MLPField(4)), nn.Linear(4, 2))(torch.arange(5)).shape == (5, 2)


def test_an_image_without_a_batch_dimension_is_named():
    network = Network(nn.Conv2d(3, 8, 3, padding=1), Flow(ConvField(8, norm="batch")), nn.Identity())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 8, ...\).*got \(8, 6, 6\): a sample without a batch"):
        network(torch.ones(3, 6, 6))
