"""Steps of whatever optimizer are counted, each once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.least_action import LeastAction
from tests.odenets.training.loops import X, Y, counted, flow, sgd, take_steps
from tests.odenets.training.small import TENS, tiny

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "foreach": True}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    (torch.optim.Adam, {"foreach": False}),
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adagrad, {"fused": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.LBFGS, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_the_steps_of_every_optimizer_are_counted(kind, options):
    """Fused ones leave the versions of weights as they are; LBFGS takes twenty losses in a step, with one lambda."""
    network, objective = flow(), LeastAction()
    optimizer, lambdas = kind(network.parameters(), **options), []
    for n in range(4):

        def closure():
            optimizer.zero_grad()
            loss = objective(network, X, Y)
            lambdas.append(objective.multiplier.item())
            loss.backward()
            return loss

        closure() if kind is not torch.optim.LBFGS else None
        optimizer.step(closure if kind is torch.optim.LBFGS else None)
        assert counted(objective) == n + 1
        assert len(set(lambdas)) == n + 1


class Old(torch.optim.Optimizer):
    """Writes through ``data``, which leaves no version either."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


class Sharpness(torch.optim.Optimizer):
    """Takes its step from a second loss, in weights that are moved for it."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base = torch.optim.SGD(self.param_groups, 0.1)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        moves = [[0.1 * p.grad for p in group["params"]] for group in self.param_groups]
        for group, by in zip(self.param_groups, moves, strict=True):
            torch._foreach_add_(group["params"], by)
        with torch.enable_grad():
            closure()  # type: ignore[misc]
        for group, by in zip(self.param_groups, moves, strict=True):
            torch._foreach_sub_(group["params"], by)
        self.base.step()


def test_the_steps_of_optimizers_of_ones_own_are_counted():
    network, objective = flow(), LeastAction()
    take_steps(network, objective, Old(network.parameters()), 3)
    assert counted(objective) == 3
    optimizer = Sharpness(network.parameters())
    for _ in range(3):
        for p in network.parameters():
            p.grad = None
        objective(network, X, Y).backward()
        optimizer.step(lambda: objective(network, X, Y).backward())  # type: ignore[arg-type]
    assert counted(objective) == 6


def test_steps_without_an_optimizer_are_counted():
    network, objective = flow(), LeastAction()
    for _ in range(3):
        gradients = torch.autograd.grad(objective(network, X, Y), list(network.parameters()))
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradients, strict=True):
                p -= 0.1 * g
    assert counted(objective) == 3


def test_an_optimizer_in_the_backward_pass_is_counted():
    network, objective = flow(), LeastAction()
    for p in network.parameters():
        optimizer = torch.optim.SGD([p], 0.1)
        p.register_post_accumulate_grad_hook(lambda p, o=optimizer: (o.step(), o.zero_grad())[1])
    for _ in range(3):
        objective(network, X, Y).backward()
    assert counted(objective) == 3


@pytest.mark.parametrize("update", ["before", "next", "after"])
def test_a_batch_in_parts_is_a_step(update):
    """lambda grows by the first part's loss, or after the step by that of the last one."""
    network, objective = flow(), LeastAction(update=update)
    optimizer = sgd(network)
    for _ in range(3):
        for part in range(3):
            (objective(network, X[2 * part :][:2], Y[2 * part :][:2]) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == "after":
            expected = objective.multiplier + F.cross_entropy(network(X[4:]), Y[4:]).double()
            objective.state_dict()
            torch.testing.assert_close(objective.multiplier, expected)
    assert counted(objective) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused):
    """A fused optimizer's ``step`` is called then too, and its kernel does nothing."""
    network, objective = flow(), LeastAction()
    optimizer, scaler = torch.optim.Adam(network.parameters(), fused=fused), torch.amp.GradScaler("cpu", 4.0)
    for n, factor in enumerate([1.0, torch.inf, torch.inf, 1.0, torch.inf, 1.0]):
        scaler.scale(objective(network, X, Y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert counted(objective) == [1, 1, 1, 2, 2, 3][n]


def test_what_takes_no_step_is_not_counted():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    take_steps(network, objective, optimizer)
    assert objective.steps == 0  # until the next loss notices, or the state is asked for
    with torch.no_grad():
        objective(network, X, Y)
    with torch.inference_mode():
        objective(network, X, Y)
    objective.eval()
    objective(network, X, Y)
    objective.train()
    assert objective.steps == 0
    network.eval()
    objective(network, X, Y)
    network.train()
    assert objective.multiplier == 1 + F.cross_entropy(flow()(X), Y).double()
    assert counted(objective) == 1
    average = torch.optim.swa_utils.AveragedModel(network)
    average.update_parameters(network)
    objective(average.module, X, Y)
    network.load_state_dict(flow().state_dict())
    objective(network, X, Y)
    other = flow()
    optimizer_of_other = sgd(other)
    other(X).sum().backward()
    objective(network, X, Y).backward()
    optimizer_of_other.step()
    objective(network, X, Y)
    assert counted(objective) == 1


def test_weights_that_are_loaded_between_two_steps_are_no_step():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for _ in range(3):
        take_steps(network, objective, optimizer)
        network.load_state_dict(flow().state_dict())
    objective(network, X, Y).backward()
    network.load_state_dict(flow().state_dict())
    assert counted(objective) == 3


@pytest.mark.parametrize("optimizers", ["one", "each"])
def test_steps_of_several_networks_with_one_objective(optimizers):
    """One optimizer takes one step of both; two take two."""
    networks, objective = [flow(), flow()], LeastAction()
    if optimizers == "one":
        optimizer = sgd(nn.ModuleList(networks))
        for _ in range(3):
            sum(objective(network, X, Y) for network in networks).backward()  # type: ignore[union-attr]
            optimizer.step()
        assert counted(objective) == 3
    else:
        both = [sgd(network) for network in networks]
        for _ in range(3):
            for network, optimizer in zip(networks, both, strict=True):
                take_steps(network, objective, optimizer)
        assert counted(objective) == 6


def test_a_step_that_is_told_is_not_counted_twice():
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for _ in range(3):
        take_steps(network, objective, optimizer)
        objective.after_step(network, (X, Y))
    take_steps(network, objective, optimizer)
    assert objective.steps == 3
    assert counted(objective) == 4


def test_the_state_after_a_step_is_of_training_mode():
    """In which the batch's own statistics count, also where the state is taken in eval mode, after validation."""
    network, objective = tiny(norm="batch"), LeastAction(update="after")
    x, y = next(TENS.epoch(0))
    take_steps(network, objective, sgd(network), x=x, y=y)
    network.eval()
    objective.state_dict()
    assert not any(module.training for module in network.modules())
    expected = F.cross_entropy(network.train()(x), y).item()
    assert objective.multiplier.item() == pytest.approx(1 + expected, rel=1e-6)


def test_an_objective_within_another_counts_each_step_once():
    network, inner = flow(), LeastAction(tau=0.1, cost="residue")
    outer = LeastAction(inner)
    take_steps(network, outer, sgd(network), 3)
    assert (counted(outer), inner.steps) == (3, 3)


def test_averaged_weights_that_are_swapped_in_and_out_are_no_step():
    """As callbacks do for validation, between the parts of a batch too."""
    network, objective = flow(), LeastAction()
    optimizer, average = sgd(network), flow()
    take_steps(network, objective, optimizer)
    for _ in range(3):
        for _ in range(2):
            objective(network, X, Y).backward()
            for p, q in zip(network.parameters(), average.parameters(), strict=True):
                for _ in range(2):
                    held = p.detach().clone()
                    p.detach().copy_(q.detach())
                    q.detach().copy_(held)
        optimizer.step()
    assert counted(objective) == 4


def test_two_optimizers_of_one_network_take_one_step_with_one_loss():
    network, objective = flow(), LeastAction()
    halves = [torch.optim.SGD(list(network.parameters())[i::2], 0.1) for i in range(2)]
    for _ in range(3):
        objective(network, X, Y).backward()
        for optimizer in halves:
            optimizer.step()
    assert counted(objective) == 3


def test_an_optimizer_that_fails_is_no_step_and_the_next_one_is():
    network, objective = flow(), LeastAction()
    optimizer = torch.optim.LBFGS(network.parameters())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    take_steps(network, objective, sgd(network), 2)
    assert counted(objective) == 2
    fresh = LeastAction()
    for _ in range(2):
        gradients = torch.autograd.grad(fresh(network, X, Y), list(network.parameters()))
        torch._foreach_sub_([p.detach() for p in network.parameters()], gradients)
    assert counted(fresh) == 2
