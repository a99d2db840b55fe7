"""Modules in processes of their own, launched by torchrun."""

import json
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import distributed

from odenets import load_weights, models
from odenets.errors import WorkerLostError
from odenets.module_wise import conv_head, fit_in_processes, fit_modules, split_into_modules
from odenets.module_wise.distributed.buffers import Buffer, Message, Receiver, Sender, check_sendable
from odenets.module_wise.distributed.processes import check_apart
from odenets.training import datasets
from tests.odenets.checks import assert_same
from tests.odenets.module_wise.conditioned import loader, modules
from tests.odenets.module_wise.distributed import train_conditioned, train_modules

ROOT = Path(train_modules.__file__).parents[4]


def launch(folder, processes=2, trouble=None, dtype="float32", fails=False, **options):
    arguments = [str(folder), json.dumps(trouble or {}), json.dumps(options), dtype]
    return launch_script(train_modules, arguments, processes, fails)


def launch_script(script, arguments, processes=2, fails=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", script.__name__, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT, check=False)
    assert bool(result.returncode) == fails, result.stderr
    return result.stderr


def alone(dtype="float32"):
    """The same training in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = train_modules.network(dtype)
    training = fit_modules(network, train_modules.BATCHES, epochs=train_modules.EPOCHS,
                           optimizer=train_modules.Troubled, objective=train_modules.OBJECTIVE)  # fmt: skip
    torch.set_num_threads(threads)
    return network, training


def losses(rows):
    return {(row["module"], row["epoch"]): row["train_loss"] for row in rows}


def read(folder, rank=0, dtype="float32"):
    network = load_weights(train_modules.network(dtype), folder / f"weights{rank}.safetensors")
    return network, json.loads((folder / f"rows{rank}.json").read_text())


@pytest.mark.slow
def test_two_processes_find_what_one_does_and_a_killed_one_ends_the_group(tmp_path):
    expected, training = alone()
    said = launch(tmp_path, trouble={"1": {"kill": 15}}, fails=True)
    assert "the process of modules 1 to 2 (rank 0) was told to end after" in said or (
        "the process of modules 3 to 4 (rank 1) is gone" in said
    )
    saved = {path.name for path in tmp_path.glob("module*.pt")}
    assert {f"module{k}-epoch2.pt" for k in (1, 2, 3, 4)} <= saved
    assert not {f"module{k}-epoch4.pt" for k in (3, 4)} & saved
    launch(tmp_path)
    for rank in (0, 1):
        network, rows = read(tmp_path, rank)
        assert losses(rows) == losses(training.rows)
        assert_same(network, expected)


@pytest.mark.slow
def test_with_a_larger_buffer_nobody_waits_for_a_slow_process(tmp_path):
    """The slow one stands still from its second batch on until the other has taken its last step."""
    for slow, fast in (("0", "1"), ("1", "0")):
        folder, last = tmp_path / slow, str(tmp_path / f"last step of {fast}")
        launch(folder, trouble={slow: {"wait": last}, fast: {"last": last}}, buffer=3)
        assert all(row["train_loss"] > 0 for row in read(folder)[1])


@pytest.mark.slow
def test_replicas_share_batches(tmp_path):
    launch(tmp_path, processes=4, replicas=2)
    training = alone()[1]
    network, rows = read(tmp_path)
    first = {key: value for key, value in losses(rows).items() if key[1] == 1}
    for (module, _), loss in first.items():  # a replica's own share of the loss
        assert loss == pytest.approx(losses(training.rows)[module, 1], rel=0.3)
    for rank in (1, 2, 3):
        assert_same(network, read(tmp_path, rank)[0])


def test_modules_of_different_processes_share_nothing():
    train, _ = datasets.load("digits")
    network = models.resnet9(1, 10, features=8, size=8, depth=2)
    modules = split_into_modules(
        network, 2, train.x[:2], head=conv_head(torch.rand(2, 8, 4, 4), 10), last_head="auxiliary"
    )
    check_apart(modules, [range(2)])
    with pytest.raises(ValueError, match=r"must not share parameters, but module 2 shares its head"):
        check_apart(modules, [range(1), range(1, 2)])


def message(i):
    return Message(torch.full((1, 1), float(i)), torch.empty(0), torch.tensor([i]), 1)


def test_a_buffer_of_one_gives_each_batch_once_and_in_order():
    buffer, taken = Buffer(1, 10.0, "the other"), []
    thread = threading.Thread(target=lambda: [buffer.put(message(i)) for i in range(20)])
    thread.start()
    taken = [int(buffer.take().y) for _ in range(20)]
    thread.join()
    assert taken == list(range(20))


def test_a_larger_buffer_gives_the_newest_that_was_taken_least():
    buffer = Buffer(3, 10.0, "the other")
    for i in range(5):
        buffer.put(message(i))
    assert [int(buffer.take().y) for _ in range(4)] == [4, 3, 2, 4]
    buffer.put(message(5))
    assert int(buffer.take().y) == 5


def test_who_is_gone_or_silent_is_named():
    buffer = Buffer(2, 0.05, "the process of module 1 (rank 0)")
    with pytest.raises(WorkerLostError, match=r"module 1 \(rank 0\) sent nothing for 0.05 s"):
        buffer.take()
    buffer.fail(RuntimeError("closed"))
    with pytest.raises(WorkerLostError, match=r"module 1 \(rank 0\) is gone \(closed\)"):
        buffer.take()
    held = Buffer(2, 0.05, "the process of module 1 (rank 0)")
    held.put(message(1))
    assert int(held.take().y) == 1
    held.fail(RuntimeError("closed"))
    with pytest.raises(WorkerLostError, match="is gone"):
        held.take()  # it would be trained on for ever


def test_without_a_group():
    with pytest.raises(RuntimeError, match="no process group: launch with torchrun"):
        fit_in_processes(train_modules.network(), train_modules.BATCHES, epochs=1, optimizer=torch.optim.Adam)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions_with_images_in_two_processes(tmp_path, dtype):
    expected, training = alone(dtype)
    launch(tmp_path, dtype=dtype)
    network, rows = read(tmp_path, 1, dtype)
    assert losses(rows) == losses(training.rows)
    assert_same(network, expected)


@pytest.mark.parametrize("images", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_is_sent_is_received_in_every_precision(monkeypatch, dtype, images):
    line = deque()
    monkeypatch.setattr(distributed, "send", lambda tensor, peer, group: line.append(tensor.clone()))

    def receive(tensor, peer, group):
        came = line.popleft()
        assert (came.shape, came.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(came)

    monkeypatch.setattr(distributed, "recv", receive)
    state, y = torch.randn(3, 4, 5).to(dtype), torch.tensor([1, 2, 3])
    pictures = torch.empty(0) if images is None else torch.rand(3, 1, 8, 8).to(images)
    sender, receiver = (kind(0, None, torch.device("cpu")) for kind in (Sender, Receiver))
    sender.transmit(Message(state, pictures, y, 7))
    came = receiver.receive()
    assert came.whole == 7
    for one, other in ((came.state, state), (came.images, pictures), (came.y, y)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    sender.transmit(None)
    assert receiver.receive() is None
    assert not line


@pytest.mark.slow
def test_conditioned_regressions_on_a_loader_go_on_as_in_one_process(tmp_path):
    """Learning rates by step, and a run that ends after two epochs and is taken up for two more."""
    split = modules()
    training = fit_modules(split, loader(), epochs=4, **train_conditioned.OPTIONS)
    for epochs in ("2", "4"):
        launch_script(train_conditioned, [str(tmp_path), epochs])
    rows = json.loads((tmp_path / "rows1.json").read_text())
    for name in ("train_loss", "train_l1_loss", "learning_rate"):
        expected = {(row["module"], row["epoch"]): row[name] for row in training.rows}
        assert {(row["module"], row["epoch"]): row[name] for row in rows} == pytest.approx(expected, rel=1e-9)
    assert_same(load_weights(modules(), tmp_path / "weights0.safetensors"), split, atol=1e-12)


def test_batches_of_unknown_number_name_what_has_one():
    with pytest.raises(ValueError, match=r"batches must know how many there are.* got generator without a length"):
        fit_in_processes(modules(), (pair for pair in []), epochs=1, optimizer=torch.optim.Adam)


@pytest.mark.parametrize(
    ("value", "match"),
    [({"a": 1}, "got dict"), (torch.zeros(2, dtype=torch.complex64), "got torch.complex64")],
)
def test_what_cannot_be_sent_is_named(value, match):
    with pytest.raises(TypeError, match=f"batches must hold one tensor of targets.* {match}"):
        check_sendable([torch.zeros(2), value])
    with pytest.raises(TypeError, match="fewer than 8 tensors to be sent, got 9"):
        check_sendable([torch.zeros(2)] * 9)


@pytest.mark.parametrize("y", [torch.rand(3, 2), torch.tensor([True, False, True]), torch.arange(3, dtype=torch.int32)])
def test_targets_and_what_conditions_come_as_they_are_sent(monkeypatch, y):
    line = deque()
    monkeypatch.setattr(distributed, "send", lambda tensor, peer, group: line.append(tensor.clone()))
    monkeypatch.setattr(distributed, "recv", lambda tensor, peer, group: tensor.copy_(line.popleft()))
    sender, receiver = (kind(0, None, torch.device("cpu")) for kind in (Sender, Receiver))
    message = Message(torch.rand(3, 4), torch.empty(0), y, 3, (torch.rand(3, 5), torch.arange(3)))
    sender.transmit(message)
    came = receiver.receive()
    assert came.whole == 3
    for one, other in zip(came.tensors, message.tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
