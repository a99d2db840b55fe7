import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import odenets
from odenets import ConvField, Flow, MLPField, Network, NeuralODE
from odenets.depth import (
    AdaptiveDepth,
    DepthRule,
    Doubling,
    ElasticDepth,
    SampleSteps,
    Stacking,
    adapt_depth,
    at_depth,
    double,
    stack,
)
from odenets.training import Batches, Run, TensorData, fit
from tests.odenets.depth.networks import X, check_alignment, network, train

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
DATA = TensorData(X, (X.sum(1) > 0).long())


@pytest.mark.parametrize("stage_fields", ["tied", "untied", "chained"])
def test_doubling_puts_each_copy_behind_its_original_and_halves_both(stage_fields):
    net = network(depth=3, flows=2, stage_fields=stage_fields)
    net.flows[0].resize([0.5, 0.3, 0.2])
    before = [[copy.deepcopy(block.state_dict()) for block in flow.blocks] for flow in net.flows]
    edits = double(net)
    assert net.flows[0].h == (0.25, 0.25, 0.15, 0.15, 0.1, 0.1)
    assert [flow.total_time for flow in net.flows] == pytest.approx([1, 1])
    assert [(e.kind, e.flow, e.block) for e in edits] == [("duplicate", i, m) for i in (0, 1) for m in (0, 1, 2)]
    assert edits[1].h == (0.3, 0.15)
    for flow, states in zip(net.flows, before, strict=True):
        for m, block in enumerate(flow.blocks):
            assert all(torch.equal(value, states[m // 2][name]) for name, value in block.state_dict().items())
    assert len({id(p) for p in net.parameters()}) == len([p for block in before for s in block for p in s]) * 2 + 4


def test_the_doubled_network_computes_nearly_what_it_did_and_the_stacked_one_its_flow_twice():
    net = network(depth=8)
    end = net(X)
    double(net)
    torch.testing.assert_close(net(X), end, rtol=0, atol=1e-4)
    flow = net.flows[0]
    twice = flow(flow(X))
    stack(Network(nn.Identity(), flow, nn.Identity()))
    torch.testing.assert_close(flow(X), twice)  # the time goes on, of which these fields know nothing


@pytest.mark.parametrize(("rescale", "sizes"), [(False, (0.6, 0.4) * 2), (True, (0.3, 0.2) * 2)])
def test_stacking_copies_all_blocks_on_top(rescale, sizes):
    net = network(depth=2)
    net.flows[0].resize([0.6, 0.4])
    first, second = net.flows[0].blocks
    edits = stack(net, rescale=rescale)
    assert net.flows[0].h == pytest.approx(sizes)
    a, b, c, d = net.flows[0].blocks
    assert (a, b) == (first, second)
    assert torch.equal(a.fields[0].first.weight, c.fields[0].first.weight)
    assert torch.equal(b.fields[0].first.weight, d.fields[0].first.weight)
    assert "flow 0 block 1: copied on top, h 0.4 -> " in str(edits[1])


@pytest.mark.parametrize("grow", [double, stack])
def test_the_state_of_the_optimizer_follows(grow):
    net = network(depth=2)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    train(net, optimizer)
    grow(net, optimizer)
    check_alignment(net, optimizer)
    assert set(optimizer.state) == set(net.parameters())
    original, twin = (net.flows[0].blocks[m].fields[0].first.weight for m in ((0, 1) if grow is double else (0, 2)))
    assert torch.equal(optimizer.state[original]["exp_avg"], optimizer.state[twin]["exp_avg"])
    train(net, optimizer)
    assert not torch.equal(original, twin)


def test_an_optimizer_that_is_not_given_is_warned_of():
    net = network(depth=2)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with pytest.warns(UserWarning, match="parameters of new blocks are in no optimizer"):
        double(net)
    assert len(optimizer.param_groups[0]["params"]) < len(list(net.parameters()))


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (Flow(MLPField(3), depth=2, shared=True), "flow 0 has one field for all its steps"),
        (NeuralODE(MLPField(3)), "flow 0 has one field for all its steps"),
        (Flow(depth=2), "flow 0 has no field yet: call the network once"),
    ],
)
def test_flows_whose_blocks_cannot_be_copied_are_refused(flow, message):
    for grow in (double, stack):
        with pytest.raises(ValueError, match=message):
            grow(Network(nn.Identity(), flow, nn.Linear(3, 2)))


def test_weights_that_are_not_finite_and_optimizers_that_cannot_follow_are_refused():
    net = network()
    with pytest.raises(ValueError, match="LBFGS"):
        double(net, torch.optim.LBFGS(net.parameters()))
    net.head.bias.data[0] = math.nan
    with pytest.raises(ValueError, match=r"weights that are not finite, .*: head.bias"):
        stack(net)
    assert net.depth == 3


def test_fixed_residual_networks_grow_too():
    net = Network(nn.Identity(), Flow(MLPField(3), solver="euler", depth=1, h=1.0), nn.Linear(3, 2))
    stack(net)
    double(net)
    assert net.flows[0].h == (0.5,) * 4


@pytest.mark.parametrize("callback", [Doubling([1, 3]), Stacking([1, 3])])
def test_a_network_grows_after_the_given_epochs(callback):
    net = network(depth=1)
    training = fit(net, Batches(DATA, 16), epochs=4, optimizer=SGD, callbacks=[callback])
    assert [row["depth"] for row in training.rows] == [1, 2, 2, 4]
    assert [len(row["edits"].split("; ")) if row["edits"] else 0 for row in training.rows] == [1, 0, 2, 0]
    assert training.evaluations == 32 * 3 * (1 + 2 + 2 + 4)
    assert net.flows[0].total_time == pytest.approx(1 if type(callback) is Doubling else 4)
    check_alignment(net, training.optimizer)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2),
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9),  # no loss is low enough
    ],
)
def test_the_schedule_of_learning_rates_begins_anew_where_it_is_asked_to(scheduler):
    rates = {}
    for restart in (False, True):
        options = {"lr_scheduler": scheduler, "callbacks": [Doubling([2], restart=restart)]}
        rows = fit(network(depth=1), Batches(DATA, 16), epochs=4, optimizer=SGD, **options).rows
        rates[restart] = [row["learning_rate"] for row in rows]
    assert rates[True][2:] == rates[True][:2] == rates[False][:2]
    assert rates[False][2:] != rates[False][:2]
    with pytest.raises(ValueError, match="restart is of a scheduler, got restart=True without lr_scheduler"):
        fit(network(depth=1), Batches(DATA, 16), epochs=2, optimizer=SGD, callbacks=[Doubling([1], restart=True)])


def test_a_training_that_is_taken_up_grows_as_one_that_never_stopped(tmp_path):
    def trained(epochs, run=None):
        torch.manual_seed(0)
        cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2)
        options = {"optimizer": SGD, "lr_scheduler": cosine, "callbacks": [Doubling([2, 4], restart=True)], "run": run}
        return fit(network(depth=1), Batches(DATA, 16, seed=0), epochs=epochs, **options)

    whole = trained(6)
    with pytest.warns(UserWarning, match=r"Doubling acts after epochs \[2, 4\], of 2"):
        trained(2, Run(tmp_path / "run", {}))
    resumed = trained(6, Run(tmp_path / "run", {}, resume=True))
    assert [row["learning_rate"] for row in resumed.rows] == [row["learning_rate"] for row in whole.rows]
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("callback", "late"),
    [
        (Doubling([2]), r"Doubling acts after epochs \[2\], of 2"),
        (Stacking([1, 9]), r"Stacking acts after epochs \[9\]"),
    ],
)
def test_what_grows_and_is_not_trained_is_warned_of_at_the_start(callback, late):
    rows = []

    def note(training, row):
        rows.append(row)

    with pytest.warns(UserWarning, match=late) as caught:
        fit(network(depth=1), Batches(DATA, 16), epochs=2, optimizer=SGD, callbacks=[callback, note])
    assert caught[0].filename == __file__
    assert len(rows) == 2
    AdaptiveDepth(DepthRule(1.0), lambda: [X], every=3).before_training(SimpleNamespace(epochs=3))
    with pytest.warns(UserWarning, match=r"AdaptiveDepth acts after epochs \[3\], of 2"):
        AdaptiveDepth(DepthRule(1.0), lambda: [X], every=3).before_training(SimpleNamespace(epochs=2))


def test_an_optimizer_of_another_network_is_refused():
    optimizer = torch.optim.SGD(network().parameters(), 0.1)
    net = network()
    for call in (double, stack, lambda *args: adapt_depth(args[0], lambda: [X], DepthRule(1e-9), args[1])):
        with pytest.raises(ValueError, match="optimizer must hold parameters of the network, got one of 14 others"):
            call(net, optimizer)
    assert net.depth == 3
    assert len(double(net.requires_grad_(False), optimizer)) == 3  # of which none trains


def test_what_other_networks_are_for_is_named():
    adapted = odenets.adapt(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), displacement=True)
    for call in (double, stack, at_depth, ElasticDepth(), lambda model: SampleSteps(model, 0.1)):
        with pytest.raises(TypeError, match=r"got AdaptedModel: odenets.depth.compress\(network, batches, keep=0.7\)"):
            call(adapted, *([X, DATA.y] if isinstance(call, ElasticDepth) else [2] if call is at_depth else []))
    with pytest.raises(AttributeError, match=r"no at_depth, which is of flows: odenets.depth.compress"):
        adapted.at_depth(2)
    assert not hasattr(adapted, "at_depth")
    with pytest.raises(AttributeError, match="no attribute 'depht'"):
        _ = adapted.depht


def test_batch_norms_are_recalibrated_and_what_that_costs_is_counted():
    x = 2 + torch.randn(16, 4, 6, 6)
    net = Network(nn.Identity(), Flow(lambda: ConvField(4, norm="batch"), depth=1, solver="euler"), nn.Flatten())
    training: Any = SimpleNamespace(network=net, optimizer=None, epoch=1, check_evaluations=0, lr_scheduler=None)
    row = {"edits": "flow 0 block 0: merged"}
    Doubling([1], recalibration=lambda: [x]).after_epoch(training, row)
    first, second = (block.fields[0].norm1 for block in net.flows[0].blocks)
    torch.testing.assert_close(first.running_mean[0], x.mean((0, 2, 3)))
    assert not torch.equal(first.running_mean, second.running_mean)
    assert training.check_evaluations == 16 * 2
    assert row["edits"].startswith("flow 0 block 0: merged; flow 0 block 0: duplicated, h 1 -> 0.5")


def test_growing_and_adapting_go_together():
    net, rule = network(depth=1), DepthRule(1e9, max_depth=8)
    callbacks = [Doubling([1]), AdaptiveDepth(rule, lambda: [X], every=2)]
    rows = fit(net, Batches(DATA, 16), epochs=2, optimizer=SGD, callbacks=callbacks).rows
    assert "duplicated" in rows[0]["edits"]
    assert "merged" in rows[1]["edits"]
    assert net.flows[0].h == (1.0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 3}, TypeError, r"epochs must hold the epochs after which the network grows, got 3: .* list"),
        ({"epochs": []}, ValueError, "epochs must hold at least one"),
        ({"epochs": [0]}, ValueError, "epochs must be"),
        ({"epochs": [1.5]}, TypeError, "epochs must be a whole number"),
        ({"epochs": [1], "recalibration": [X]}, TypeError, "recalibration must be a function that makes inputs"),
        ({"epochs": [1], "restarts": True}, TypeError, "(Doubling|Stacking) takes no 'restarts'"),
    ],
)
def test_what_callbacks_cannot_do_is_refused(arguments, error, message):
    for callback in (Doubling, Stacking):
        with pytest.raises(error, match=message):
            callback(**arguments)


def test_doubling_takes_no_rescale():
    with pytest.raises(TypeError, match="Doubling takes no 'rescale': that is of Stacking"):
        Doubling([1], rescale=True)
