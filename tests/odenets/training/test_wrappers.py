"""Networks that compilers and processes wrap train as the plain ones, or say what to wrap."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from odenets import MLPField
from odenets.least_action import LeastAction
from odenets.recording import Recording
from tests.odenets.training import own_loop_in_processes
from tests.odenets.training.loops import X, Y, counted, flow, sgd, take_steps


@pytest.mark.parametrize("what", ["record", "recording", "loop"])
def test_a_compiled_record_counts(what):
    torch.compiler.reset()
    network, objective = flow(), LeastAction()
    optimizer, called = sgd(network), network
    if what == "record":
        network.record = torch.compile(network.record, backend="eager")  # type: ignore[method-assign]
    if what == "recording":
        called = torch.compile(Recording(network, objective.measures), backend="eager", fullgraph=True)
    loss = torch.compile(objective, backend="eager") if what == "loop" else objective
    take_steps(called, loss, optimizer, 3)
    assert counted(objective) == 3
    eager, expected = flow(), LeastAction()
    take_steps(eager, expected, sgd(eager), 3)
    torch.testing.assert_close(objective.multiplier, expected.multiplier)


def test_a_recording_of_the_moment_counts():
    network, objective = flow(), LeastAction(update="after")
    optimizer = sgd(network)
    for _ in range(3):
        optimizer.zero_grad()
        objective(Recording(network, objective.measures), X, Y).backward()
        optimizer.step()
    assert counted(objective) == 3
    assert objective.multiplier > 1


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(how, network, measures):
    """A network in what wraps networks, so that it records."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(Recording(network, measures))
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in network.modules():
            if isinstance(block, MLPField):
                fully_shard(block)
        return fully_shard(Recording(network, measures))
    if how == "registered":
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        fully_shard(network)
        register_fsdp_forward_method(network, "record")
        return network
    from lightning_fabric import Fabric

    return Fabric(accelerator="cpu", devices=1).setup(Recording(network, measures))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("update", ["before", "after"])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "registered", "fabric"])
def test_wrapped_networks_train_as_plain_ones(process_group, how, update, parts):
    if how in ("fsdp", "registered"):
        torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    results = []
    for wrap in (False, True):
        network, objective = flow(), LeastAction(update=update)
        called = wrapped(how, network, objective.measures) if wrap else network
        optimizer = torch.optim.Adam(called.parameters(), fused=wrap)
        for _ in range(3):
            for _ in range(parts):
                objective(called, X, Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = network.state_dict()
        full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
        assert counted(objective) == 3
        results.append((full, objective.multiplier.clone()))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each with its share of every batch, gradients averaged, lambda grown by the mean of their losses."""
    script = Path(own_loop_in_processes.__file__)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    subprocess.run(launch, check=True, capture_output=True, timeout=1200)
    for update in ("before", "next", "after"):
        one = own_loop_in_processes.train(update, 0, 1)
        for rank in range(2):
            torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt")[update], one, rtol=1e-9, atol=1e-10)


def test_a_state_that_all_processes_must_look_for_says_so(monkeypatch):
    network, objective = flow(), LeastAction(update="after")
    take_steps(network, objective, sgd(network))
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match=r"call objective.after_step\(network, \(x, y\)\) on each before"):
            objective.state_dict()
    objective.after_step(network, (X, Y))
    assert counted(objective) == 1


REMEDY = r"take {}\(odenets.recording.Recording\(network, objective.measures\)\)"


def test_wrappers_that_would_be_bypassed_are_named(process_group):
    from lightning_fabric import Fabric
    from torch.distributed.fsdp import fully_shard

    objective, ddp, averaged = LeastAction(), nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel
    for wrapper, name in [
        (ddp(flow()), "DistributedDataParallel"),
        (torch.compile(flow()), "torch.compile"),
        (Fabric(accelerator="cpu", devices=1).setup(flow()), "_FabricModule"),
        (averaged(flow()), "AveragedModel"),
        (ddp(torch.compile(flow())), "DistributedDataParallel"),
        (torch.compile(ddp(flow())), "torch.compile"),
        (torch.compile(averaged(flow())), "torch.compile"),
        (averaged(averaged(flow())), "AveragedModel"),
    ]:
        with pytest.raises(TypeError, match=REMEDY.format(name)):
            objective(wrapper, X, Y)
    with pytest.raises(TypeError, match=r"must not be in DataParallel.*take DistributedDataParallel"):
        objective(nn.DataParallel(flow()), X, Y)
    with pytest.raises(TypeError, match=r"sharded by its forward pass.*fully_shard\(Recording\(network"):
        objective(fully_shard(flow()), X, Y)
    with pytest.raises(ValueError, match=r"must have the measures of the objective, got none named \['action'\]"):
        objective(Recording(flow(), {}), X, Y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.compile(), r"compiled in place.*take torch.compile\(Recording\(network, objective.measures\)\)"),
        (lambda n: n.register_forward_hook(print), r"has forward hooks.*take Recording\(network, objective.measures\)"),
        (lambda n: n.register_forward_pre_hook(print), "has forward hooks"),
    ],
)
def test_what_a_record_leaves_out_is_named(change, message):
    network, objective = flow(), LeastAction()
    change(network)
    with pytest.warns(UserWarning, match=message):
        objective(network, X, Y)
    objective(Recording(network, objective.measures), X, Y)
