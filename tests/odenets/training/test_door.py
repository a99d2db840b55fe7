"""What is wrong in a call of fit is named, with the remedy."""

from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from odenets import Flow, Network
from odenets.least_action import LeastAction
from odenets.training import Callback, EarlyStopping, Run, Task, evaluate, fit
from tests.odenets.training.small import IMAGES, TENS, TWENTY, sgd, tiny

X, Y = TWENTY.x, TWENTY.y
DATASET = TensorDataset(X, Y)


def failing(output, y):
    raise KeyError("lost")


class Torchlike:
    """No metric and no callback."""


class OnlyRecord(nn.Linear):
    """No Recorder."""

    def __init__(self):
        super().__init__(2, 2)

    def record(self, x, **measures):
        raise NotImplementedError


class Lightninglike(nn.Module):
    """A network in what trains itself elsewhere."""

    def __init__(self):
        super().__init__()
        self.network = tiny()

    def training_step(self, batch, index):
        raise NotImplementedError


def callback(*names, base=Callback):
    return type("Mine", (base,), dict.fromkeys(names, lambda self, *args: None))()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"network": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))},
            TypeError,
            "got Sequential: odenets.adapt makes one of any residual network",
        ),
        (
            {"network": nn.Sequential(nn.Flatten(), Flow(), nn.Linear(64, 10))},
            TypeError,
            r"got Sequential with a Flow in it at '1': write it as odenets.Network\(encoder, flow, head\)",
        ),
        (
            {"network": OnlyRecord()},
            TypeError,
            "has record, steps, depth, h, evaluations, got OnlyRecord with record a",
        ),
        ({"network": nn.DataParallel(tiny())}, TypeError, "one in DataParallel: pass network.module, and fabric="),
        ({"network": Lightninglike()}, TypeError, "a LightningModule: pass self.network, or let"),
        ({"network": Flow}, TypeError, "network must be an instance, got the class Flow: call it"),
        (
            {"network": TENS, "batches": tiny()},
            TypeError,
            r"network must come first, fit\(network, batches, ...\), got Bat",
        ),
        ({"network": DataLoader(DATASET)}, TypeError, "network must come first, .* got DataLoader, which looks like"),
        ({"network": None}, TypeError, "network must be a torch.nn.Module, got NoneType"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(X)])},
            TypeError,
            r"optimizer .* instance of SGD: .*partial\(torch",
        ),
        (
            {"optimizer": lambda net: torch.optim.SGD(net.parameters())},
            TypeError,
            "takes the network and asks for its '",
        ),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a function of parameters, got str"),
        ({"optimizer": lambda parameters: None}, TypeError, "optimizer must return a torch.optim.Optimizer, got None"),
        ({"schedule": None}, TypeError, "takes no 'schedule': that is lr_scheduler"),
        ({"lr_scheduler": "cosine"}, TypeError, "lr_scheduler must be a function of the optimizer, got str"),
        ({"lr_scheduler": lambda optimizer: 0.1}, TypeError, "lr_scheduler must return a scheduler .* got float"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.StepLR},
            TypeError,
            r"lr_scheduler must be .* but StepLR takes step_size too: pass partial\(StepLR, step_size=...\)",
        ),
        ({"lr_interval": "batch"}, ValueError, "lr_interval must be 'epoch' or 'step', got 'batch'"),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau, "lr_interval": "step"},
            ValueError,
            "lr_interval must be 'epoch' for ReduceLROnPlateau",
        ),
        ({"objective": nn.CrossEntropyLoss()}, TypeError, r"got CrossEntropyLoss\(\): odenets.training.Task makes one"),
        ({"objective": Task}, TypeError, r"objective must be .* got the class Task: call it, Task\(...\)"),
        ({"objective": LeastAction}, TypeError, r"got the class LeastAction: call it, LeastAction\(...\)"),
        (
            {"objective": nn.MSELoss},
            TypeError,
            r"got the class MSELoss: call it, odenets.training.Task\(MSELoss\(...\)\)",
        ),
        ({"objective": F.mse_loss}, TypeError, r"Task makes one of .*, Task\(mse_loss\)"),
        ({"progress": True}, TypeError, 'progress must be the label of a bar, such as progress="label", got True'),
        ({"epochs": "3"}, TypeError, "epochs must be a whole number, got '3'"),
        ({"epochs": 2.0}, TypeError, "epochs must be a whole number, got 2.0"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none of list"),
        (
            {"batches": DataLoader(DATASET, 21, drop_last=True)},
            ValueError,
            "at least one batch, got none of DataLoader",
        ),
        ({"batches": DATASET}, TypeError, "got TensorDataset: pass torch.utils.data.DataLoader"),
        ({"batches": TWENTY}, TypeError, r"got TensorData: pass odenets.training.Batches\(data, size\)"),
        ({"batches": DataLoader(X, 5)}, TypeError, r"batch 1 of batches must be a pair .* one tensor \(5, 1, 8, 8\)"),
        ({"batches": [{"x": X, "y": Y}]}, TypeError, r"got dict with \['x', 'y'\]: give collate="),
        ({"batches": [(X, Y, Y)]}, TypeError, "got tuple of 3 parts: give collate="),
        ({"batches": [(X.numpy(), Y)]}, TypeError, r"inputs of batch 1 of batches must be tensors .* got ndarray"),
        ({"batches": [(X, Y + 1)]}, ValueError, "the network has 10 logits, and the labels of batches go up to 10"),
        ({"batches": [(X, Y - 1)]}, ValueError, r"the labels of batches must lie in \[0, 10\), or be -100, got -1"),
        ({"batches": [(X, Y[:5])]}, ValueError, "labels must be one class for each of 20 outputs"),
        (
            {"batches": (X, Y)},
            TypeError,
            r"the tensors \(20, 1, 8, 8\) and \(20,\): pass odenets.training.Batches\(\(x, y\)",
        ),
        ({"batches": [(X, nn.functional.one_hot(Y))]}, ValueError, r"got \(20, 10\): y.argmax\(1\)"),
        ({"batches": [(X, Y[:, None])]}, ValueError, r"got \(20, 1\): y.squeeze\(1\)"),
        ({"run": "runs/x"}, TypeError, r'got \'runs/x\': Run\("runs/x", config, resume=True\)'),
        ({"run": Run}, TypeError, "run must be an odenets.training.Run, got <class"),
        ({"fabric": "cpu"}, TypeError, r"fabric must be a lightning_fabric.Fabric, got 'cpu': Fabric\("),
        ({"validation": DATASET}, TypeError, "validation must be an iterable of batches, got TensorDataset"),
        ({"validation": [(X, Y, Y)]}, TypeError, "batch 1 of validation must be a pair"),
        ({"validation": iter([(X, Y)]), "epochs": 2}, ValueError, "validation is an iterator .* which gives one epoch"),
        ({"callbacks": EarlyStopping("train_loss")}, TypeError, r"callbacks must be a sequence, .*callbacks=\[...\]"),
        ({"callbacks": [EarlyStopping]}, TypeError, "must hold instances, got the class EarlyStopping: call it"),
        ({"callbacks": [Torchlike()]}, TypeError, "callbacks must hold functions .* got Torchlike"),
        (
            {"callbacks": [callback("on_something", "_own")]},
            TypeError,
            "Mine has on_something, which is never called: the hooks are before_training, after_validation",
        ),
        ({"callbacks": [callback("__call__")]}, TypeError, "Mine has __call__, which is never called: the hooks are"),
        (
            {"callbacks": [callback("on_epoch_end", "after_epoch")]},
            TypeError,
            "has on_epoch_end, .*: call it after_epoch",
        ),
        (
            {"callbacks": [callback("on_train_end")]},
            TypeError,
            "has on_train_end, .* never called: call it after_training",
        ),
        ({"callbacks": [callback("after_epochs", "after_epoch")]}, TypeError, "after_epochs, .*: call it after_epoch"),
        (
            {"callbacks": [callback("after_validate", "after_epoch", base=object)]},
            TypeError,
            "has after_validate, which is never called: call it after_validation",
        ),
        ({"callbacks": [callback("on_epoch_end", base=EarlyStopping)]}, TypeError, "has on_epoch_end, which is never"),
        ({"metric": lambda output, y: "good"}, TypeError, "metric must return a number, .* but metric returns str"),
        ({"metric": lambda output, y: output}, ValueError, r"metric must return a number, .* returns \(10, 10\)"),
        ({"metric": failing}, KeyError, "in metric 'failing', called with the output and the targets"),
        ({"metric": "accuracy"}, TypeError, "metric must be a function .* got 'accuracy'"),
        ({"metric": Torchlike}, TypeError, r"metric must be a function .*: call it, metric=Torchlike\(\)"),
        ({"collate": 3}, TypeError, "collate must be a function batch"),
        ({"clip_norm": 0}, ValueError, "clip_norm must be positive, got 0"),
    ],
)
def test_bad_arguments_of_a_training_are_named_with_the_remedy(changes, error, message):
    good = {"network": tiny(), "batches": TENS, "epochs": 1, "optimizer": sgd}
    with pytest.raises(error, match=message):
        fit(**good | changes)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *dict.fromkeys(("criterion", "loss_fn"), r"objective, such as Task\(F.mse_loss\)").items(),
        *dict.fromkeys(("device", "precision", "logger"), "fabric, as Fabric").items(),
        *dict.fromkeys(("max_epochs", "num_epochs"), "epochs").items(),
        *dict.fromkeys(("val_loader", "valid"), "validation").items(),
        ("scheduler", "lr_scheduler"),
        ("collate_fn", "collate"),
        ("early_stopping", r"callbacks, as \[EarlyStopping"),
        ("metrics", "metric, one function or object"),
    ],
)
def test_names_of_other_libraries_are_told_by_ours(name, ours):
    with pytest.raises(TypeError, match=rf"fit\(\) takes no '{name}': that is {ours}"):
        fit(tiny(), TENS, **{name: None})


def test_an_evaluation_tells_names_and_objectives_too():
    with pytest.raises(TypeError, match=r"evaluate\(\) takes no 'loss_fn': that is objective"):
        evaluate(tiny(), TENS, loss_fn=F.mse_loss)
    with pytest.raises(TypeError, match=r"takes no 'device': that is network.to\(device\), to which batches"):
        evaluate(tiny(), TENS, device="cpu")
    with pytest.raises(TypeError, match=r"objective must be an odenets Objective, got CrossEntropyLoss\(\): "):
        evaluate(tiny(), TENS, objective=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"network must come first, evaluate\(network, batches\), got Batches"):
        evaluate(TENS, tiny())


def test_what_a_callback_has_for_itself_is_no_error():
    fit(tiny(), TENS, epochs=1, optimizer=sgd, callbacks=[callback("after_epoch", "show", "plot_all"), callback()])


def test_a_batch_of_another_shape_is_named():
    network = tiny()
    network.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10))
    batches = [(X, Y), (torch.rand(3, 1, 9, 9), Y[:3])]
    with pytest.raises(
        (RuntimeError, ValueError),
        match=r"in batch 2 of batches, of 3 samples \[\(1, 9, 9\)\], and those of the first \[\(1, 8, 8\)\]",
    ):
        fit(network, batches, epochs=1, optimizer=sgd)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("batch", "note"),
    [
        ((torch.rand(5, 9), Y[:5]), r"in batch 1 of batches, of 5 samples \[\(9,\)\]"),
        ((Y, torch.rand(20, 8)), r"of 20 samples \[\(\)\] with torch.int64, where inputs come before targets"),
    ],
)
def test_the_first_batch_is_named_too(lazy, batch, note):
    """Also where it only makes the parameters."""
    network = Network(nn.Linear(8, 4), Flow(depth=1), nn.Linear(4, 10))
    if not lazy:
        network(torch.rand(2, 8))
    with pytest.raises((RuntimeError, TypeError), match=note):
        fit(network, [batch], epochs=1, optimizer=sgd)


def test_gradients_are_to_be_enabled():
    for without in (torch.no_grad, torch.inference_mode):
        with without(), pytest.raises(RuntimeError, match="gradients must be enabled to train"):
            fit(tiny(), TENS, epochs=1, optimizer=sgd)


def test_parameters_of_a_networks_own_make_groups():
    network = tiny()
    fit(network, TENS, epochs=1, optimizer=lambda _: sgd([{"params": [*network.parameters()], "lr": 0.1}]))


def test_an_error_within_an_optimizer_of_parameters_is_its_own():
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        fit(tiny(), TENS, epochs=1, optimizer=lambda parameters: torch.optim.missing(parameters))


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (lambda output, y: 0.25, "metric"),
        (lambda output, y: torch.full((len(y),), 0.25), "metric"),
        (lambda output, y: torch.tensor(0.25), "metric"),
        (partial(lambda output, y, value: value, value=0.25), "metric"),
        (nn.Identity(), "Identity"),
    ],
)
def test_metrics_are_means_over_the_samples(metric, name):
    if name == "Identity":
        metric.forward = lambda output, y: 0.25
    row = fit(tiny(), [(X[:3], Y[:3]), (X, Y)], epochs=1, optimizer=sgd, metric=metric, validation=TENS).rows[0]
    assert row[f"train_{name}"] == row[f"validation_{name}"] == 0.25


def test_labels_that_count_for_nothing_are_no_error():
    labels = torch.where(torch.arange(20) < 3, -100, Y)
    fit(tiny(), [(IMAGES, labels)], epochs=1, optimizer=sgd)
    with pytest.raises(ValueError, match="the labels of batches go up to 10"):
        evaluate(tiny(), [(X, Y + 1)])


def test_several_processes_are_to_be_known(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="torchrun has started 2 processes, of which each trains a network by itself"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, fabric=Fabric(accelerator="cpu", devices=1))


def test_several_processes_are_to_be_launched():
    with pytest.raises(RuntimeError, match=r"fabric must be launched for 2 processes: call fabric.launch\(\) first"):
        fit(tiny(), TENS, epochs=1, optimizer=sgd, fabric=Fabric(accelerator="cpu", devices=2, strategy="ddp"))


@pytest.mark.parametrize("targets", [-torch.ones(4, 10), torch.full((4, 10), 0.2)])
def test_targets_that_are_no_shares_are_no_labels(targets):
    batches = [(torch.rand(4, 1, 8, 8), targets)]
    with pytest.raises(ValueError, match=r"shares of the classes, not negative.*objective=Task\(F.mse_loss\)"):
        fit(tiny(), batches, epochs=1, optimizer=sgd)


def test_a_metric_that_pairs_each_output_with_each_target_is_refused():
    network = Network(nn.Linear(3, 4), Flow(depth=1), nn.Linear(4, 1))
    task = Task(lambda output, y: (output.squeeze(1) - y).square().mean())
    with pytest.raises(ValueError, match=r"targets must have the shape of the output, \(4, 1\), got \(4,\)"):
        fit(
            network,
            [(torch.rand(4, 3), torch.rand(4))],
            epochs=1,
            optimizer=sgd,
            objective=task,
            metric=lambda output, y: (output - y).abs().mean(),
        )


def test_a_batch_without_a_label_that_counts_is_named():
    with pytest.raises(ValueError, match="holds labels -100 alone"):
        fit(tiny(), [(torch.rand(4, 1, 8, 8), torch.full((4,), -100))], epochs=1, optimizer=sgd)
