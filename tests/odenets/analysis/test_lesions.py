"""Lesion studies: against networks built without the blocks, on several flows, adapted models and digits."""

import copy
from functools import partial

import pytest
import torch
import torchvision
from scipy.stats import kendalltau
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from odenets import Block, ConvField, Flow, MLPField, Network, NeuralODE, ReversibleFlow, adapt, models
from odenets.analysis import lesion_study, permuted_blocks, removed_blocks
from odenets.training import Batches, TensorData, fit
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Velocity


def batches_of(*shape, classes=3, sizes=(5, 3)):
    return [(torch.randn(n, *shape), torch.arange(n) % classes) for n in sizes]


def measured(network, batches):
    """Loss and accuracy over all samples."""
    network = copy.deepcopy(network).eval()
    x, y = (torch.cat(one) for one in zip(*batches, strict=True))
    with torch.no_grad():
        logits = network(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def two_flows(solver="euler"):
    flows = [
        Flow(lambda c=c: ConvField(c, norm="batch", time=True), solver=solver, depth=d, h=0.5)
        for c, d in ((2, 3), (4, 2))
    ]
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    return Network(nn.Conv2d(1, 2, 1), flows, head, transitions=[nn.Conv2d(2, 4, 1)])


class At(nn.Module):
    """A field at a time of its own, whatever the flow tells."""

    def __init__(self, field, t):
        super().__init__()
        self.field, self.t = field, t

    def forward(self, t, x):
        return self.field(self.t, x)


def rebuilt(network, order):
    """The network of these blocks in this order, each at its own time, built anew."""
    network = copy.deepcopy(network)
    flows, first = [], 0
    for flow in network.flows:
        taken = [m - first for m in order if first <= m < first + flow.depth]
        blocks = [Block([At(flow.blocks[m].fields[0], 0.5 * m)], 0.5) for m in taken]
        flows.append(
            Flow.of(blocks, solver="euler") if blocks else Flow(Velocity(lambda m, t, x: 0 * x), solver="euler")
        )
        first += flow.depth
    return Network(network.encoder, flows, network.head, transitions=[*network.transitions])


ORDERS = [(0, 1, 2, 3, 4), (1, 2, 3, 4), (0, 1, 4), (2, 0, 1, 4, 3), (0, 1, 2), (3, 4), ()]


def test_lesions_are_networks_of_the_other_blocks():
    torch.manual_seed(0)
    network, batches = two_flows(), batches_of(1, 4, 4)
    with unchanged(network):
        lesions = lesion_study(network, batches, ORDERS)
    assert lesions.names[3] == "flows.1 blocks.0"
    whole = measured(network, batches)
    assert (lesions.loss, lesions.accuracy) == pytest.approx(whole, rel=1e-5)
    assert len({*lesions.losses.tolist()}) == len(ORDERS)
    for order, loss, accuracy in zip(lesions.orders, lesions.losses, lesions.accuracies, strict=True):
        assert (loss.item(), accuracy.item()) == pytest.approx(measured(rebuilt(network, order), batches), rel=1e-4)


def test_by_default_each_block_is_removed_once():
    network, batches = two_flows("bs23"), batches_of(1, 4, 4)
    lesions = lesion_study(network, batches)
    assert lesions.orders == ((1, 2, 3, 4), (0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3))
    for block in network.flows[1].blocks:
        nn.init.zeros_(block.fields[0].conv2.weight)  # they are the identity already
    lesions = lesion_study(network, batches)
    torch.testing.assert_close(lesions.losses[3:], torch.full((2,), lesions.loss))
    assert (lesions.losses[:3] - lesions.loss).abs().min() > 1e-6


def test_a_shared_block_is_left_out_once():
    torch.manual_seed(0)
    flow = Flow(MLPField(2, time=True), solver="euler", h=0.5, depth=3, shared=True)
    network, batches = Network(nn.Identity(), flow, nn.Linear(2, 3)), batches_of(2)
    lesions = lesion_study(network, batches)
    field, (x, y) = flow.blocks[0].fields[0], (torch.cat(one) for one in zip(*batches, strict=True))
    for order, loss in zip(lesions.orders, lesions.losses, strict=True):
        state = x
        for m in order:
            state = state + 0.5 * field(0.5 * m, state)
        assert loss.item() == pytest.approx(F.cross_entropy(network.head(state), y).item(), rel=1e-5)


def residual(field):
    return Calling(lambda m, x: x + m.field(0.0, x), field=field)


def test_an_adapted_model_is_lesioned_as_the_network_of_its_steps():
    torch.manual_seed(0)
    fields, head = [MLPField(3) for _ in range(3)], nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(2, 3), *map(residual, fields), head)
    network = Network(model[0], Flow(iter(fields).__next__, solver="euler", depth=3, h=1.0), head)
    batches, orders = batches_of(2), [(1, 2), (0, 1), (1,), ()]
    adapted = adapt(model)
    with unchanged(model):
        theirs = lesion_study(adapted, batches, orders)
    ours = lesion_study(network, batches, orders)
    assert theirs.names == ("1", "2", "3")
    assert (theirs.loss, theirs.accuracy) == pytest.approx((ours.loss, ours.accuracy))
    torch.testing.assert_close(theirs.losses, ours.losses)
    torch.testing.assert_close(theirs.accuracies, ours.accuracies)
    assert len(removed_blocks(adapted, 2)[0]) == 1
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, MLPField))


def test_blocks_of_a_published_network_that_begin_with_a_projection_stay():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    lesions = lesion_study(adapt(model), batches_of(3, 32, 32, sizes=(4,)))
    assert lesions.names == ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")
    other = copy.deepcopy(model)
    other.layer3[1] = nn.Identity()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4) % 3
    assert lesion_study(adapt(model), [(x, y)]).losses[3].item() == pytest.approx(
        F.cross_entropy(other(x), y).item(), rel=1e-5
    )


def test_transformers_lose_both_steps_of_a_block():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=3).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    lesions = lesion_study(adapt(model), [(x, y)])
    assert len(lesions.names) == 3
    model.encoder.layers[1] = nn.Identity()
    assert lesions.losses[1].item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)


def test_orders_are_drawn_by_the_seed():
    network = two_flows()
    for _ in range(2):
        orders = removed_blocks(network, 2, draws=20, seed=3)
        assert orders == removed_blocks(network, 2, draws=20, seed=3)
        assert {len(order) for order in orders} == {3}
        assert len({*orders}) > 5
    for order in permuted_blocks(network, 3, draws=20):
        assert sorted(order[:3]) == [0, 1, 2]
        assert sorted(order[3:]) == [3, 4]
    assert permuted_blocks(network, 0, draws=1) == [(0, 1, 2, 3, 4)]


def test_kendalls_tau_is_that_of_scipy():
    network, batches = two_flows(), batches_of(1, 4, 4, sizes=(2,))
    lesions = lesion_study(network, batches, permuted_blocks(network, 2, draws=5))
    for order, tau in zip(lesions.orders, lesions.kendall_tau, strict=True):
        assert tau.item() == pytest.approx(kendalltau(range(5), order).statistic)


def test_trained_on_digits_a_network_loses_little_by_one_block_and_more_by_more():
    torch.manual_seed(0)
    x, y = (torch.tensor(one) for one in load_digits(return_X_y=True))
    x = x.float() / 16
    flow = Flow(MLPField(32, 32), solver="euler", h=1.0, depth=8)
    network = Network(nn.Linear(64, 32), flow, nn.Linear(32, 10))
    adam = partial(torch.optim.Adam, lr=3e-3)
    fit(network, Batches(TensorData(x[:1000], y[:1000]), 100, seed=0), epochs=12, optimizer=adam)
    held_out = [(x[1000:], y[1000:])]
    one = lesion_study(network, held_out)
    assert one.accuracy > 0.85
    means = [
        lesion_study(network, held_out, removed_blocks(network, count)).losses.mean().item() for count in (1, 4, 7)
    ]
    assert means[0] < means[1] < means[2]
    assert means[0] < 1.2 * one.loss
    assert one.accuracies.mean() > 0.7


MLP = MLPField(2)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: lesion_study(nn.Linear(2, 2), batches_of(2)), TypeError, r"got Linear: pass adapt\(network\)"),
        (lambda: lesion_study(None, batches_of(2)), TypeError, "got NoneType"),
        (lambda: lesion_study(models.points_network(), 3), TypeError, "batches must be an iterable"),
        (lambda: lesion_study(models.points_network(), []), ValueError, "at least one batch"),
        (lambda: lesion_study(models.points_network(), torch.randn(3, 2)), TypeError, "must hold pairs"),
        (lambda: lesion_study(models.points_network(readout="ensemble"), batches_of(2)), ValueError, "read the solu"),
        (
            lambda: lesion_study(Network(nn.Identity(), NeuralODE(MLP), nn.Identity()), batches_of(2)),
            TypeError, "must be of Flows, whose blocks can be removed, got a NeuralODE",
        ),
        (
            lambda: lesion_study(Network(nn.Identity(), ReversibleFlow(MLP), nn.Identity()), batches_of(2)),
            ValueError, "must not hold a ReversibleFlow",
        ),
        (
            lambda: lesion_study(
                Network(nn.Identity(), Flow(lambda: MLPField(2), depth=2, stage_fields="chained"), nn.Identity()),
                batches_of(2)),
            ValueError, "flow 0 has chained fields",
        ),
        (lambda: removed_blocks(Network(nn.Identity(), Flow(), nn.Identity()), 1), ValueError, "has no field yet"),
        (lambda: lesion_study(two_flows(), batches_of(1, 4, 4), [(0, 5)]), ValueError, "numbers of blocks below 5"),
        (lambda: lesion_study(two_flows(), batches_of(1, 4, 4), [(0, 0)]), ValueError, "each at most once"),
        (lambda: lesion_study(two_flows(), batches_of(1, 4, 4), [(3, 0)]), ValueError, "blocks of a flow before those"),
        (lambda: lesion_study(two_flows(), batches_of(1, 4, 4), [(0.5,)]), TypeError, "orders must be a whole number"),
        (
            lambda: lesion_study(adapt(nn.Sequential(residual(MLP), residual(MLP)), blocks=["0", "1"]), batches_of(2),
                                 [(1, 0)]),
            ValueError, "must leave blocks of an adapted model out, and not exchange them",
        ),
        (lambda: removed_blocks(two_flows(), 6), ValueError, "count must be at most the number of blocks, 5, got 6"),
        (lambda: permuted_blocks(models.points_network(depth=1), 1), ValueError, "a flow of at least two blocks"),
        (lambda: permuted_blocks(adapt(nn.Sequential(residual(MLP)), blocks=["0"]), 1), TypeError, "left out alone"),
    ],
)  # fmt: skip
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()
