"""Successive approximations: optima in closed form, backpropagation as a special case, digits, refusals."""

import copy
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, ReversibleFlow
from odenets.least_action import ActionPenalty
from odenets.maximum_principle import SuccessiveApproximations, fit_maximum_principle
from odenets.models import points_network
from odenets.training import Batches, Task, TensorData

SGD = partial(torch.optim.SGD, lr=0.1)
EXACT = partial(
    torch.optim.LBFGS, max_iter=20, line_search_fn="strong_wolfe", tolerance_grad=1e-13, tolerance_change=1e-15
)


def half_square(output, y):
    """``|x - y|^2 / 2``, the mean over the samples."""
    return (output - y).square().sum(1).mean() / 2


class Controlled(nn.Module):
    """``v = A x + u`` with a matrix that is there and a control that is sought."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.control = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))

    def forward(self, t, x):
        return x @ self.matrix.T + self.control


def test_the_linear_quadratic_regulator_is_found():
    """Minimize ``mean |x_M - y|^2 / 2 + decay/2 sum |u_m|^2``, which is least squares in all controls together."""
    torch.manual_seed(0)
    M, D, h, decay = 5, 3, 0.2, 0.1
    matrix, target = torch.randn(D, D, dtype=torch.float64) / 2, torch.randn(D, dtype=torch.float64)
    x = torch.randn(4, D, dtype=torch.float64)
    flow = Flow(lambda: Controlled(matrix), solver="euler", h=h, depth=M)
    training = SuccessiveApproximations(flow, half_square, rho=M, decay=decay, optimizer=EXACT)
    losses = [training.update(x, target.expand(4, D)).item() for _ in range(100)]
    found = torch.stack([block.fields[0].control.detach() for block in flow.blocks])
    step = torch.eye(D, dtype=torch.float64) + h * matrix  # x_M = S^M x + sum_m S^(M-1-m) h u_m
    power = torch.linalg.matrix_power
    effect = torch.cat([h * power(step, M - 1 - m) for m in range(M)], 1)  # (D, M D)
    distance = target - power(step, M) @ x.mean(0)
    optimum = torch.linalg.solve(effect.T @ effect + decay * torch.eye(M * D), effect.T @ distance)
    torch.testing.assert_close(found.flatten(), optimum, rtol=1e-5, atol=1e-7)
    assert losses[-1] < losses[0]


class Linear(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(D, D, dtype=torch.float64))

    def forward(self, t, x):
        return x @ self.matrix.T


def test_a_linear_step_becomes_that_of_least_squares():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    flow = Flow(Linear(3), solver="euler", h=1.0)
    training = SuccessiveApproximations(flow, half_square, rho=1.0, optimizer=EXACT)
    for _ in range(80):
        training.update(x, y)
    expected = torch.linalg.lstsq(x, y - x).solution.T
    torch.testing.assert_close(flow.blocks[0].fields[0].matrix.detach(), expected, rtol=1e-4, atol=1e-6)


def two_flows(solver):
    flows = [Flow(lambda c=c: ConvField(c, 3, norm="group"), solver=solver, h=0.5, depth=2) for c in (4, 6)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 3))
    return Network(nn.Conv2d(1, 4, 3, padding=1), flows, head, transitions=[nn.Conv2d(4, 6, 1)]).double()


@pytest.mark.parametrize("solver", ["euler", "bs23"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_without_penalties_a_step_of_each_layer_is_gradient_descent(solver, decay):
    torch.manual_seed(0)
    network, x, y = two_flows(solver), torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    network.encoder.bias.requires_grad_(False)
    other = copy.deepcopy(network)
    training = SuccessiveApproximations(network, rho=0.0, decay=decay, optimizer=SGD)
    descent = torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(3):
        loss = training.update(x, y)
        descent.zero_grad()
        expected = F.cross_entropy(other(x), y)
        expected.backward()
        descent.step()
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close([*network.parameters()], [*other.parameters()], rtol=1e-10, atol=1e-12)


def test_what_a_layer_maximizes_is_the_augmented_hamiltonian():
    """One step of SGD on it for the second of two blocks, written out."""
    torch.manual_seed(0)
    flow = Flow(lambda: MLPField(2, 3, activation="tanh"), solver="euler", h=0.5, depth=2).double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        x1 = x + 0.5 * flow.blocks[0].fields[0](0.0, x)
        x2 = x1 + 0.5 * flow.blocks[1].fields[0](0.5, x1)
    field = copy.deepcopy(flow.blocks[1].fields[0])
    p2 = -(x2 - y)
    at = x1.clone().requires_grad_()
    (p1,) = torch.autograd.grad((p2 * (at + 0.5 * field(0.5, at))).sum(), at)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    for _ in range(2):
        step = at + 0.5 * field(0.5, at)
        (costate,) = torch.autograd.grad((p2 * step).sum(), at, create_graph=True)
        value = (p2 * step).sum() - 3 / 2 * ((x2 - step).square().sum() + (p1 - costate).square().sum())
        optimizer.zero_grad()
        (-value / 4).backward()
        optimizer.step()
    SuccessiveApproximations(flow, half_square, rho=3.0, optimizer=SGD, iterations=2).update(x, y)
    torch.testing.assert_close([*flow.blocks[1].fields[0].parameters()], [*field.parameters()])


def test_digits_are_learned_in_a_few_sweeps():
    torch.manual_seed(0)
    x, y = (torch.tensor(one) for one in load_digits(return_X_y=True))
    x = x.float() / 16
    flow = Flow(MLPField(32, 64), solver="euler", h=1.0, depth=4)
    network = Network(nn.Linear(64, 32), flow, nn.Linear(32, 10))
    train, held_out = Batches(TensorData(x[:400], y[:400]), 400), Batches(TensorData(x[1000:], y[1000:]), 400)
    reported = []
    rows = fit_maximum_principle(network, train, epochs=8, validation=held_out, report=reported.append)
    losses = [row["train_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert rows[-1]["validation_accuracy"] > 0.7
    assert reported == rows


def test_gradients_stay_and_statistics_are_those_of_one_pass():
    flow = Flow(lambda: MLPField(2, 4, norm="batch"), solver="euler", depth=2)
    other, x = copy.deepcopy(flow), torch.randn(8, 2)
    weight = flow.blocks[0].fields[0].first.weight
    weight.grad = torch.ones_like(weight)
    state = torch.get_rng_state()
    SuccessiveApproximations(flow, half_square).update(x, x)
    assert torch.equal(state, torch.get_rng_state())
    assert (weight.grad == 1).all()
    assert flow.blocks[1].fields[0].first.weight.grad is None
    other(x)
    for one, two in zip(flow.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_fields_get_what_they_take_besides():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t, x, c):
            return self.layer(x) * c

    x, y = (torch.randn(6, 2), torch.ones(6, 1)), torch.randn(6, 2)
    flow = Flow(lambda: Conditioned(), depth=2, solver="euler")
    before = half_square(flow(*x), y)
    training = SuccessiveApproximations(flow, half_square)
    assert training.update(x, y) == before
    assert training.update(x, y) < before


def test_words_are_inputs_too():
    network = Network(nn.Sequential(nn.Embedding(5, 4)), Flow(MLPField(4), depth=2), nn.Linear(4, 3))
    training, x, y = SuccessiveApproximations(network), torch.arange(5), torch.arange(5) % 3
    assert training.update(x, y) > training.update(x, y)


def test_weights_that_run_away_are_taken_back():
    flow, x = Flow(MLPField(2), solver="euler"), torch.randn(4, 2)
    before = copy.deepcopy(flow)
    far = partial(torch.optim.SGD, lr=1e30)
    with pytest.raises(ValueError, match=r"the weights of blocks.0 must stay finite, and SGD takes them to infinity"):
        SuccessiveApproximations(flow, half_square, optimizer=far, iterations=5).update(x, x)
    torch.testing.assert_close([*flow.parameters()], [*before.parameters()], rtol=0, atol=0)


def test_a_network_without_a_field_gets_it_from_the_first_batch():
    network = Network(nn.Identity(), Flow(depth=2), nn.Linear(2, 2))
    fit_maximum_principle(network, [(torch.rand(4, 2), torch.arange(4) % 2)], epochs=1)
    assert len(network.flows[0].blocks) == 2


def one_weight_in_two():
    flow = Flow(lambda: MLPField(2), depth=2)
    flow.blocks[1].fields[0].first = flow.blocks[0].fields[0].first
    return flow


MLP = MLPField(2)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: SuccessiveApproximations(Flow(MLP, depth=2, shared=True)), ValueError, "one block for all its steps"),
        (lambda: SuccessiveApproximations(Flow(MLP, stage_fields="chained")), ValueError, "chained fields"),
        (lambda: SuccessiveApproximations(ReversibleFlow(MLP)), ValueError, "ReversibleFlow, whose steps are of two"),
        (lambda: SuccessiveApproximations(NeuralODE(MLP)), TypeError, "an odenets.Network or a Flow.*NeuralODE"),
        (
            lambda: SuccessiveApproximations(Network(nn.Identity(), NeuralODE(MLP), nn.Identity())),
            TypeError, "must be of Flows, whose blocks have weights of their own, got a NeuralODE",
        ),
        (lambda: SuccessiveApproximations(Flow(depth=2)), ValueError, "no field yet: call"),
        (lambda: SuccessiveApproximations(points_network(readout="ensemble")), ValueError, "must read the solution"),
        (
            lambda: SuccessiveApproximations(points_network().requires_grad_(False)),
            ValueError, "no parameter that requires a gradient",
        ),
        (lambda: SuccessiveApproximations(one_weight_in_two()), ValueError, "in blocks.0 and in blocks.1"),
        (
            lambda: SuccessiveApproximations(Network(nn.Dropout(0.1), Flow(MLP), nn.Linear(2, 2))),
            ValueError, "encoder has active dropout",
        ),
        (
            lambda: SuccessiveApproximations(points_network(), ActionPenalty(0.1)),
            ValueError, r"of the output alone, got ActionPenalty, which measures steps, \['action'\]",
        ),
        (lambda: SuccessiveApproximations(points_network(), Task), TypeError, "got the class Task: call it"),
        (lambda: SuccessiveApproximations(points_network(), 3), TypeError, "must be an odenets Objective"),
        (lambda: SuccessiveApproximations(points_network(), rho=-1.0), ValueError, "rho must be finite"),
        (lambda: SuccessiveApproximations(points_network(), decay="0"), TypeError, "decay must be a number"),
        (lambda: SuccessiveApproximations(points_network(), iterations=0), ValueError, "iterations must be at least 1"),
        (lambda: SuccessiveApproximations(points_network(), lr=1), TypeError, "takes no 'lr': that is optimizer"),
        (
            lambda: SuccessiveApproximations(points_network(), optimizer=0.1),
            TypeError, "optimizer must be a function of parameters, got float",
        ),
        (
            lambda: SuccessiveApproximations(points_network(), lambda output, y: output.sum() / 0).update(
                torch.rand(2, 2), torch.zeros(2)),
            ValueError, "loss must be finite, got -?inf: take a larger rho",
        ),
        (
            lambda: fit_maximum_principle(points_network(), [(torch.rand(2, 2), torch.arange(2))], epochs=1,
                                          criterion=F.cross_entropy),
            TypeError, "takes no 'criterion': that is objective",
        ),
    ],
)  # fmt: skip
def test_what_it_does_not_train_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()
