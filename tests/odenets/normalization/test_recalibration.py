"""What recalibration sets is what it saw; what it does not run, and what fails, stays as it was."""

import copy

import pytest
import torch
from torch import nn

from odenets import models, recalibrate
from odenets.module_wise import split_into_modules
from odenets.normalization import StageBatchNorm
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling
from tests.odenets.normalization.networks import X, network, trained


@pytest.mark.parametrize("solver", ["bs23", "dopri5", "rk4"])
def test_recalibrated_statistics_are_those_of_the_states_of_each_stage(solver):
    net = trained(solver)
    *_, step = net.flows[0].train().steps(X)  # with a batch's own statistics, as while it is recalibrated
    velocities = [sum((a * p for a, p in zip(row, step.stages, strict=False)), X * 0) for row in step.tableau.a]
    points = [step.x0 + step.h * velocity for velocity in velocities]
    recalibrate(net, [X])
    field = net.flows[0].blocks[1].fields[0]
    mean = torch.stack([x.mean((0, 2, 3)) for x in points])
    torch.testing.assert_close(field.norm1.running_mean, mean, rtol=1e-4, atol=1e-4)
    assert field.norm1.batches.tolist() == [1] * len(points)


def test_the_average_weighs_batches_by_their_samples():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    recalibrate(net, [X[:9], X[9:]])
    torch.testing.assert_close(net[0].running_mean, X.mean((0, 2, 3)))
    by_batch = torch.stack([X[:9].transpose(0, 1).flatten(1).var(1), X[9:].transpose(0, 1).flatten(1).var(1)])
    torch.testing.assert_close(net[0].running_var, (9 * by_batch[0] + 3 * by_batch[1]) / 12)
    torch.testing.assert_close(net[1].running_mean, torch.zeros(3), rtol=0, atol=1e-3)  # behind the batch norm, in sum
    assert net[0].num_batches_tracked == 2
    assert net[1].num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_are_as_precise_as_the_dtype_holds_them(dtype):
    """A running average in bfloat16 stops moving after a few hundred batches."""
    norm = nn.BatchNorm1d(1).to(dtype)
    batches = [(torch.tensor([[0.25], [-0.25]]) + i % 2).to(dtype) for i in range(400)]
    recalibrate(norm, batches)
    assert norm.running_mean.dtype == dtype
    assert norm.running_mean.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_taken_to_the_dtype_of_the_network(dtype):
    net = network().to(dtype)
    recalibrate(net, [X])
    again = copy.deepcopy(net)
    recalibrate(again, [X.to(dtype)], again)
    torch.testing.assert_close(net.state_dict(), again.state_dict())


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_momenta_modes_and_hooks_are_restored(momentum):
    net = network().train()
    norms = [m for m in net.modules() if isinstance(m, StageBatchNorm)]
    for norm in norms:
        norm.momentum = momentum
    net.head.eval()
    modes, weights = [m.training for m in net.modules()], copy.deepcopy(dict(net.named_parameters()))
    assert recalibrate(net, [X]) == 4
    torch.testing.assert_close(dict(net.named_parameters()), weights, rtol=0, atol=0)
    assert [m.training for m in net.modules()] == modes
    assert all(norm.momentum == momentum and not norm._forward_hooks for norm in norms)
    assert not net.flows[0].takes_closing


def test_a_compiled_network_is_recalibrated():
    net = network().train()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(X)
    assert recalibrate(compiled, [X, X]) == 4
    assert net.flows[0].blocks[0].fields[0].norm1.batches.tolist() == [2, 2, 2, 2]


def test_norms_that_are_not_run_keep_their_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = torch.randn(8, 2) + 3
    net.train()(x)
    before = net[1].running_mean.clone()
    assert recalibrate(net, [x], net[0]) == 1
    torch.testing.assert_close(net[0].running_mean, x.mean(0))
    assert torch.equal(net[1].running_mean, before)
    assert net[1].num_batches_tracked == 1


def test_frozen_norms_keep_their_statistics():
    net = nn.Sequential(nn.BatchNorm1d(2).eval().requires_grad_(False), nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))
    x = torch.randn(8, 2) + 3
    assert recalibrate(net, [x]) == 2
    assert [norm.running_mean.any().item() for norm in net] == [False, True, True]
    assert [norm.training for norm in net] == [False, False, True]
    assert recalibrate(net.eval(), [x]) == 3  # a network in eval mode has no frozen part
    assert net[0].running_mean.all()


def test_norms_without_statistics_are_passed_over():
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2))
    assert recalibrate(net, [torch.randn(4, 2, 3)]) == recalibrate(nn.Linear(2, 2), []) == 0


def test_synchronized_batch_norms_are_recalibrated():
    net = nn.SyncBatchNorm(2)
    x = torch.randn(8, 2) + 3
    recalibrate(net, [x])
    torch.testing.assert_close(net.running_mean, x.mean(0))


def _broken(x):
    yield x
    raise KeyError("no more")


@pytest.mark.parametrize(
    ("batches", "run", "error", "message"),
    [
        (lambda: iter(()), None, ValueError, "batches must hold at least one batch, got none"),
        (lambda: [X], lambda x: None, ValueError, "none of the 4 batch norms was run"),
        (lambda: _broken(X), None, KeyError, "no more"),
        (lambda: [X, X[:, :2]], None, ValueError, r"x must have shape \(B, 3, \.\.\.\) .* got \(12, 2, 5, 5\)$"),
        (lambda: X, None, TypeError, r"batches must hold batches of inputs.*one tensor: \[x\] for one"),
        (lambda: [X, [X, X, X]], None, TypeError, r"pairs \(inputs, labels\), got a list of 3 parts"),
    ],
)
def test_after_an_error_the_statistics_are_what_they_were(batches, run, error, message):
    net = trained().train()
    net.head.eval()
    with unchanged(net), pytest.raises(error, match=message):
        recalibrate(net, batches(), run)
    assert net.flows[0].blocks[0].fields[0].norm1.momentum == 0.1
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        net.eval().ensemble(X)


def test_a_batch_of_one_number_per_channel_is_refused_and_changes_nothing():
    net = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate(net, [torch.randn(4, 2), torch.randn(1, 2)])
    assert not net.running_mean.any()


def test_a_lazy_batch_norm_is_refused():
    with pytest.raises(ValueError, match=r"lazy batch norm.*call network\(x\) once"):
        recalibrate(nn.LazyBatchNorm1d(), [torch.randn(4, 2)])


def test_statistics_that_became_nan_are_replaced():
    net = nn.BatchNorm1d(2)
    net.running_mean.fill_(torch.nan)
    x = torch.randn(8, 2)
    recalibrate(net, [x])
    torch.testing.assert_close(net.running_mean, x.mean(0))


@pytest.mark.parametrize("last_head", ["own", "auxiliary"])
def test_all_heads_of_modules_are_recalibrated(last_head):
    torch.manual_seed(0)
    images = torch.rand(16, 1, 8, 8)
    modules = split_into_modules(models.resnet9(features=4, size=8, depth=2), 2, images, last_head=last_head)
    norms = [m for part in modules.modules_in_order for m in part.modules() if isinstance(m, nn.BatchNorm2d)]
    heads = [m for part in modules.modules_in_order for m in part.head.modules() if hasattr(m, "num_batches_tracked")]
    assert norms
    assert heads
    recalibrate(modules, [images, images])
    assert all(norm.num_batches_tracked == 2 for norm in (*norms, *heads))


def test_a_shared_norm_averages_over_all_its_calls():
    norm = nn.BatchNorm1d(2)

    x = torch.randn(8, 2)
    recalibrate(Calling(lambda m, x: m.norm(x) + m.norm(x + 2), norm=norm), [x])
    torch.testing.assert_close(norm.running_mean, x.mean(0) + 1)
