"""Modules train on any iterable of batches, with any targets, metric and learning-rate scheduler."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from odenets import models
from odenets.module_wise import fit_modules, greedy, split_into_modules, trgl
from odenets.training import Batches, Run, Task
from tests.odenets.checks import assert_same
from tests.odenets.module_wise.conditioned import C, X, Y, loader, modules, pair
from tests.odenets.module_wise.test_fit import DIGITS, FEW, modules_of

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ORDERS = ["parallel", "sequential", "end-to-end", "checkpointed"]
REGRESSION = {"objective": lambda k, K: Task(F.mse_loss), "optimizer": SGD, "collate": pair}


@pytest.mark.parametrize("order", ORDERS)
def test_a_list_of_batches_trains_as_batches_in_memory(order):
    in_memory = Batches(DIGITS, 50)
    rows = []
    for data in (in_memory, [*in_memory.in_order()], DataLoader(TensorDataset(DIGITS.x, DIGITS.y), 50)):
        network = modules_of(2)
        training = fit_modules(network, data, epochs=2, optimizer=SGD, order=order, objective=trgl(1.0),
                               validation=data)  # fmt: skip
        rows.append([row | {"seconds": 0} for row in training.rows])
        if data is in_memory:
            first = network
        assert_same(first, network)
    assert rows[0] == rows[1] == rows[2]


class Stream(IterableDataset):
    """Samples of unknown number."""

    def __iter__(self):
        yield from zip(X, C, Y, strict=True)


@pytest.mark.parametrize("order", ORDERS)
def test_figures_of_an_epoch_are_means_over_the_samples_that_it_had(order):
    """Of a stream whose last batch is smaller, without learning: those of all samples at once."""
    split = modules()
    training = fit_modules(split, DataLoader(Stream(), 8), epochs=1, order=order, metric=F.l1_loss,
                           **REGRESSION | {"optimizer": partial(torch.optim.SGD, lr=0.0)})  # fmt: skip
    outputs = [*split.outputs(X, C)]
    for row in training.rows:
        output = outputs[row["module"] - 1]
        assert row["train_loss"] == pytest.approx(F.mse_loss(output, Y).item(), rel=1e-9)
        assert row["train_l1_loss"] == pytest.approx(F.l1_loss(output, Y).item(), rel=1e-9)


def test_a_regression_validates_each_module():
    split = modules()
    training = fit_modules(split, loader(), epochs=1, validation=loader(5), metric=F.l1_loss, **REGRESSION)
    outputs = [output.detach() for output in split.outputs(X, C)]
    for row, output in zip(training.rows, outputs, strict=True):
        assert row["validation_loss"] == pytest.approx(F.mse_loss(output, Y).item(), rel=1e-9)
        assert row["validation_l1_loss"] == pytest.approx(F.l1_loss(output, Y).item(), rel=1e-9)
    errors = split.evaluate(loader(5), metric=F.l1_loss, collate=pair)
    assert errors == pytest.approx([F.l1_loss(output, Y).item() for output in outputs], rel=1e-9)


def test_a_task_has_no_metric_unless_there_is_one():
    rows = fit_modules(modules(), loader(), epochs=1, validation=loader(), **REGRESSION).rows
    assert not [name for name in rows[0] if "accuracy" in name or "metric" in name]


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("kind", ["generator", "distributed", "global"])
def test_a_killed_run_on_a_loader_ends_with_the_same_weights(tmp_path, order, kind):
    """Each epoch's order is drawn anew: by a generator, by the epoch, or by torch's own random state."""

    def data():
        if kind == "generator":
            return loader()
        dataset = TensorDataset(X, C, Y)
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, seed=3) if kind == "distributed" else None
        return DataLoader(dataset, 8, shuffle=sampler is None, sampler=sampler)

    def train(batches, **options):
        torch.manual_seed(5)
        return fit_modules(modules(), batches, epochs=3, order=order, validation=loader(), **REGRESSION, **options)

    whole, left, run = train(data()), [1, 1], Run(tmp_path / "run", {})
    with pytest.raises(IndexError):  # when a third epoch is reported
        train(data(), run=run, report=lambda n: left.pop())
    resumed = train(data(), run=run)
    assert resumed.done == whole.done > 2
    assert_same(resumed.network, whole.network)


SCHEDULERS = {
    "one cycle": ("step", partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=12)),
    "cyclic": ("step", partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2)),
    "restarts": ("step", partial(schedulers.CosineAnnealingWarmRestarts, T_0=5)),
    "milestones": ("epoch", partial(schedulers.MultiStepLR, milestones=[2], gamma=0.1)),
    "by hand": ("epoch", partial(schedulers.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)),
    "plateau": ("epoch", partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.5)),
}


@pytest.mark.parametrize("order", ["parallel", "sequential"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_go_on_where_they_stood(tmp_path, name, order):
    interval, make = SCHEDULERS[name]
    options = {"epochs": 4, "order": order, "lr_scheduler": make, "lr_interval": interval} | REGRESSION
    run, left = Run(tmp_path / "run", {}), [1, 1]
    whole = fit_modules(modules(), loader(), **options)
    with pytest.raises(IndexError):
        fit_modules(modules(), loader(), run=run, report=lambda n: left.pop(), **options)
    resumed = fit_modules(modules(), loader(), run=run, **options)
    rates = [row["learning_rate"] for row in whole.rows]
    assert [row["learning_rate"] for row in resumed.rows] == rates
    assert len({*rates}) > 1
    assert_same(resumed.network, whole.network)


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("order", ["parallel", "sequential", "end-to-end"])
def test_a_plateau_is_one_of_the_modules_own_loss(order, validated):
    """Torch's scheduler, fed the losses of the rows of a module, has its rates."""
    plateau = partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.3)
    options = {"validation": loader()} if validated else {}
    rows = fit_modules(modules(), loader(), epochs=5, order=order, lr_scheduler=plateau, **options, **REGRESSION).rows
    for module in {row["module"] for row in rows}:
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))])
        scheduler = plateau(optimizer)
        of_one = [row for row in rows if row["module"] == module]
        assert len(of_one) == 5
        for row in of_one:
            assert row["learning_rate"] == optimizer.param_groups[0]["lr"]
            scheduler.step(row["validation_loss" if validated else "train_loss"])


class Drawn(Batches):
    """Batches with an epoch of their own: brighter with each."""

    def epoch(self, epoch):
        for x, y in super().epoch(epoch):
            yield x * (1 + epoch), y


def test_an_epoch_of_ones_own_is_trained_on_with_a_cache_too(tmp_path):
    data = Drawn(FEW.data, 20, seed=0)
    expected = [*data.epoch(1)]
    networks = []
    for cache in (None, "memory", str(tmp_path / "states"), tmp_path / "path"):
        network = modules_of(2).double()
        fit_modules(network, data, epochs=2, optimizer=SGD, order="sequential", cache=cache, views=2 if cache else 1)
        networks.append(network)
    for network in networks[1:]:
        assert_same(networks[0], network, atol=1e-12)
    assert (tmp_path / "states").is_dir()
    plain = modules_of(2).double()
    fit_modules(plain, Batches(FEW.data, 20, seed=0), epochs=2, optimizer=SGD, order="sequential", cache="memory")
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), networks[0].parameters(), strict=True))
    assert not torch.equal(expected[0][0], next(Batches(FEW.data, 20, seed=0).epoch(1))[0])


def test_a_folder_is_made_where_its_name_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, order="sequential", cache="folder")
    assert Path("folder").is_dir()


class More(Batches):
    """Batches whose epochs hold every sample twice."""

    def epoch(self, epoch):
        yield from super().epoch(epoch)
        yield from super().epoch(epoch)


def test_samples_without_a_place_in_the_cache_are_refused():
    with pytest.raises(ValueError, match=r"More\.epoch must draw each of 40 samples once for a cache, got 80"):
        fit_modules(modules_of(2), More(FEW.data, 20), epochs=1, optimizer=SGD, order="sequential", cache="memory")


def dictionaries():
    return [{"image": FEW.data.x, "label": FEW.data.y}]


def one_sample_left():
    return DataLoader(TensorDataset(DIGITS.x[:41], DIGITS.y[:41]), 40)


PARAMETERS = [torch.nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"network": models.resnet9(1, 10, features=8, size=8, depth=2)}, TypeError, r"split_into_modules\(network, K"),
        ({"network": torch.nn.Linear(2, 2)}, TypeError, r"got Linear: pass .*split_into_modules\(odenets.adapt\("),
        ({"batches": dictionaries()}, TypeError, r"must be a pair .*: give collate="),
        ({"batches": []}, ValueError, "batches must hold at least one batch"),
        ({"batches": DIGITS}, TypeError, r"pass odenets.training.Batches\(data, size\)"),
        ({"batches": one_sample_left()}, ValueError, r"at least 2 samples for batch norm.*drop_last=True"),
        ({"batches": iter([*FEW.in_order()]), "epochs": 2}, ValueError, "iterator .*which gives one epoch"),
        ({"optimizer": SGD(PARAMETERS)}, TypeError, r"optimizer .*partial\(torch.optim.SGD, lr=0.1\)"),
        ({"optimizer": lambda net: SGD(net.parameters())}, TypeError, "optimizer must take the list of"),
        ({"network": FEW, "batches": modules_of(2)}, TypeError, r"first, fit_modules\(network, batches, ...\), got"),
        ({"loss_fn": None}, TypeError, r"fit_modules\(\) takes no 'loss_fn': that is objective, as trgl\(1.0, task="),
        ({"max_epochs": 1}, TypeError, "takes no 'max_epochs': that is epochs"),
        ({"callbacks": ()}, TypeError, "takes no 'callbacks': that is report, which is called after each epoch"),
        ({"precision": "64"}, TypeError, r"takes no 'precision': that is network.to\(dtype\)"),
        ({"objective": trgl}, TypeError, r"one for each module, got trgl itself: call it, trgl\(tau=1.0\)"),
        ({"objective": greedy}, TypeError, r"got greedy itself: call it, greedy\(\)"),
        ({"lr_scheduler": schedulers.StepLR}, TypeError, r"StepLR takes step_size too: pass partial\(StepLR"),
        ({"schedule": "sequential"}, TypeError, "'schedule': that is order"),
        ({"rate": partial(schedulers.StepLR, step_size=1)}, TypeError, "'rate': that is lr_scheduler"),
        ({"lr_scheduler": schedulers.StepLR(SGD(PARAMETERS), 1)}, TypeError, "lr_scheduler must be a function"),
        ({"lr_interval": "batch"}, ValueError, "lr_interval must be 'epoch' or 'step', got 'batch'"),
        ({"objective": torch.nn.CrossEntropyLoss()}, TypeError, r"lambda k, K: Task\(CrossEntropyLoss\(\)\)"),
        ({"objective": trgl(1.0)(0, 2)}, TypeError, r"lambda k, K: ActionPenalty\(...\), got a ActionPenalty"),
        ({"objective": Task}, TypeError, r"lambda k, K: Task\(...\), got the class Task"),
        ({"order": "random"}, ValueError, "order must be 'parallel', .* got 'random'"),
        ({"laps": 2}, ValueError, "laps must be at least 1, and 1 where the order is not sequential, got 2"),
        ({"cache": "memory"}, ValueError, "cache is for the sequential order"),
        ({"cache": True, "order": "sequential"}, TypeError, 'cache must be "memory" or a folder, got True'),
        ({"cache": "memory", "order": "sequential", "batches": [*FEW.in_order()]}, ValueError,
         r"got list: pass Batches\(\(x, y\), size\)"),
        ({"cache": "memory", "order": "sequential", "collate": tuple}, ValueError, "cache is for Batches as they are"),
        ({"progress": True}, TypeError, 'progress must be the label of a bar, .*progress="label", got True'),
        ({"metric": lambda output, y: "much"}, TypeError, "metric must return a number"),
        ({"metric": lambda output, y: output}, ValueError, r"metric must return a number.* returns \(20, 10\)"),
        ({"batches": [(FEW.data.x, FEW.data.y + 3)]}, ValueError, "10 logits, and the labels of the batch go up"),
        ({"batches": [(FEW.data.x, FEW.data.y - 1)]}, ValueError, r"labels of the batch must lie in \[0, 10\)"),
        ({"batches": [(FEW.data.x, FEW.data.y.float())]}, ValueError, "labels must be classes"),
        ({"epochs": 1.5}, TypeError, "epochs and laps must be whole numbers, got epochs=1.5"),
        ({"epochs": "3"}, TypeError, "epochs and laps must be whole numbers, got epochs='3'"),
        ({"epochs": True}, TypeError, "epochs and laps must be whole numbers, got epochs=True"),
        ({"optimizer": torch.optim.LBFGS}, TypeError, "optimizer must take steps without a closure, got LBFGS"),
        ({"lr_scheduler": partial(schedulers.ReduceLROnPlateau, mode="max")}, ValueError, "mode .* must be 'min'"),
        ({"validation": [1]}, TypeError, "batch 1 of validation must be a pair"),
        ({"collate": 3}, TypeError, "collate must be a function"),
    ],
)  # fmt: skip
def test_mistakes_at_the_door_name_the_argument_and_the_remedy(change, error, match):
    arguments = {"network": modules_of(2), "batches": FEW, "epochs": 1, "optimizer": SGD, "objective": greedy()}
    with pytest.raises(error, match=match):
        fit_modules(**arguments | change)


def test_a_bar_shows_what_there_is(capsys):
    fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, progress="digits")
    assert "module=2, train_loss=" in (without := capsys.readouterr().err)
    assert "validation" not in without
    fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, progress="digits", validation=FEW)
    assert "validation_accuracy=" in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    run = Run(tmp_path / "run", {})
    run.save_state({"schedule": "parallel", "plan": [1, 1]})
    with pytest.raises(ValueError, match="checkpoint is of another version of odenets"):
        fit_modules(modules_of(2), FEW, epochs=1, optimizer=SGD, run=run)


def test_a_batch_of_another_shape_is_told():
    other = (torch.rand(4, 3, 8, 8), FEW.data.y[:4])
    with pytest.raises(RuntimeError) as caught:
        fit_modules(modules_of(2), [(FEW.data.x, FEW.data.y), other], epochs=1, optimizer=SGD)
    first = "those of the first [(1, 8, 8)]"
    assert caught.value.__notes__ == [f"in batch 2 of batches, of 4 samples [(3, 8, 8)], and {first}"]


def test_the_former_name_of_outputs_is_told():
    with pytest.raises(TypeError, match="'classes': that is outputs"):
        split_into_modules(models.resnet9(1, 10, features=8, size=8, depth=2), 2, DIGITS.x[:4], classes=10)


@pytest.mark.slow
def test_a_loader_with_workers_trains_as_one_without():
    networks = []
    for workers in (0, 2):
        networks.append(modules())
        fit_modules(networks[-1], loader(num_workers=workers), epochs=2, **REGRESSION)
    assert_same(*networks)
