"""Steps of whatever optimizer are counted, each once."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets.least_action import LeastAction
from odenets.training.step_watch import StepWatch
from tests.odenets.training.loops import X, Y, counted, flow, sgd, take_steps
from tests.odenets.training.small import TENS, tiny


class Own(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # by LBFGS of torch 2.8
@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"lr": 0.1}), (torch.optim.Adam, {"fused": True}), (torch.optim.LBFGS, {}), (Own, {})],
)
def test_the_steps_of_every_optimizer_are_counted(kind, options):
    """LBFGS takes twenty losses in a step, with one lambda."""
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
    other = flow()
    optimizer_of_other = sgd(other)
    other(X).sum().backward()
    objective(network, X, Y).backward()
    optimizer_of_other.step()
    objective(network, X, Y)
    assert counted(objective) == 1


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


def test_weights_that_are_moved_for_a_second_loss_are_one_step():
    """Sharpness-aware: first up the slope, then the step from there, in the weights of before."""
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for _ in range(3):
        optimizer.zero_grad()
        objective(network, X, Y).backward()
        held, ups = [p.detach() for p in network.parameters()], [0.1 * p.grad for p in network.parameters()]
        torch._foreach_add_(held, ups)
        objective(network, X, Y).backward()
        torch._foreach_sub_(held, ups)
        optimizer.step()
    assert counted(objective) == 3


def through_data(p, gradient):
    p.data.add_(gradient, alpha=-0.1)


def through_copies(p, gradient):
    master = p.detach().clone()
    master.grad = gradient
    torch.optim.SGD([master], 0.1).step()
    p.data.copy_(master)


def in_place(p, gradient):
    p.detach().sub_(gradient, alpha=0.1)


@pytest.mark.parametrize("write", [in_place, through_data, through_copies])
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_steps_that_are_written_by_hand_are_to_be_told(write, optimizer, told, recwarn):
    """One warning, also after steps of an optimizer."""
    warnings.simplefilter("always")
    network, objective = flow(), LeastAction()
    if optimizer:
        take_steps(network, objective, sgd(network), 3)
    network.zero_grad()
    for _ in range(6):
        objective(network, X, Y).backward()
        for p in network.parameters():
            write(p, p.grad)
            p.grad = None
        if told:
            objective.after_step(network, (X, Y))
    assert counted(objective) == 3 * optimizer + 6 * told
    assert ["objective.after_step(network, (x, y))" in str(one.message) for one in recwarn] == [True] * (not told)


def test_gradients_that_no_step_follows_are_no_steps_and_no_warning():
    """Attacks in training mode, and validation with gradients."""
    network, objective = flow(), LeastAction()
    optimizer = sgd(network)
    for n in range(3):
        x = X.clone().requires_grad_()
        for _ in range(5):
            torch.autograd.grad(objective(network, x, Y), x)
            objective(network, x, Y)
        take_steps(network, objective, optimizer)
        assert counted(objective) == n + 1


def test_the_step_of_another_loss_after_an_attack_in_eval_mode_is_none():
    network, objective = flow().eval(), LeastAction()
    x = X.clone().requires_grad_()
    torch.autograd.grad(objective(network, x, Y), x)
    F.cross_entropy(network.train()(X), Y).backward()
    sgd(network).step()
    assert counted(objective) == 0


def test_objectives_that_wait_for_no_step_are_not_asked(monkeypatch):
    """However many live, the steps of other optimizers cost nothing."""
    network, objectives = flow(), [LeastAction() for _ in range(3)]
    optimizer = sgd(network)
    for objective in objectives:
        take_steps(network, objective, optimizer)
        counted(objective)
    monkeypatch.setattr(StepWatch, "end_of_step", lambda *arguments: 1 / 0)
    optimizer.step()
    with pytest.raises(ZeroDivisionError):
        take_steps(network, objectives[0], optimizer)
