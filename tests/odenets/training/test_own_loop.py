"""A loop of one's own: ``loss = objective(network, x, y)`` does what ``fit`` does."""

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow
from odenets.least_action import ActionPenalty, LeastAction
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Task
from tests.odenets.checks import assert_same
from tests.odenets.training.loops import X, Y, counted, flow, sgd, take_steps
from tests.odenets.training.small import TENS, tiny


@pytest.mark.parametrize("update", ["before", "next", "after"])
@pytest.mark.parametrize("weigh", ["divide", "multiply"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_loop_of_ones_own_trains_as_fit_does(update, weigh, every):
    options = {"update": update, "weigh": weigh, "every": every, "tau": 0.3}
    ours, theirs = (LeastAction(**options) for _ in range(2))
    network, twin = tiny(torch.float64, norm="batch"), tiny(torch.float64, norm="batch")
    make = lambda of: sgd(of) if isinstance(of, nn.Module) else torch.optim.SGD(of, 0.05)  # noqa: E731
    fit(twin, TENS, epochs=5, optimizer=make, objective=theirs)
    optimizer = sgd(network)
    for epoch in range(5):
        for x, y in TENS.epoch(epoch):
            take_steps(network, ours, optimizer, x=x.double(), y=y)
    state = ours.state_dict()
    assert state["_extra_state"] == theirs.steps == 10
    torch.testing.assert_close(ours.multiplier, theirs.multiplier, rtol=1e-12, atol=0)
    assert_same(network, twin, 1e-12, 1e-12)


@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_count_on_by_themselves(update, copied):
    network, objective = flow(), LeastAction(update=update)
    take_steps(network, objective, sgd(network), 2)
    network, twin = copied((network, objective))
    assert twin.steps == objective.steps == 2
    assert twin.multiplier == objective.multiplier
    take_steps(network, twin, sgd(network), 2)
    assert (counted(twin), counted(objective)) == (4, 2)
    assert twin.multiplier > objective.multiplier


@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_a_loop_goes_on_from_a_state_as_if_it_had_not_stopped(update):
    whole, objective = flow().double(), LeastAction(update=update, every=2)
    take_steps(whole, objective, sgd(whole), 6, x=X.double())
    first, half = flow().double(), LeastAction(update=update, every=2)
    take_steps(first, half, sgd(first), 3, x=X.double())
    again, resumed = flow().double(), LeastAction(update=update, every=2)
    resumed.load_state_dict(half.state_dict())
    again.load_state_dict(first.state_dict())
    take_steps(again, resumed, sgd(again), 3, x=X.double())
    assert_same(again, whole)
    assert_same(resumed, objective)


def test_no_batch_is_kept_that_nobody_looks_at_again():
    for options, alive in (({}, False), ({"update": "after", "every": 3}, False), ({"update": "after"}, True)):
        network, objective = flow(), LeastAction(**options)
        x = X.clone()
        reference = weakref.ref(x)
        take_steps(network, objective, sgd(network), x=x)
        del x
        assert (reference() is not None) == alive


def test_an_objective_is_let_go_with_its_watch():
    network, objective = flow(), LeastAction()
    take_steps(network, objective, sgd(network), 2)
    references = weakref.ref(network), weakref.ref(objective)
    del network, objective
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_network_that_is_trained_in_eval_mode_is_told():
    network, objective = flow().eval(), LeastAction()
    with pytest.raises(
        RuntimeError, match=r"trained in eval mode, in which an objective changes nothing: call network"
    ):
        take_steps(network, objective, sgd(network), 2)
    take_steps(network.train(), objective, sgd(network), 2)
    assert counted(objective) == 2


class Looking(CrossEntropy):
    def __init__(self):
        super().__init__()
        self.seen = []

    def after_step(self, network, batch):
        self.seen.append((network, batch[0]))


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: ActionPenalty(0.1, o), LeastAction])
def test_what_an_objective_of_ones_own_does_after_a_step_is_done(wrap):
    network, looking = flow(), Looking()
    objective = wrap(looking)
    take_steps(network, objective, sgd(network), 3)
    objective.state_dict()
    assert [net is network and x is X for net, x in looking.seen] == [True] * 3


def test_who_has_output_and_records_counts_too():
    """In parts also; the steps of an optimizer are noticed."""
    network, objective = flow(), LeastAction()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for _ in range(3):
        for _ in range(2):
            output, records = network.record(X, **objective.measures)
            objective.loss(network, (X, Y), output, records).backward()
        optimizer.step()
    assert counted(objective) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda o, n: o(nn.Linear(3, 3), X, Y), TypeError, "got Linear: odenets.adapt makes one"),
        (lambda o, n: o(X, n, Y), TypeError, "network must be a module that records its steps, got Tensor"),
        (lambda o, n: o(n, (X, Y)), TypeError, r"called as objective\(network, x, y\), .* got 2 arguments"),
        (lambda o, n: o(X, Y), TypeError, r"called as objective\(network, x, y\), .* got 2 arguments"),
        (lambda o, n: o(n, Y, X), TypeError, r"called with \(network, x, y\), got torch.int64 \(6,\) as inputs x"),
        (
            lambda o, n: o(n, (X, Y), *n.record(X)),
            TypeError,
            r"take objective.loss\(network, \(x, y\), output, records",
        ),
        (lambda o, n: o(n.requires_grad_(False), X, Y), ValueError, "depends on no parameter that requires a gradient"),
    ],
)
def test_calls_that_go_wrong_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(LeastAction(), flow())


def test_an_objective_written_for_the_old_call_is_told():
    with pytest.raises(
        TypeError, match=r"overrides loss\(self, network, batch, output, records\), got Old with forward"
    ):

        class Old(CrossEntropy):
            def forward(self, network, batch, output, records):
                return records["action"].mean()


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t, x, c):
        return self.linear(x) + c


@pytest.mark.parametrize("make", [tuple, list])
def test_inputs_may_have_conditions(make):
    torch.manual_seed(0)
    network, objective = Flow(Conditioned, depth=2, solver="euler", h=1.0), LeastAction(update="after")
    c = torch.ones(6, 1)
    output, records = network.record(X, c, **objective.measures)
    expected = F.cross_entropy(output, Y) + records["action"].sum(0).mean()
    torch.testing.assert_close(objective(network, make((X, c)), Y), expected)
    take_steps(network, objective, sgd(network), 2, x=make((X, c)))
    assert counted(objective) == 2


def test_the_context_of_a_loss_does_not_matter():
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        network, objective = flow(), LeastAction(update="after")
        optimizer = sgd(network)
        for _ in range(2):
            with context:
                loss = objective(network, X, Y)
            loss.backward()
            optimizer.step()
        assert counted(objective) == 2


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, y):
        return F.mse_loss(output, y) * self.log_scale.exp() - self.log_scale


def test_any_function_is_a_task():
    network, y = flow(), torch.rand(6, 3)
    expected = F.mse_loss(network(X), y)
    cost = network.record(X, **LeastAction().measures)[1]["action"].sum(0).mean()
    for function in (F.mse_loss, nn.MSELoss(), Weighted(), lambda output, y: (output - y).square().mean()):
        task = Task(function)
        torch.testing.assert_close(task(network, X, y), expected)
        torch.testing.assert_close(ActionPenalty(0.1, task)(network, X, y), expected + 0.1 * cost)
        torch.testing.assert_close(LeastAction(task, lambda0=2.0, update="next")(network, X, y), expected + cost / 2)
        assert LeastAction(task).task is task
        assert task.task is task
    assert dict(LeastAction(Task(Weighted())).named_parameters()).keys() == {"task.function.log_scale"}
    moved = LeastAction(Task(Weighted())).double()
    assert next(moved.parameters()).dtype == torch.float64


def test_targets_are_what_the_function_understands():
    network = flow()
    values = {"left": torch.zeros(6), "names": ["a"] * 6}
    loss = Task(lambda output, y: (output[:, 0] - y["left"]).abs().mean())(network, X, values)
    torch.testing.assert_close(loss, network(X)[:, 0].abs().mean())
    objective = LeastAction(Task(lambda output, y: output.square().mean()))
    take_steps(network, objective, sgd(network), 2, y=None)
    assert counted(objective) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Task(nn.MSELoss), TypeError, r"must be of \(output, y\), such as F.mse_loss or nn.MSELoss\(\), got"),
        (lambda: Task("mse"), TypeError, "such as F.mse_loss or nn.MSELoss"),  # type: ignore[arg-type]
        (lambda: Task(CrossEntropy()), TypeError, "got the objective CrossEntropy: take it"),
        (lambda: LeastAction(F.mse_loss), TypeError, r"task must be an objective.*Task\(mse_loss\)"),
        (lambda: LeastAction(1.0), TypeError, "task must be an objective, got float: a number is lambda0=1.0 of Le"),
        (lambda: LeastAction(Task), TypeError, r"got the class Task: call it, Task\(F.mse_loss\)"),
        (lambda: LeastAction(CrossEntropy), TypeError, r"got the class CrossEntropy: call it, CrossEntropy\(\)"),
        (lambda: LeastAction(nn.MSELoss), TypeError, r"got the class MSELoss: call it, Task\(MSELoss\(\)\)"),
        (
            lambda: ActionPenalty(Task(F.mse_loss)),
            TypeError,
            r"weight .* comes first, ActionPenalty\(0.1, task\), got Ta",
        ),
        (lambda: Task(nn.MSELoss(reduction="none"))(flow(), X, X), ValueError, r"MSELoss returns shape \(6, 3\)"),
        (lambda: Task(lambda output, y: 1.0)(flow(), X, X), TypeError, "<lambda> returns float"),
    ],
)
def test_tasks_that_are_none_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_validation_reports_is_the_task_without_smoothing_or_cost():
    network = flow()
    output, records = network.record(X, **LeastAction().measures)
    plain = F.cross_entropy(output, Y)
    for objective in (CrossEntropy(0.1), LeastAction(CrossEntropy(0.1)), ActionPenalty(2.0, LeastAction())):
        torch.testing.assert_close(objective.validation_loss(network, (X, Y), output, records), plain)
    task = LeastAction(Task(F.mse_loss))
    torch.testing.assert_close(task.validation_loss(network, (X, X), output, records), F.mse_loss(output, X))


class Together(nn.Module):
    def __init__(self, objective):
        super().__init__()
        self.network, self.objective = flow(), objective

    def forward(self):
        return self.objective(self.network, X, Y)


def test_gradients_of_torch_func_are_those_of_a_backward_pass_and_lambda_stands_still():
    together = Together(LeastAction())
    parameters = {name: p.detach() for name, p in together.named_parameters()}
    gradients = torch.func.grad(lambda values: torch.func.functional_call(together, values, ()))(parameters)
    assert together.objective.multiplier == 1
    together.objective = ActionPenalty(1.0)
    together().backward()
    torch.testing.assert_close(gradients, {name: p.grad for name, p in together.named_parameters()})
