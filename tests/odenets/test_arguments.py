"""Counts are whole numbers, and what would do nothing without another argument is refused, by the argument's name."""

from functools import partial

import numpy as np
import pytest
import torch

from odenets import ConvField, MLPField
from odenets.analysis import iterative_refinement, measure_memory
from odenets.depth import AdaptiveDepth, DepthRule
from odenets.detection import LID, Pipeline, ProjectedDescent, Trajectory
from odenets.errors import check_count
from odenets.fields import ResNeXtField
from odenets.least_action import ActionPenalty, Cost, LeastAction
from odenets.models import points_network
from odenets.module_wise import fit_in_processes, fit_modules, split_into_modules, trgl_multipliers
from odenets.module_wise.plan import Plan
from odenets.normalization import StageBatchNorm
from odenets.training import Batches, CrossEntropy, EarlyStopping, TensorData, fit, fit_instances, hold_out
from odenets.training.datasets import points
from solvers import Tolerance

POINTS = points("moons", 20, seed=0)
IMAGES = TensorData(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
SGD = partial(torch.optim.SGD, lr=0.1)

COUNTS = {
    "patience": lambda n: EarlyStopping(patience=n),
    "every": lambda n: LeastAction(every=n),
    "every of modules": lambda n: trgl_multipliers(every=n)(0, 1),
    "max_depth": lambda n: DepthRule(1e-3, max_depth=n),
    "until": lambda n: AdaptiveDepth(DepthRule(1e-3), list, until=n),
    "features": MLPField,
    "hidden": lambda n: MLPField(2, hidden=n),
    "channels": ConvField,
    "kernel_size": lambda n: ConvField(2, kernel_size=n),
    "groups": lambda n: ResNeXtField(8, 8, n),
    "stages": lambda n: StageBatchNorm(4, stages=n),
    "reference": lambda n: LID(k=2, reference=n),
    "vectors": lambda n: Trajectory(vectors=n),
    "batch_size": lambda n: Pipeline(points_network(), batch_size=n),
    "steps": lambda n: ProjectedDescent(steps=n),
    "crop": lambda n: Batches(IMAGES, 5, seed=0, crop=n),
    "views": lambda n: fit_modules(modules(), Batches(POINTS, 10), epochs=1, optimizer=SGD, views=n),
    "epochs": lambda n: fit_in_processes(modules(), Batches(POINTS, 10), epochs=n, optimizer=SGD),
    "buffer": lambda n: fit_in_processes(modules(), Batches(POINTS, 10), epochs=1, optimizer=SGD, buffer=n),
    "replicas": lambda n: fit_in_processes(modules(), Batches(POINTS, 10), epochs=1, optimizer=SGD, replicas=n),
}


def modules():
    return split_into_modules(points_network(depth=2), 2, POINTS.x)


@pytest.mark.parametrize("number", [2.5, True, "3"])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_whole_numbers(name, number):
    with pytest.raises(TypeError, match=f"^{name.split()[0]} must be a whole number, got {number!r}"):
        COUNTS[name](number)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_have_a_least_value(name):
    with pytest.raises(ValueError, match=f"^{name.split()[0]} must"):
        COUNTS[name](-1)


def test_a_count_of_numpy_is_one():
    check_count("k", np.int64(3), 1)


@pytest.mark.parametrize("steps", [2.5, True])
def test_attempted_steps_are_counted_whole(steps):
    with pytest.raises(ValueError, match=f"max_steps must be at least 1 and finite, a whole number, got {steps}"):
        Tolerance(max_steps=steps)
    assert Tolerance(max_steps=1e5).max_steps == 100_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthRule("1e-3"), "tolerance must be a number, got '1e-3'"),
        (lambda: Tolerance(rtol="1e-3"), "rtol must be a number or a tensor, got '1e-3'"),
        (lambda: LeastAction(lambda0="1"), "lambda0 must be a number, got '1'"),
        (lambda: LeastAction(tau=True), "tau must be a number, got True"),
        (lambda: Cost(p="2"), "p must be a number, got '2'"),
        (lambda: ActionPenalty(True), "weight must be a number"),
        (lambda: Batches(IMAGES, 5, seed=0, flip="no"), "flip must be True or False, got 'no'"),
        (lambda: measure_memory(torch.rand(3)), "work must be a function of no arguments, got Tensor"),
        (lambda: iterative_refinement(points_network(), POINTS), r"got TensorData: Batches\(data, size\)"),
    ],
)
def test_numbers_flags_and_functions_are_such(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def whole(**options):
    return fit(points_network(depth=2), Batches(POINTS, 10), epochs=1, optimizer=SGD, **options)


def parameters(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


SCALARS = [torch.tensor, np.array, np.float32, np.float64]


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_scalar_of_torch_or_numpy_is_a_number(scalar):
    for name in ("tolerance", "K", "min_h"):
        numbers = {"tolerance": 0.5, "K": 4.0, "min_h": 0.25}
        assert DepthRule(**numbers | {name: scalar(numbers[name])}) == DepthRule(**numbers)
    for name in ("lambda0", "tau"):
        assert repr(LeastAction(**{name: scalar(0.5)})) == repr(LeastAction(**{name: 0.5}))
    assert Cost(p=scalar(3.0)).measure == Cost(p=3.0).measure
    assert Cost(p=scalar(2.0)).measure == Cost().measure


@pytest.mark.parametrize("scalar", SCALARS)
def test_a_training_is_clipped_by_a_scalar_of_torch_or_numpy(scalar):
    networks = []
    for clip_norm, loss_limit in [(0.125, 64.0), (scalar(0.125), scalar(64.0)), (None, 64.0)]:
        torch.manual_seed(0)
        networks.append(points_network(depth=2))
        fit(networks[-1], Batches(POINTS, 10), epochs=1, optimizer=SGD, clip_norm=clip_norm, loss_limit=loss_limit)
    number, same, free = map(parameters, networks)
    assert torch.equal(number, same)
    assert not torch.equal(number, free)


def test_a_number_takes_no_gradients_and_no_flag():
    for value in (torch.tensor(1.0, requires_grad=True), torch.tensor(True), np.array(True), torch.ones(1)):
        with pytest.raises(TypeError, match=r"clip_norm must be a number, got"):
            whole(clip_norm=value)


def test_modules_and_their_epochs_are_counted_by_integers_of_numpy():
    network = points_network(depth=4)
    network(POINTS.x)
    for balance in ("blocks", "memory"):
        expected = split_into_modules(network, 2, POINTS.x, balance=balance).ends
        assert split_into_modules(network, np.int64(2), POINTS.x, balance=balance).ends == expected
    for epochs in (np.int64(2), [np.int64(2), np.int64(1)]):
        plan = Plan.of(2, epochs, "sequential", np.int64(1))
        assert plan == Plan.of(2, epochs if isinstance(epochs, list) else 2, "sequential", 1)
        assert {type(count) for count in [*plan.epochs, plan.laps]} == {int}


def test_a_part_of_points_is_counted_by_an_integer_of_numpy():
    parts = [hold_out(POINTS, size, seed=0) for size in (6, np.int64(6))]
    assert torch.equal(parts[0][1].x, parts[1][1].x)
    assert len(parts[1][1]) == 6


def several(**options):
    networks, batches = [points_network(depth=1)], [Batches(POINTS, 10)]
    return fit_instances(networks, batches, epochs=1, optimizer=SGD, objective=CrossEntropy, **options)


def in_modules(data=POINTS, **options):
    return fit_modules(modules(), Batches(data, 10, seed=0), epochs=1, optimizer=SGD, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: whole(checkpoint="mine.pt"), "checkpoint='mine.pt' without run"),
        (lambda: whole(lr_interval="step"), "lr_interval='step' without lr_scheduler"),
        (lambda: several(patience=2), "patience=2 without it"),
        (lambda: several(patience=3, measured={"train": [POINTS]}), "patience=3 without it"),
        (lambda: several(every=2), "every=2 without measured"),
        (lambda: several(lr_interval="step"), "lr_interval='step' without lr_scheduler"),
        (lambda: in_modules(checkpoint="mine.pt"), "checkpoint='mine.pt' without run"),
        (lambda: in_modules(lr_interval="step"), "lr_interval='step' without lr_scheduler"),
        (lambda: in_modules(order="sequential", cache="memory", views=2), "views=2 of Batches that draw the same"),
        (lambda: LeastAction(cost=Cost("residue", p=3), p=3), r"got p=3: Cost\('residue', p=3\)"),
        (lambda: AdaptiveDepth(DepthRule(1e-3), list, every=3, until=2), "until must be at least 3, got 2"),
    ],
)
def test_what_would_do_nothing_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
