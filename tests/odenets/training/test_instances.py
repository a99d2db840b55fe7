from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from odenets import models
from odenets.fields import MLPField
from odenets.flow import Flow
from odenets.least_action import ActionPenalty, LeastAction
from odenets.network import Network
from odenets.training import data, datasets, stacking
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy, Task
from tests.counting import Operations
from tests.odenets.checks import assert_same

N = 4


def points(seed, size=50):
    part = datasets.subsample(datasets.load("circles", seed=seed)[0], size, seed=seed)
    return replace(part, x=part.x.double())  # whatever order sums are taken in


def easy():
    """One point alone."""
    one = points(0)
    return replace(one, x=one.x[:1].expand(50, 2), y=one.y[:1].expand(50))


def network(seed, norm=None, **flow):
    torch.manual_seed(seed)
    options = {"solver": "euler", "h": 1.0, "depth": 3} | flow
    field = lambda: MLPField(2, 3, activation="relu", norm=norm)  # noqa: E731
    return Network(torch.nn.Identity(), Flow(field, **options), torch.nn.Linear(2, 2)).double()


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01, betas=(0.9, 0.99))


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def together(objective, epochs=3, networks=None, optimizer=adam, size=50, **options):
    networks = networks or [network(i) for i in range(N)]
    batches = [data.Batches(points(i, size), 8, seed=i) for i in range(N)]
    return fit_instances(networks, batches, epochs=epochs, optimizer=optimizer, objective=objective, **options)


OBJECTIVES = {
    "cross-entropy": CrossEntropy,
    "penalty": lambda: ActionPenalty(0.1, cost="norm"),
    "before": lambda: LeastAction(lambda0=0.1, tau=0.1, every=2, cost="norm", weigh="multiply"),
    "after": lambda: LeastAction(lambda0=0.1, tau=0.1, every=2, update="after"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("norm", [None, "batch", "group"])
@pytest.mark.parametrize("solver", ["euler", "bs23"])
def test_together_is_what_each_alone_is(name, norm, solver):
    # a bias before a batch norm has no gradient but rounding, which Adam would make a step of
    optimizer = sgd if norm == "batch" else adam
    networks = [network(i, norm, solver=solver) for i in range(N)]
    result = together(OBJECTIVES[name], epochs=2, networks=networks, optimizer=optimizer, size=20)
    for i, both in enumerate(result.networks):
        alone, objective = network(i, norm, solver=solver), OBJECTIVES[name]()
        batches = data.Batches(points(i, 20), 8, seed=i)
        training = fit(alone, batches, epochs=2, optimizer=optimizer, objective=objective)
        assert_same(alone, both, 1e-6, 1e-7)
        assert_same(objective, result.objectives[i], 1e-6, 1e-7)
        losses = [row["train_loss"] for row in training.rows]
        torch.testing.assert_close(result.train_loss[i], torch.tensor(losses), rtol=1e-3, atol=1e-4)


def test_blocks_of_one_field_train_it_once():
    networks = [network(i, shared=True) for i in range(N)]
    together(CrossEntropy, epochs=2, networks=networks)
    for i, both in enumerate(networks):
        alone = network(i, shared=True)
        fit(alone, data.Batches(points(i), 8, seed=i), epochs=2, optimizer=adam)
        assert_same(alone, both, 1e-6, 1e-7)


def test_frozen_parameters_stay_and_the_others_learn():
    networks = [network(i) for i in range(N)]
    for net in networks:
        net.flows[0].requires_grad_(False)
    before = [[p.clone() for p in net.parameters()] for net in networks]
    easy = [points(i) for i in range(N)]
    together(CrossEntropy, networks=networks, measured={"train": easy}, perfect=["train"], patience=1)
    for net, old in zip(networks, before, strict=True):
        for p, q in zip(net.parameters(), old, strict=True):
            assert torch.equal(p, q) != p.requires_grad


def test_batch_norm_of_instances_knows_that_its_closing_stage_has_no_statistics():
    networks = [network(i, "batch", solver="bs23") for i in range(N)]
    whole = together(CrossEntropy, epochs=1, networks=networks, optimizer=sgd)
    for net in whole.networks:
        with pytest.raises(ValueError, match="no statistics of stage 4"):
            net.eval().ensemble(points(0).x)


def test_augmented_images_are_those_of_each_alone():
    train, _ = datasets.load("digits")
    train = replace(train, x=train.x.double())
    batches = [data.Batches(datasets.subsample(train, 40, seed=i), 16, seed=i, crop=1, flip=True) for i in range(2)]

    def images(seed):
        torch.manual_seed(seed)
        return models.resnet9(1, 10, features=4, size=8, depth=2).double()

    result = fit_instances([images(i) for i in range(2)], batches, epochs=2, optimizer=sgd, objective=CrossEntropy)
    for i, both in enumerate(result.networks):
        alone = images(i)
        fit(alone, batches[i], epochs=2, optimizer=sgd)
        assert_same(alone, both, 1e-6, 1e-7)


def test_accuracies_are_those_of_evaluate():
    sets = [points(100 + i, 80) for i in range(N)]
    result = together(CrossEntropy, measured={"test": sets}, epochs=2)
    for net, part, accuracy in zip(result.networks, sets, result.accuracy["test"], strict=True):
        assert evaluate(net, data.Batches(part, 100)).accuracy == pytest.approx(accuracy[-1].item())


def test_accuracies_are_measured_as_often_as_asked():
    sets = [points(100 + i, 80) for i in range(N)]
    each = together(CrossEntropy, measured={"test": sets}, epochs=5).accuracy["test"]
    some = together(CrossEntropy, measured={"test": sets}, epochs=5, every=2).accuracy["test"]
    assert some[:, 0].isnan().all()
    assert torch.equal(some[:, 1:], each[:, [1, 1, 3, 4]])


def test_patience_counts_measurements():
    """An easy task, right from the first measurement on, of which there is one every fourth epoch."""
    parts = [easy()] * N
    batches = [data.Batches(part, 8, seed=i) for i, part in enumerate(parts)]
    result = fit_instances(
        [network(i) for i in range(N)], batches, epochs=40, optimizer=adam, objective=CrossEntropy,
        measured={"train": parts}, every=4, perfect=["train"], patience=2,
    )  # fmt: skip
    first = (result.accuracy["train"] == 1).float().argmax(1)
    assert torch.equal(result.epochs, first + 1 + 4)


def test_an_instance_ends_when_it_has_been_right_long_enough():
    """The others go on as if nothing had happened, and it keeps its weights and figures."""
    parts = [points(0), easy(), points(2), points(3)]
    batches = [data.Batches(part, 8, seed=i) for i, part in enumerate(parts)]
    options = {"optimizer": adam, "objective": OBJECTIVES["before"], "measured": {"train": parts}}
    done = []
    ending = options | {"perfect": ["train"], "patience": 3, "report": done.append}
    result = fit_instances([network(i) for i in range(N)], batches, epochs=12, **ending)
    whole = fit_instances([network(i) for i in range(N)], batches, epochs=12, **options)
    last = int(result.epochs[1])
    assert last < 12
    assert (result.accuracy["train"][1, last - 3 : last] == 1).all()
    assert (result.accuracy["train"][1, last:] == 1).all()
    assert sum(done) == 12 * N
    assert result.objectives[1].steps == last * 7
    for i in (0, 2, 3):
        assert result.epochs[i] == 12 or (result.accuracy["train"][i, -1] == 1)
        if result.epochs[i] == 12:
            assert result.objectives[i].steps == 12 * 7
            assert_same(result.networks[i], whole.networks[i], 1e-6, 1e-7)


def test_operations_do_not_grow_with_the_instances():
    """One call per operation, however many instances: what makes it fast."""
    calls = []
    for n in (4, 16):
        networks = [network(i) for i in range(n)]
        batches = [data.Batches(points(i), 8, seed=i) for i in range(n)]
        counted = []
        for epochs in (1, 2):
            with Operations() as operations:
                fit_instances(networks, batches, epochs=epochs, optimizer=adam, objective=CrossEntropy)
            counted.append(operations.total)
        calls.append(counted[1] - counted[0])
    assert calls[1] < calls[0] + 12 * 8  # of an epoch: what grows is drawing the orders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches must hold one per network, 2, got 0"),
        ({"batches": [data.Batches(points(0, size), 8) for size in (50, 60)]}, "batches must be of one size"),
        ({"batches": [data.Batches(points(0), size) for size in (8, 9)]}, "batches must be of one size"),
        ({"measured": {"test": [1]}}, "test must hold one per network"),
        ({"perfect": ["train"]}, "perfect names"),
        ({"networks": []}, "at least one network"),
        ({"epochs": -1}, "epochs must not be negative, got -1"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "networks": [network(0), network(1)],
        "batches": [data.Batches(points(i), 8) for i in range(2)],
        "epochs": 1,
        "optimizer": adam,
        "objective": CrossEntropy,
    } | changes
    with pytest.raises(ValueError, match=message):
        fit_instances(**arguments)


def test_accuracies_one_by_one_are_those_together(monkeypatch):
    accuracies = []
    for together_up_to in (0, stacking.TOGETHER):
        monkeypatch.setattr(stacking, "TOGETHER", together_up_to)
        networks = [network(i, "batch") for i in range(N)]
        sets = {"train": [points(i) for i in range(N)]}
        accuracies.append(together(CrossEntropy, networks=networks, optimizer=sgd, measured=sets).accuracy["train"])
    assert torch.equal(*accuracies)


def loader_of(i):
    """The batches of instance i, drawn by a seeded generator."""
    part, generator = points(i), torch.Generator().manual_seed(i)
    return DataLoader(TensorDataset(part.x, part.y), 8, shuffle=True, generator=generator)


def test_loaders_train_each_instance_as_alone():
    result = fit_instances(
        [network(i) for i in range(2)],
        [loader_of(i) for i in range(2)],
        epochs=2,
        optimizer=adam,
        objective=CrossEntropy,
    )
    for i, both in enumerate(result.networks):
        alone = network(i)
        rows = fit(alone, loader_of(i), epochs=2, optimizer=adam).rows
        assert_same(alone, both, 1e-6, 1e-7)
        assert result.train_loss[i].tolist() == pytest.approx([row["train_loss"] for row in rows], rel=1e-5)


class Scaled(data.Batches):
    """Batches with an epoch of their own."""

    def epoch(self, epoch):
        for x, y in super().epoch(epoch):
            yield x * (2 + epoch), y


def test_an_epoch_of_ones_own_is_trained_on():
    batches = [Scaled(points(i), 8, seed=i) for i in range(2)]
    options = {"epochs": 2, "optimizer": adam}
    result = fit_instances([network(i) for i in range(2)], batches, objective=CrossEntropy, **options)
    for i, both in enumerate(result.networks):
        alone = network(i)
        fit(alone, batches[i], **options)
        assert_same(alone, both, 1e-6, 1e-7)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_learning_rates_fall_as_alone(interval):
    falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8)
    options = {"epochs": 2, "optimizer": sgd, "lr_scheduler": falling, "lr_interval": interval}
    batches = [data.Batches(points(i), 8, seed=i) for i in range(2)]
    result = fit_instances([network(i) for i in range(2)], batches, objective=CrossEntropy, **options)
    for i, both in enumerate(result.networks):
        alone = network(i)
        fit(alone, batches[i], **options)
        assert_same(alone, both, 1e-6, 1e-7)


def test_a_regression_reports_its_metric():
    x = torch.rand(2, 20, 2, dtype=torch.float64)
    y = x.sum(2, keepdim=True).expand(-1, -1, 2)
    batches = [[(x[i, :12], y[i, :12]), (x[i, 12:], y[i, 12:])] for i in range(2)]
    result = fit_instances(
        [network(i) for i in range(2)], batches, epochs=2, optimizer=adam, objective=lambda: Task(F.mse_loss),
        metric=F.l1_loss, measured={"train": [*zip(x, y, strict=True)]},
    )  # fmt: skip
    assert result.name == "l1_loss"
    for i, net in enumerate(result.networks):
        error = F.l1_loss(net(x[i]), y[i]).item()
        assert result.metric["train"][i, -1].item() == pytest.approx(error, rel=1e-5)
    with pytest.raises(AttributeError, match="instances have the metric 'l1_loss', not the accuracy"):
        _ = result.accuracy


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"batches": [loader_of(0), [*loader_of(1)][:-1]]},
            ValueError,
            "equally many for all instances",
        ),
        ({"batches": [loader_of(0), [(points(0).x[:7], points(0).y[:7])]]}, ValueError, "batches must be of one size"),
        ({"batches": loader_of(0)}, TypeError, "batches must be a sequence, data for each network, got DataLoader"),
        ({"batches": [loader_of(0), []]}, ValueError, r"batches\[1\] must hold at least one batch"),
        ({"batches": [[(points(0).x, ["a"] * 50)]] * 2}, TypeError, "batches must be tensors, to be stacked, got str"),
        ({"optimizer": adam([torch.nn.Parameter(torch.zeros(1))])}, TypeError, "optimizer must be made once"),
        ({"schedule": None}, TypeError, "'schedule': that is lr_scheduler"),
        ({"criterion": None}, TypeError, r"takes no 'criterion': that is objective, as lambda: Task\(F.mse_loss\)"),
        ({"num_epochs": 1}, TypeError, "takes no 'num_epochs': that is epochs"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, TypeError, "StepLR takes step_size too"),
        ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, ValueError, "lr_scheduler must not read losses"),
        ({"objective": CrossEntropy()}, TypeError, r"makes one for each instance.* lambda: CrossEntropy\(...\)"),
        ({"metric": F.l1_loss, "measured": {"a": [points(0)] * 2}, "perfect": ["a"]}, ValueError, "perfect is for the"),
    ],
)
def test_mistakes_name_the_argument_and_the_remedy(changes, error, match):
    arguments = {
        "networks": [network(0), network(1)],
        "batches": [loader_of(0), loader_of(1)],
        "epochs": 1,
        "optimizer": adam,
        "objective": CrossEntropy,
    } | changes
    with pytest.raises(error, match=match):
        fit_instances(**arguments)


def test_batches_in_memory_pass_the_collate():
    batches = data.Batches(points(0), 10, seed=0)
    turned = lambda batch: (-batch[0], batch[1])  # noqa: E731
    options = {"epochs": 2, "optimizer": partial(torch.optim.SGD, lr=0.1), "collate": turned}
    together, alone = network(0), network(0)
    fit_instances([together], [batches], objective=CrossEntropy, **options)
    fit(alone, batches, **options)
    assert_same(together, alone, 1e-10, 1e-10)


def test_a_lazy_instance_is_made_without_a_trace_in_its_statistics():
    options = {"epochs": 2, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    together, alone = network(0), network(0)
    for net in (together, alone):
        torch.manual_seed(0)
        net.encoder = torch.nn.Sequential(torch.nn.LazyLinear(2), torch.nn.BatchNorm1d(2)).double()
    batches = data.Batches(points(0), 10, seed=0)
    torch.manual_seed(1)
    fit_instances([together], [batches], objective=CrossEntropy, **options)
    torch.manual_seed(1)
    fit(alone, batches, **options)
    assert_same(together, alone, 1e-10, 1e-10)
