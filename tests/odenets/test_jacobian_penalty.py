"""The penalty of Jacobians: exact over all probes, its gradient, a regression that it turns into ridge, refusals."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, ReversibleFlow, adapt, measures
from odenets.measures.derivatives import probes_like, projected_jacobian
from odenets.models import points_network
from odenets.module_wise import fit_modules, split_into_modules
from odenets.module_wise.steps import end_to_end_step
from odenets.penalties import ErrorPenalty, JacobianPenalty
from odenets.recording import Recording, record
from odenets.training import Batches, Task, TensorData, evaluate, fit, fit_instances
from solvers.reductions import SMALL
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling, Velocity

ZERO = Task(lambda output, y: 0.0 * output.sum())
SGD = partial(torch.optim.SGD, lr=0.1)
SIGNS = torch.tensor([*product([-1.0, 1.0], repeat=3)], dtype=torch.float64)


class Linear(nn.Module):
    """``v = x A^T`` in float64."""

    def __init__(self, features=3):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(features, features, dtype=torch.float64) / 2)

    def forward(self, t, x):
        return x @ self.matrix.T

    def reset_parameters(self):
        nn.init.normal_(self.matrix, std=0.5)


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


@pytest.fixture
def batch():
    return torch.rand(8, 2), torch.arange(8) % 2


def over_all_probes(step):
    """The mean over all vectors of signs, the expectation of the estimate."""
    return torch.stack([projected_jacobian(step, e.expand_as(step.x0)) for e in SIGNS]).mean(0)


def test_of_a_linear_field_it_is_the_norm_of_the_matrix_and_its_gradient_twice_that(x):
    field = Linear()
    (step,) = Flow(field, solver="euler", h=1.0).steps(x.requires_grad_())
    values = over_all_probes(step)
    torch.testing.assert_close(values, field.matrix.square().sum().expand(5) / 3)
    (slope,) = torch.autograd.grad(values.mean(), field.matrix)
    torch.testing.assert_close(slope, 2 * field.matrix / 3)


def rk3(matrix, h):
    """The residue's matrix of a step of BS23 on a linear field, the exponential to third order."""
    z = h * matrix
    return (z + z @ z / 2 + z @ z @ z / 6) / h


@pytest.mark.parametrize(
    "flow",
    [
        lambda field: Flow(field, solver="bs23", h=[0.3, 0.7], depth=2, shared=True),
        lambda field: NeuralODE(field, solver="bs23", steps=3),
        lambda field: NeuralODE(field, solver="bs23"),
        lambda field: NeuralODE(field, solver="bs23", steps=3, t0=1.0, t1=0.0),
    ],
    ids=["flow", "fixed", "adaptive", "backwards"],
)
def test_every_step_has_its_own_also_where_a_stage_is_passed_on(x, flow):
    field = Linear()
    network = flow(field)
    _, records = record(network, x, {"jacobian": measures.measure(gradient=True)(over_all_probes)})
    sizes = [step.h for step in network.steps(x)]
    assert len(sizes) > 1
    expected = torch.stack([rk3(field.matrix, h).square().sum() for h in sizes]) / 3
    torch.testing.assert_close(records["jacobian"], expected[:, None].expand(-1, 5))
    torch.testing.assert_close(
        torch.autograd.grad(records["jacobian"].mean(1).sum(), field.matrix),
        torch.autograd.grad(expected.sum(), field.matrix),
    )


def test_of_a_field_with_a_kink_and_batch_norm_it_is_the_jacobian_of_the_whole_batch():
    field = MLPField(3, activation="relu", norm="batch").double()
    flow = Flow(field, solver="euler", h=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)
    signs = torch.tensor([*product([-1.0, 1.0], repeat=12)], dtype=torch.float64).reshape(-1, 4, 3)
    (step,) = flow.steps(x.requires_grad_())
    value = torch.stack([projected_jacobian(step, e) for e in signs]).mean(0)
    exact = torch.autograd.functional.jacobian(lambda x: field(0.0, x), x)  # (4, 3, 4, 3)
    torch.testing.assert_close(value, exact.square().sum((0, 1, 3)) / 3)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_penalty_is_an_unbiased_estimate_and_the_seed_decides(x, distribution):
    flow = Flow(Linear(), solver="euler", h=[0.25, 0.5], depth=2)
    objective = JacobianPenalty(2.0, ZERO, probes=1500, distribution=distribution)
    expected = sum(
        2 * h * block.fields[0].matrix.square().sum() / 3 for h, block in zip(flow.h, flow.blocks, strict=True)
    )
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(objective(flow, x, x))
    assert values[0].item() == values[1].item()
    assert values[0].item() == pytest.approx(expected.item(), rel=0.05)
    e = probes_like(x, 4000, distribution)
    assert e.mean().abs() < 0.02
    assert e.var().item() == pytest.approx(1, abs=0.02)
    assert len(e.unique()) == 2 or distribution == "gaussian"


def test_fitted_to_the_end_a_linear_step_is_ridge_regression():
    """``mean |x + A x - y|^2 / D + w |A|^2 / D``, and with all probes drawn the estimate is exact."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.randn(40, 3, dtype=torch.float64)
    weight, flow = 0.3, Flow(Linear(), solver="euler", h=1.0)
    measure = measures.measure(gradient=True)(over_all_probes)
    objective = JacobianPenalty(weight, Task(F.mse_loss))
    objective.measures["jacobian_penalty"] = measure
    optimizer = torch.optim.LBFGS(flow.parameters(), lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(flow, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    ridge = torch.linalg.solve(x.T @ x / 40 + weight * torch.eye(3), x.T @ (y - x) / 40).T
    torch.testing.assert_close(flow.blocks[0].fields[0].matrix.detach(), ridge, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_works_whatever_requires_gradients(batch, mode):
    """First states of a frozen encoder, or of none; in eval mode; without gradients, in inference mode."""
    network = points_network(depth=2)
    network = Network(nn.Linear(2, 2).requires_grad_(False), network.flows[0], network.head)
    getattr(network, mode)()
    objective = JacobianPenalty(1.0)
    torch.manual_seed(0)
    loss = objective(network, *batch)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in network.flows[0].blocks[0].fields.parameters() if p.ndim > 1)
    for quiet in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with quiet():
            value = objective(network, *batch)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss.detach())
    assert batch[0].grad is None
    assert not batch[0].requires_grad


def test_an_encoder_that_writes_into_its_input_is_called_with_a_copy(batch):
    network = points_network(depth=1)
    network.encoder = Calling(lambda m, x: x.mul_(2.0))
    before = batch[0].clone()
    JacobianPenalty(1.0)(network, *batch).backward()
    torch.testing.assert_close(batch[0], before)


def test_an_adapted_model_has_that_of_its_blocks(x):
    fields = [MLPField(3).double(), MLPField(3).double()]
    blocks = [Calling(lambda m, x: x + m.field(0.0, x), field=field) for field in fields]
    adapted = adapt(nn.Sequential(*blocks), blocks=["0", "1"])
    flow = Flow(iter(fields).__next__, solver="euler", h=1.0, depth=2)
    values = []
    for network in (adapted, flow, adapted):
        torch.manual_seed(1)
        values.append(JacobianPenalty(1.0, ZERO)(network, x, x))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[2], values[1])


def test_a_published_network_is_penalized():
    adapted = adapt(torchvision.models.resnet18(num_classes=3).eval())
    JacobianPenalty(0.1)(adapted, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    loss = JacobianPenalty(0.1)(adapted, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    loss.backward()
    assert adapted.model.layer1[0].conv1.weight.grad.isfinite().all()


def test_training_evaluation_and_modules_take_it(batch):
    data = Batches(TensorData(*batch), 4)
    objective = ErrorPenalty(0.1, JacobianPenalty(0.1))
    network = points_network(depth=2, solver="bs23")
    assert fit(network, data, epochs=1, optimizer=SGD, objective=objective, validation=data).rows
    with unchanged(network):
        assert evaluate(network, data, objective=objective).loss > 0
    fit_modules(
        split_into_modules(points_network(depth=2), 2, batch[0]), data, epochs=1, optimizer=SGD,
        objective=lambda k, K: JacobianPenalty(0.1),
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "bs23"])
def test_its_gradient_is_that_of_differences_where_operators_add_the_stages_up(solver):
    torch.manual_seed(0)
    flow = Flow(lambda: ConvField(8, activation="tanh"), solver=solver, depth=2).double()
    x, weight = torch.randn(12, 8, 16, 16, dtype=torch.float64), flow.blocks[0].fields[0].conv1.weight
    assert x.numel() > SMALL
    direction, eps = torch.randn_like(weight), 1e-5

    def loss():
        torch.manual_seed(1)
        return JacobianPenalty(1.0, ZERO)(flow, x, x)

    (slope,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight += eps * direction
        above = loss()
        weight -= 2 * eps * direction
        below = loss()
    torch.testing.assert_close((slope * direction).sum(), (above - below) / (2 * eps), rtol=1e-5, atol=1e-8)


def test_wrappers_and_checkpoints_change_nothing(batch, tmp_path):
    """pytorch#24005: a gradient within the pass, checkpoints and DistributedDataParallel together."""
    field = MLPField(2)
    again = Velocity(lambda m, t, x: checkpoint(m.field, t, x, use_reentrant=False), field=field)
    plain, inner = (Network(nn.Identity(), Flow(one, h=0.5), nn.Linear(2, 2)) for one in (field, again))
    inner.head = plain.head
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        objective, slopes = JacobianPenalty(1.0), []
        wrapped = nn.parallel.DistributedDataParallel(Recording(inner, objective.measures))
        for network in (plain, wrapped):
            torch.manual_seed(0)
            plain.zero_grad()
            objective(network, *batch).backward()
            slopes.append([p.grad.clone() for p in plain.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*slopes)


def test_it_is_computed_in_float32_where_states_are_narrower(batch):
    network = points_network(depth=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = JacobianPenalty(1.0)(network, *batch)
    loss.backward()
    assert loss.dtype == torch.float32
    narrow = network.bfloat16()
    _, records = record(narrow, batch[0].bfloat16(), {"jacobian": measures.jacobian})
    assert records["jacobian"].dtype == torch.float32


def test_less_is_left_of_the_jacobians_where_they_are_penalized():
    torch.manual_seed(0)
    x = torch.randn(64, 2)
    y = (x.norm(dim=1) > 1.2).long()
    left = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        network = points_network(depth=3)
        adam = partial(torch.optim.Adam, lr=0.02)
        fit(network, Batches(TensorData(x, y), 64), epochs=60, optimizer=adam, objective=JacobianPenalty(weight))
        _, records = record(network, x, {"jacobian": measures.jacobian.bind(probes=16)})
        left.append(records["jacobian"].sum(0).mean().item())
    assert left[1] < 0.5 * left[0]


def test_it_is_copied_pickled_and_printed(batch):
    network, objective = points_network(depth=2), JacobianPenalty(0.5, probes=3, distribution="gaussian")
    values = []
    for one in (objective, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.manual_seed(0)
        values.append(one(network, *batch).item())
    assert len({*values}) == 1
    assert "weight=0.5, measure='jacobian_penalty'" in repr(objective)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: JacobianPenalty(-1.0), ValueError, "weight must be finite and not negative"),
        (lambda: JacobianPenalty(True), TypeError, r"weight must be a number, and comes first, JacobianPenalty\(0.1"),
        (lambda: JacobianPenalty(1.0, F.mse_loss), TypeError, "task must be an objective"),
        (lambda: JacobianPenalty(1.0, probes=0), ValueError, "probes must be at least 1, got 0"),
        (lambda: JacobianPenalty(1.0, probes=1.5), TypeError, "probes must be a whole number"),
        (lambda: JacobianPenalty(1.0, distribution="normal"), ValueError, "'rademacher' or 'gaussian', got 'normal'"),
        (lambda: JacobianPenalty(1.0, num_proj=3), TypeError, "takes no 'num_proj': that is probes"),
    ],
)
def test_what_it_cannot_weigh_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda: ReversibleFlow(lambda: MLPField(2), depth=2), ValueError, "do not depend on its state x0.*Reversible"),
        (lambda: NeuralODE(lambda t, x: torch.ones_like(x), steps=2), ValueError, "do not depend on its state x0"),
        (lambda: NeuralODE(MLPField(2), control="sample"), ValueError, "one with a size for each sample"),
        (lambda: NeuralODE(MLPField(2), gradient="backsolve"), ValueError, "take gradient='direct'"),
        (lambda: Flow(MLPField(2), solver="implicit_euler"), RuntimeError, "take an explicit method"),
        (
            lambda: adapt(Calling(lambda m, x: m.add(x.clone()), add=Calling(lambda m, x: x.add_(1)))
                          , blocks=["add"]),
            ValueError, "block 'add' has no Jacobian in a state that is seen as a copy",
        ),
    ],
)  # fmt: skip
def test_steps_without_a_jacobian_are_refused(network, error, message):
    with pytest.raises(error, match=message):
        JacobianPenalty(1.0, ZERO)(network(), torch.randn(4, 2), torch.randn(4, 2))


def test_where_it_is_recorded_without_a_gradient_the_remedy_is_named(batch):
    network = points_network(depth=2)
    with pytest.raises(ValueError, match=r"network.record\(x.requires_grad_\(\), ...\), or odenets.recording.record"):
        network.record(batch[0], jacobian=measures.jacobian)
    with pytest.raises(ValueError, match=r"differentiates its steps.* compile=False"):
        Recording(network, {"jacobian": measures.jacobian + measures.action}, compile=True)
    with pytest.raises(ValueError, match="compile=False"):
        fit(network, [batch], epochs=1, optimizer=SGD, objective=JacobianPenalty(1.0), compile=True)
    whole = split_into_modules(network, 2, batch[0])
    with pytest.raises(ValueError, match="checkpointed must be False where 'jacobian_penalty' is measured"):
        end_to_end_step(whole, JacobianPenalty(1.0), SGD(whole.parameters()), *batch, checkpointed=True)
    with pytest.raises(ValueError, match="train one network after the other"):
        fit_instances([network], [[batch]], epochs=1, optimizer=SGD, objective=lambda: JacobianPenalty(1.0))
