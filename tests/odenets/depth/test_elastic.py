"""The loss at random coarsenings, and the control without a flow."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField, Network, NeuralODE, models
from odenets.depth import ElasticDepth, coarsened, without_flow
from odenets.depth.elastic import random_groups
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training import Batches, CrossEntropy, ReverseCrossEntropy, Task, fit, points
from odenets.training.runs import Run
from tests.odenets.checks import assert_same

X, Y = torch.randn(12, 1, 8, 8), torch.arange(12) % 10


def network(depth=4, **options):
    torch.manual_seed(0)
    return models.small_network(features=4, solver="euler", depth=depth, **options)


def test_the_loss_is_that_of_the_whole_and_of_a_coarsening():
    net, task = network(depth=2), ActionPenalty(0.5)
    whole = task(net, X, Y)
    groups = random_groups(net)  # two blocks have one coarsening
    with coarsened(net, groups):
        coarse = task(net, X, Y)
    torch.testing.assert_close(ElasticDepth(task)(net, X, Y), whole + coarse)
    torch.testing.assert_close(ElasticDepth(task, whole=2.0, coarse=0.5, passes=3)(net, X, Y), 2 * whole + 0.5 * coarse)
    torch.testing.assert_close(ElasticDepth(task, whole=0)(net, X, Y), coarse)
    torch.testing.assert_close(ElasticDepth(task, coarse=0)(net, X, Y), whole)
    assert net.depth == 2


def test_coarsenings_halve_all_flows_as_many_times():
    flows = [Flow(MLPField(2), depth=depth) for depth in (8, 5, 1)]
    net = Network(nn.Identity(), flows, nn.Identity(), transitions=[nn.Identity()] * 2)
    drawn = {tuple(len(groups) for groups in random_groups(net)) for _ in range(50)}
    assert drawn == {(4, 3, 1), (2, 2, 1), (1, 1, 1)}
    stays = {groups[0].stays for _ in range(200) for groups in random_groups(flows[0], "random")}
    assert stays == set(range(8))
    with coarsened(net, random_groups(net, "middle")):
        assert net.flows[0].total_time == pytest.approx(1)


def test_where_nothing_can_be_halved_is_refused():
    with pytest.raises(ValueError, match="a flow of two blocks or more"):
        ElasticDepth()(network(depth=1), X, Y)
    torch.testing.assert_close(ElasticDepth(coarse=0)(network(depth=1), X, Y), CrossEntropy()(network(depth=1), X, Y))


@pytest.mark.parametrize("task", [CrossEntropy(), ReverseCrossEntropy(), ElasticDepth(ActionPenalty(0.1))])
def test_labels_that_are_no_classes_are_named(task):
    for labels, message in (
        (Y + 1, "has 10 logits, and the labels of the batch go up to 10"),
        (Y - 1, r"in \[0, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            task(network(), X, labels)
    with pytest.raises(ValueError, match="labels must be classes"):
        task(network(), X, Y.float())
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="has 10 logits, and the labels of batches go up to 10"):
        fit(network(), [(X, Y + 1)], epochs=1, optimizer=sgd, objective=ElasticDepth(ActionPenalty(0.1, task)))


def test_torch_s_generator_draws_them():
    net = network(depth=8)
    draws = []
    for seed in (1, 1, 2, 3, 4):
        torch.manual_seed(seed)
        draws.append([random_groups(net, "random") for _ in range(5)])
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws[2:])


def test_running_statistics_are_those_of_the_full_depth():
    net, plain = network(norm="batch"), network(norm="batch")
    ElasticDepth()(net, X, Y).backward()
    CrossEntropy()(plain, X, Y).backward()
    assert_same(net, plain)


def test_it_trains_in_fit_and_resumes_to_the_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(training, row):
        if row["epoch"] == 2:
            raise Stop

    def train(run, *callbacks):
        torch.manual_seed(0)
        net = models.points_network(solver="euler", depth=4, total_time=1.0)
        batches = Batches(points("moons", 60, seed=0), 20, seed=0)
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        objective = ElasticDepth(LeastAction(tau=0.1, every=2), stays="random")
        training = fit(net, batches, epochs=3, optimizer=sgd, objective=objective, run=run, callbacks=callbacks)
        assert objective.task.steps == 3 * 3  # each step counts once
        return net, training

    whole, training = train(Run(tmp_path / "whole", {}))
    assert training.rows[-1]["lambda"] > 1
    with pytest.raises(Stop):
        train(Run(tmp_path / "parts", {}), stop)
    resumed, _ = train(Run(tmp_path / "parts", {}, resume=True))
    assert_same(resumed, whole)


def test_a_loop_of_one_s_own_counts_a_step_once():
    net, objective = models.points_network(solver="euler", depth=4), ElasticDepth(LeastAction(every=1), passes=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objective(net, torch.rand(8, 2), torch.arange(8) % 2).backward()
        optimizer.step()
    objective.state_dict()  # notices the last step
    assert objective.task.steps == 3


def test_it_makes_a_network_keep_its_output_at_fewer_blocks():
    """A regression by four blocks of which one could not: trained at all depths one block does what it can."""

    def coarse_loss(objective):
        torch.manual_seed(0)
        net = Flow(MLPField(2, hidden=16), solver="euler", depth=4)
        x = torch.randn(64, 2)
        y = torch.stack([x[:, 1], -x[:, 0]], 1)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            objective(net, x, y).backward()
            optimizer.step()
        return F.mse_loss(net.at_depth(1)(x), y).item()

    assert coarse_loss(ElasticDepth(Task(F.mse_loss))) < 0.7 * coarse_loss(Task(F.mse_loss))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": F.mse_loss}, TypeError, "task must be an objective"),
        ({"whole": 0.0, "coarse": 0.0}, ValueError, "not both 0"),
        ({"coarse": -1.0}, ValueError, "not negative"),
        ({"whole": "much"}, TypeError, "whole must be a number"),
        ({"passes": 0}, ValueError, "passes must be at least 1"),
        ({"stays": "best"}, ValueError, "stays must be one of 'first', 'middle', 'last', 'random', got 'best'"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        ElasticDepth(**options)


def test_a_network_without_blocks_to_merge_is_refused():
    net = Network(nn.Identity(), NeuralODE(MLPField(2)), nn.Identity())
    with pytest.raises(ValueError, match="one field for all its steps"):
        ElasticDepth()(net, torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))


def test_what_is_left_without_a_flow():
    net = network(norm="batch").eval()
    rest = without_flow(net)
    assert not rest.training
    torch.testing.assert_close(rest(X), net.head(net.encoder(X)))
    assert {*rest.parameters()}.isdisjoint(net.parameters())
    flows = [Flow(MLPField(2)) for _ in range(2)]
    head = nn.BatchNorm1d(2)
    several = Network(nn.Identity(), flows, head, transitions=[nn.Linear(2, 2)])
    x = torch.randn(20, 2)
    rest = without_flow(several, [x])
    torch.testing.assert_close(rest[-1].running_mean, several.transitions[0](x).mean(0))
    assert head.num_batches_tracked == 0
    with pytest.raises(TypeError, match=r"must be an odenets\.Network"):
        without_flow(flows[0])
