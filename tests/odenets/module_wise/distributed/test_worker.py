"""One process as a group of its own: all modules in it, without a neighbor."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

from odenets.module_wise import fit_in_processes, fit_modules
from odenets.module_wise.distributed.worker import check_shared
from odenets.training import Run
from tests.odenets.checks import assert_same
from tests.odenets.module_wise.conditioned import C, X, Y, loader, modules, pair
from tests.odenets.module_wise.distributed.train_conditioned import OPTIONS


@pytest.fixture(autouse=True)
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


PLATEAU = {"lr_scheduler": partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)}


@pytest.mark.parametrize("schedule", [{}, PLATEAU | {"lr_interval": "epoch"}], ids=["one cycle", "plateau"])
def test_a_process_alone_trains_as_fit_modules_also_resumed(tmp_path, schedule):
    options = OPTIONS | schedule
    expected = modules()
    rows = fit_modules(expected, loader(), epochs=4, **options).rows
    run = Run(tmp_path / "run", {})
    fit_in_processes(modules(), loader(), epochs=2, run=run, **options)
    split = modules()
    resumed = fit_in_processes(split, loader(), epochs=4, run=run, **options)
    assert_same(split, expected)
    for name in ("train_loss", "train_l1_loss", "learning_rate"):
        assert [row[name] for row in resumed] == [row[name] for row in rows]


def test_an_optimizer_of_another_class_and_a_scheduler_on_one_side_are_named(tmp_path):
    run = Run(tmp_path / "run", {})
    fit_in_processes(modules(), loader(), epochs=1, run=run, **OPTIONS)
    adam = OPTIONS | {"optimizer": torch.optim.Adam, "lr_scheduler": None, "lr_interval": "epoch"}
    with pytest.raises(ValueError, match="lr_scheduler must be that of the checkpoint, which has one, and this"):
        fit_in_processes(modules(), loader(), epochs=2, run=run, **adam)
    with pytest.raises(ValueError, match="optimizer must be that of the checkpoint, SGD, got Adam"):
        fit_in_processes(modules(), loader(), epochs=2, run=run, **OPTIONS | {"optimizer": torch.optim.Adam})


class Claiming(IterableDataset):
    """Says that it has more samples than it has, or fewer."""

    def __init__(self, claimed):
        self.claimed = claimed

    def __len__(self):
        return self.claimed

    def __iter__(self):
        yield from zip(X, C, Y, strict=True)


def one_sample_left():
    return [(X[i : i + 7], C[i : i + 7], Y[i : i + 7]) for i in range(0, 22, 7)]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(
    ("batches", "match"),
    [
        (DataLoader(Claiming(40), 8), "batches must be as many as their length says, 5, got 3"),
        (DataLoader(Claiming(16), 8), "batches must be as many as their length says, 2, got 3"),
        (one_sample_left(), r"at least 2 samples each, two per replica, got 1: DataLoader\(..., drop_last=True\)"),
        ([(X, C, {"y": Y})], "batches must hold one tensor of targets.* got dict: fit_modules takes any"),
    ],
)
def test_batches_that_cannot_be_shared_out_are_named(batches, match):
    with pytest.raises((ValueError, TypeError), match=match):
        fit_in_processes(modules(), batches, epochs=1, **OPTIONS)


@pytest.mark.parametrize("more", [0, 1])
def test_replicas_have_one_batch(monkeypatch, more):
    """Another replica sends the same sums, or others."""

    def gather(sums, own, group):
        for i, one in enumerate(sums):
            one.copy_(own + i * more)

    monkeypatch.setattr(distributed, "all_gather", gather)
    named = pytest.raises(ValueError, match=r"batches must be the same in every replica.*seed their sampler")
    with named if more else nullcontext():
        check_shared(pair((X, C, Y)), "batches", 2, None, torch.device("cpu"))


def test_the_former_name_of_schedulers_is_told():
    with pytest.raises(TypeError, match="'rate': that is lr_scheduler"):
        fit_in_processes(modules(), loader(), epochs=1, **OPTIONS, rate=None)
