import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from odenets import Network, load_weights, models
from odenets.least_action import ActionPenalty
from odenets.training import data
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy
from tests.odenets.checks import assert_same
from tests.odenets.training import train_in_processes, train_on_loaders
from tests.odenets.training.small import TENS, in_double, network, sgd, tiny, trained


@pytest.mark.parametrize("accumulate", [2, 5, 1000])
def test_batches_in_parts_give_the_same_weights(parts, accumulate):
    parts = in_double(parts)
    whole, in_parts = trained(parts), trained(parts, accumulate=accumulate)
    assert_same(whole.network, in_parts.network, 1e-6, 1e-6)
    assert in_parts.rows[-1]["train_loss"] == pytest.approx(whole.rows[-1]["train_loss"], rel=1e-6)
    assert in_parts.evaluations == whole.evaluations


def test_gradients_are_clipped_to_the_norm(parts):
    batches = data.Batches(parts.train, len(parts.train))
    start = torch.nn.utils.parameters_to_vector(network(parts, depth=2, solver="euler", h=1.0).parameters())
    clipped = trained(parts, 1, batches=batches, clip_norm=0.01)
    moved = torch.nn.utils.parameters_to_vector(clipped.network.parameters()) - start
    assert moved.norm().item() == pytest.approx(0.02 * 0.01, rel=1e-2)
    one, two = trained(in_double(parts), 1), trained(in_double(parts), 1, clip_norm=1e9)
    assert_same(one.network, two.network, 1e-6, 1e-6)


@pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor")]
)
def test_compiled_training_is_what_eager_is(parts, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    parts = in_double(parts)
    compiled = trained(parts, 1, compile=True)
    assert_same(trained(parts, 1).network, compiled.network, 1e-6, 1e-6)
    assert "record" not in vars(compiled.network)


def test_a_record_of_ones_own_is_compiled_once(monkeypatch):
    compiled, sizes = [], []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    net = tiny()
    own = net.record = lambda x, **measures: sizes.append(len(x)) or Network.record(net, x, **measures)
    fit(net, TENS, epochs=2, optimizer=sgd, compile=True)
    assert compiled == [own]
    assert sizes == [10] * 4
    assert vars(net)["record"] is own


def launch(script, folder, *options):
    """Run the script in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script.__file__, folder]
    done = subprocess.run([*run, *options], capture_output=True, timeout=1200, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes have written what came out."""
    folder = tmp_path_factory.mktemp("two")
    launch(train_in_processes, folder)
    return folder


@pytest.mark.slow
def test_two_processes_find_what_one_does(two_processes, tmp_path):
    """Shares of a batch and the last batch of an epoch are of several sizes."""
    train_in_processes.main(tmp_path, Fabric(accelerator="cpu", devices=1))
    networks = []
    for folder in (two_processes, tmp_path):
        net = models.small_network(features=8, solver="euler", h=1.0, depth=2).double()
        networks.append(load_weights(net, folder / "weights.safetensors"))
    assert_same(*networks, 1e-6, 1e-7)
    texts = [(folder / "figures.txt").read_text() for folder in (two_processes, tmp_path)]
    two, one = ([float(v) for v in text.split()] for text in texts)
    assert two[:3] == pytest.approx(one[:3], rel=1e-3)
    assert two[3] == one[3]


@pytest.mark.slow
def test_two_processes_edit_alike_and_go_on_from_one_checkpoint(two_processes):
    """With batch norms, whose statistics each process takes of its own shares."""
    one, two = [json.loads((two_processes / f"adaptive_{rank}.json").read_text()) for rank in range(2)]
    assert one == two
    assert [depth for depth, _ in one] == [2, 4, 8, 8]
    files = [two_processes / f"adaptive_{rank}.safetensors" for rank in range(2)]
    assert_same(*(load_weights(train_in_processes.two_flows(4), file) for file in files))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the batches of all."""
    folder = tmp_path_factory.mktemp("alone")
    train_on_loaders.main(folder, Fabric(accelerator="cpu", devices=1))
    return folder


@pytest.fixture(scope="module", params=["ddp", "sharded"])
def loaders(request, tmp_path_factory):
    """The folder in which two processes with DataLoaders have written what came out."""
    folder = tmp_path_factory.mktemp("loaders")
    launch(train_on_loaders, folder, request.param)
    return folder


def written(folder, name, rank=0):
    rows, multiplier = json.loads((folder / f"{name}_{rank}.json").read_text())
    return torch.load(folder / f"{name}_{rank}.pt"), rows, multiplier


def same_to_rounding(one, two):
    torch.testing.assert_close(one[0], two[0], rtol=1e-9, atol=1e-11)
    for rows in zip(one[1], two[1], strict=True):
        assert rows[0] == pytest.approx(rows[1], rel=1e-9)
    assert one[2] == pytest.approx(two[2], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", train_on_loaders.NETWORKS)
def test_processes_with_loaders_make_what_one_makes_of_their_batches(alone, loaders, name):
    """With clipping, parts of a batch, a lambda, validation, a plateau and best weights; by ddp, and sharded by each
    layer, each block, each flow, or as a whole."""
    for how in ("whole", *train_on_loaders.UNITS):
        for rank in range(2):
            same_to_rounding(written(loaders, f"{name}_{how}", rank), written(alone, f"{name}_{how}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", train_on_loaders.NETWORKS)
def test_processes_with_loaders_resume_to_the_last_bit(loaders, name):
    """Also where the sampler is Fabric's, which is to be told the epoch."""
    (one, rows, multiplier), two = written(loaders, f"{name}_whole"), written(loaders, f"{name}_resumed")
    assert all(torch.equal(one[key], two[0][key]) for key in one)
    assert (rows, multiplier) == two[1:]


@pytest.mark.slow
def test_batches_of_several_sizes_weigh_by_their_samples(alone, loaders):
    """And those of a list are shared; a process that has one more ends with the others."""
    if not (loaders / "uneven_0.pt").exists():
        pytest.skip("only by ddp")
    for name in ("uneven", "listed"):
        same_to_rounding(written(loaders, name), written(alone, name))
    warned = [(loaders / f"warnings_{rank}.txt").read_text() for rank in range(2)]
    assert "1 of 2 processes ran out of batches after 2, with which the epoch ends for all: give each" in warned[0]


@pytest.mark.slow
def test_what_cannot_be_distributed_or_sharded_says_so(loaders):
    errors = json.loads((loaders / "errors_1.json").read_text())
    assert "batches must be a DataLoader whose sampler Fabric can replace" in errors["batch sampler"]
    sharded = not (loaders / "uneven_0.pt").exists()
    assert ("ValueError: a sharded network keeps its depth" in errors.get("edits", "")) == sharded
    assert ("2 processes have the batches of 1 and whole parameters" in errors.get("default sizes", "")) == sharded


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda loss: loss.item(), TypeError, "Wrong returns float"),
        (lambda loss: loss.expand(2), ValueError, r"Wrong returns shape \(2,\)"),
        (lambda loss: loss.detach(), ValueError, "the loss of Wrong depends on no parameter"),
    ],
)
def test_losses_that_train_nothing_are_named(value, error, message):
    class Wrong(CrossEntropy):
        def loss(self, *args):
            return value(super().loss(*args))

    with pytest.raises(error, match=message):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, objective=Wrong())


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_objective_of_ones_own_may_look_again(wrapped):
    """Its pass counts for no running statistic and draws for nobody else, be it the objective or the task of one."""

    class Looking(CrossEntropy):
        needs_second_forward = True  # type: ignore[assignment]
        seen = 0

        def after_step(self, network, batch):
            network.record(batch[0])
            self.seen += 1

    nets = []
    for task in (CrossEntropy(), looking := Looking()):
        net = tiny(norm="batch")
        net.head = nn.Sequential(nn.Dropout2d(0.2), net.head)
        torch.manual_seed(0)
        fit(net, TENS, epochs=2, optimizer=sgd, objective=ActionPenalty(0.1, task) if wrapped else task)
        nets.append(net)
    assert looking.seen == 4
    assert_same(*nets)
