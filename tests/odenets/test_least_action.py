import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from odenets import measures, models
from odenets.least_action import ActionPenalty, Cost, LeastAction
from odenets.training import data
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Objective, Task
from tests.odenets.checks import assert_same, unchanged


def network(**options):
    torch.manual_seed(0)
    return models.small_network(features=8, **{"solver": "euler", "h": 1.0, "depth": 3} | options)


@pytest.fixture
def batch(parts):
    return parts.train.x[:32], parts.train.y[:32]


def residues(net, x):
    return [step.x1 - step.x0 for step in net.steps(x)]


def train(net, part, size, lr=0.05, momentum=0.0, seed=None, epochs=1, **options):
    sgd = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    return fit(net, data.Batches(part, size, seed=seed), epochs=epochs, optimizer=sgd, **options)


def value(objective, net, batch):
    return objective(net, *batch)


@pytest.mark.parametrize("kind", ["action", "residue"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_cost_of_euler_steps_is_the_sum_of_mean_powers(batch, kind, p):
    """Means over the features of |r_i|^p, the p-th power of the p-norm over the dimension."""
    net = network()
    _, records = net.record(batch[0], **{kind: (cost := Cost(kind, p)).measure})
    flat = [r.flatten(1) for r in residues(net, batch[0])]
    expected = sum(torch.linalg.vector_norm(r, ord=p, dim=1).pow(p).mean() / r.shape[1] for r in flat)
    torch.testing.assert_close(cost(records), expected)


def test_the_norm_is_that_of_the_batch(batch):
    net = network()
    _, records = net.record(batch[0], norm=(cost := Cost("norm")).measure)
    torch.testing.assert_close(cost(records), sum(torch.linalg.vector_norm(r) for r in residues(net, batch[0])))


def test_the_norm_has_a_gradient_where_nothing_moves(batch):
    net = network()
    for p in net.flows[0].parameters():
        torch.nn.init.zeros_(p)
    _, records = net.record(batch[0], norm=(cost := Cost("norm")).measure)
    cost(records).backward()
    assert all(p.grad.eq(0).all() for p in net.flows[0].parameters())


def by_hand(net, batches, *, lambda0, tau, every, update, weigh, steps):
    """Algorithm 1, written out; the multipliers after each step."""
    optimizer, multiplier, multipliers = torch.optim.SGD(net.parameters(), 0.01), lambda0, []
    for it in range(1, steps + 1):
        x, y = batches[(it - 1) % len(batches)]
        loss, cost = F.cross_entropy(net(x), y), sum(r.square().mean() for r in residues(net, x))
        if (update == "before" and it % every == 0) or (update == "next" and it > 1 and (it - 1) % every == 0):
            multiplier += tau * loss.item()
        optimizer.zero_grad()
        (loss + cost / multiplier if weigh == "divide" else multiplier * loss + cost).backward()
        optimizer.step()
        if update == "after" and it % every == 0:
            multiplier += tau * F.cross_entropy(net(x), y).item()
        multipliers.append(multiplier)
    return multipliers


@pytest.mark.parametrize("update", ["before", "next", "after"])
@pytest.mark.parametrize("weigh", ["divide", "multiply"])
@pytest.mark.parametrize("every", [1, 3])
def test_multipliers_and_weights_are_those_of_the_algorithm(parts, update, weigh, every):
    """In float64, where a few steps do not amplify rounding to what a step changes."""
    options = {"lambda0": 0.5, "tau": 0.2, "every": every, "update": update, "weigh": weigh}
    part = replace(parts.train, x=parts.train.x.double())
    batches = data.Batches(part, 32)
    one, two = network().double(), network().double()
    expected = by_hand(one, list(batches.epoch(0)), steps=len(batches), **options)
    objective = LeastAction(**options, cost="residue")
    train(two, part, 32, 0.01, objective=objective)
    assert objective.multiplier.item() == pytest.approx(expected[-1], rel=1e-6)
    assert objective.steps == len(expected)
    assert_same(one, two, 1e-6, 1e-6)


def test_the_new_multiplier_applies_to_the_step_that_changed_it(batch):
    net, objective = network(), LeastAction(lambda0=0.5, tau=2.0)
    output, records = net.record(batch[0], **objective.measures)
    loss, cost = F.cross_entropy(output, batch[1]), records["action"].sum(0).mean()
    torch.testing.assert_close(objective.loss(net, batch, output, records), loss + cost / (0.5 + 2.0 * loss))


def test_a_batch_in_parts_changes_the_multiplier_once(parts):
    multipliers = []
    for accumulate in (1, 4):
        objective = LeastAction(lambda0=1.0, tau=0.1)
        train(network(), parts.train.subset(torch.arange(64)), 64, objective=objective, accumulate=accumulate)
        multipliers.append(objective.multiplier.item())
    first = F.cross_entropy(network()(parts.train.x[:16]), parts.train.y[:16]).item()
    assert multipliers[1] == pytest.approx(1 + 0.1 * first, rel=1e-6)
    assert multipliers[0] != multipliers[1]


def test_action_falls_in_training(parts):
    ends = {}
    for name, objective in (("plain", CrossEntropy()), ("least action", LeastAction(lambda0=1, tau=0.1, every=5))):
        net = network()
        before = net.record(parts.train.x, action=measures.action)[1]["action"].sum(0).mean()
        train(net, parts.train, 32, momentum=0.9, seed=0, epochs=15, objective=objective)
        ends[name] = net.record(parts.train.x, action=measures.action)[1]["action"].sum(0).mean()
    assert ends["least action"] < before
    assert ends["least action"] < 0.5 * ends["plain"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_what_eager_is(batch, autocast, backend):
    results = []
    for compiled in (False, True):
        net, objective = network(), LeastAction()
        record = torch.compile(net.record, fullgraph=True, backend=backend) if compiled else net.record
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, records = record(batch[0], **objective.measures)
        assert records["action"].dtype == torch.float32
        loss = objective.loss(net, batch, output.float(), records)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2 if autocast else 1e-4, atol=2e-2 if autocast else 1e-5)


def test_another_task_and_its_measures(batch):
    class Peak(Objective):
        def __init__(self):
            super().__init__({"peak": lambda step: step.x1.flatten(1).amax(1)})

        def loss(self, network, batch, output, records):
            return records["peak"].mean()

    net, objective = network(), ActionPenalty(0.5, Peak())
    _, records = net.record(batch[0], **objective.measures)
    expected = records["peak"].mean() + 0.5 * records["action"].sum(0).mean()
    torch.testing.assert_close(value(objective, net, batch), expected)


def test_asking_for_the_value_changes_nothing(batch):
    net, objective = network(), LeastAction()
    with torch.no_grad():
        first = value(objective, net, batch)
    assert objective.multiplier == 1
    assert first == value(ActionPenalty(1.0), net, batch)
    value(objective, net, batch)
    assert objective.multiplier > 1


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("update", ["before", "next", "after"])
@pytest.mark.parametrize("where", ["here", "in another process"])
def test_a_loss_that_is_not_finite_leaves_the_multiplier(batch, monkeypatch, where, update, value):
    net, factor = network(), torch.ones(())
    task = Task(lambda output, y: F.cross_entropy(output, y) * (factor if where == "here" else 1))
    objective, multipliers = LeastAction(task, update=update), []
    if where != "here":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group: total.mul_(factor))
    for number in (1.0, value, 1.0):
        factor.fill_(number)
        last = objective(net, *batch)
        objective.after_step(net, batch)
        multipliers.append(objective.multiplier.item())
    loss = F.cross_entropy(net(batch[0]), batch[1]).item()
    growths = [0, 0, 1] if update == "next" else [1, 1, 2]
    assert multipliers == pytest.approx([1 + n * loss for n in growths], rel=1e-6)
    assert last.isfinite()


def test_a_copy_keeps_its_own_multiplier():
    objective = LeastAction()
    twin = copy.deepcopy(objective)
    twin.multiplier += 1
    assert objective.multiplier == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeastAction(lambda0=0), "lambda0 must be positive"),
        (lambda: LeastAction(tau=-1), "tau must be positive"),
        (lambda: LeastAction(tau=float("nan")), "tau must be positive"),
        (lambda: LeastAction(every=0), "every must be at least 1"),
        (lambda: LeastAction(update="later"), "update must be 'before', 'next' or 'after'"),
        (lambda: LeastAction(weigh="add"), "weigh must be 'divide' or 'multiply'"),
        (lambda: LeastAction(cost="energy"), "cost must be 'action', 'residue' or 'norm'"),
        (lambda: LeastAction(p=0.5), "p must be at least 1"),
        (lambda: LeastAction(cost="norm", p=3), "2 for the cost 'norm'"),
        (lambda: ActionPenalty(-1), "weight must be finite and not negative"),
        (lambda: ActionPenalty(1, ActionPenalty(1), p=3), "another measure as 'action'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "accumulate", "task"),
    [
        ("euler", 1, None),
        ("bs23", 2, None),
        ("euler", 1, lambda: LeastAction(update="after", tau=1e-12, cost="residue")),
    ],
)
def test_looking_again_moves_neither_statistics_nor_random_state(parts, solver, accumulate, task):
    """With a lambda that hardly grows the three updates are one training, batch norms and dropout included."""
    states = []
    for update in ("before", "next", "after"):
        net = network(norm="batch", solver=solver, depth=2)
        net.head = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.Dropout2d(0.3), net.head)
        spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(8, 8, 1))
        net.encoder = torch.nn.Sequential(net.encoder, spectral)
        objective = LeastAction(task and task(), tau=1e-12, update=update)
        torch.manual_seed(5)
        sixty = parts.train.subset(torch.arange(60))
        train(net, sixty, 20, seed=0, epochs=2, objective=objective, accumulate=accumulate)
        states.append((net.state_dict(), torch.get_rng_state()))
    for state, random in states[1:]:
        assert torch.equal(random, states[0][1])
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][0][name], rtol=0, atol=1e-6, msg=name)
    assert states[0][0]["head.0.num_batches_tracked"] == 6 * accumulate


def test_looking_again_is_in_training_mode(batch):
    """lambda grows by the loss with the batch's own statistics, as the step sees it, and not by that of eval mode."""
    net = network(norm="batch", depth=2)
    objective = LeastAction(lambda0=1.0, tau=1.0, update="after")
    value(objective, net, batch).backward()
    twin = copy.deepcopy(net)
    objective.after_step(net, batch)
    with torch.no_grad():
        expected = F.cross_entropy(twin(batch[0]), batch[1]).item()
    assert objective.multiplier.item() == pytest.approx(1 + expected, rel=1e-6)


def test_a_failing_second_look_leaves_the_statistics(batch):
    net, objective = network(norm="batch"), LeastAction(update="after")
    value(objective, net, batch).backward()
    net.head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with unchanged(net), pytest.raises(ZeroDivisionError):
        objective.after_step(net, batch)


@pytest.mark.parametrize("move", [lambda o: o.half(), lambda o: o.to(torch.bfloat16), lambda o: o.to("cpu"),
                                  lambda o: torch.nn.ModuleList([o]).float()[0]])  # fmt: skip
def test_the_multiplier_keeps_its_precision(move):
    """In bfloat16 it would stand still from 256 on."""
    objective = move(LeastAction(lambda0=1e4, tau=1e-3))
    assert objective.multiplier.dtype == torch.float64
    output, y = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True), torch.tensor([0, 1, 2])
    for _ in range(3):
        objective.loss(torch.nn.Identity(), (output, y), output, {"action": torch.ones(2, 3, dtype=torch.bfloat16)})
        objective.after_step(torch.nn.Identity(), (output, y))
    assert objective.multiplier.item() - 1e4 == pytest.approx(3e-3 * torch.tensor(4.0).log().item(), rel=1e-6)
