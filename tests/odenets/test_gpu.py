"""Networks, measures and trainings on a GPU: what a CPU gives."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

import odenets
from odenets import measures, models
from odenets.depth import DepthRule, adapt_depth
from odenets.detection.features import Trajectory
from odenets.least_action import LeastAction
from odenets.module_wise import fit_modules, split_into_modules, trgl
from odenets.training import data
from odenets.training.evaluation import evaluate
from odenets.training.instances import fit_instances
from odenets.training.loop import fit
from solvers.reductions import functional
from tests.odenets.networks import Unit

pytestmark = pytest.mark.gpu
D = torch.float64
X = torch.rand(24, 1, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0))
IMAGES = data.TensorData(X, torch.arange(24) % 3)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
NAMED = {
    name: getattr(measures, name) for name in ("action", "cosine", "displacement", "error", "residue", "square_norm")
}


def on(device):
    return replace(IMAGES, x=X.to(device), y=IMAGES.y.to(device))


def network(device="cpu", dtype=D, **options):
    torch.manual_seed(0)
    made = models.small_network(1, 3, **{"features": 32, "size": 8, "solver": "bs23", "depth": 2} | options)
    made(X[:2].float())
    return made.to(device, dtype)


def adapted():
    torch.manual_seed(0)
    blocks = [Unit(16, 16), Unit(16, 16), nn.Flatten(), nn.Linear(1024, 3)]
    return odenets.adapt(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *blocks), blocks=["1", "2"]).to(D)


def close(ours, expected, near=1e-8):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=near, atol=near)


@pytest.mark.parametrize("few", [0, 1 << 25], ids=["operators", "expressions"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "bs23"])
def test_every_measure_and_its_gradient_as_on_a_cpu(solver, few, monkeypatch):
    monkeypatch.setattr(functional, "SMALL_ON_GPU", few)
    named = {name: measure for name, measure in NAMED.items() if solver != "euler" or name != "error"}

    def recorded(device):
        made = network(device, solver=solver)
        output, records = made.record(X.to(device), **named)
        loss = output.square().sum() + sum(values.sum() for values in records.values())
        return output.detach(), *records.values(), *torch.autograd.grad(loss, list(made.parameters()))

    close(recorded("cuda"), recorded("cpu"))


@pytest.mark.parametrize("options", [{}, {"solver": "euler", "h": 1.0}], ids=["bs23", "residual"])
@pytest.mark.parametrize("objective", [None, LeastAction], ids=["plain", "least action"])
def test_a_training_as_on_a_cpu(objective, options):
    def trained(device):
        made = network(**options)
        fabric = Fabric(accelerator=device, devices=1, precision="64-true")
        training = fit(
            made, data.Batches(on(device), 8, seed=0, crop=1, flip=True), epochs=2, fabric=fabric,
            optimizer=SGD, objective=objective and objective(), validation=data.Batches(IMAGES, 10),
        )  # fmt: skip
        rows = [[row["train_loss"], row["validation_loss"], row["validation_accuracy"]] for row in training.rows]
        return torch.tensor(rows), *made.state_dict().values()

    close(trained("cuda"), trained("cpu"), 1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [network, adapted])
def test_trains_in_every_precision(make, precision):
    made = make().float()
    narrow = replace(IMAGES, x=X.float())
    fabric = Fabric(accelerator="cuda", devices=1, precision=precision)
    training = fit(
        made, data.Batches(narrow, 8, seed=0), epochs=8, fabric=fabric, optimizer=SGD, objective=LeastAction()
    )  # fmt: skip
    assert training.rows[-1]["train_loss"] < training.rows[0]["train_loss"]


@pytest.mark.parametrize("make", [network, adapted])
def test_a_run_goes_on_to_the_same_weights(make, tmp_path):
    def trained(epochs, folder):
        made = make()
        run = odenets.training.runs.Run(tmp_path / folder, {}, resume=(tmp_path / folder).exists())
        fabric = Fabric(accelerator="cuda", devices=1, precision="64-true")
        options = {"optimizer": SGD, "objective": LeastAction(), "run": run, "fabric": fabric}
        fit(made, data.Batches(IMAGES, 8, seed=0), epochs=epochs, **options)
        return [value.cpu() for value in made.state_dict().values()]

    trained(1, "stopped")
    close(trained(3, "stopped"), trained(3, "whole"), 1e-10)


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_modules_trained_as_on_a_cpu(order):
    def trained(device):
        torch.manual_seed(0)
        made = split_into_modules(models.resnet9(1, 3, features=8, size=8, depth=3).to(D), 3, X[:4]).to(device)
        options = {"epochs": 2, "optimizer": SGD, "objective": trgl(0.5), "order": order}
        fit_modules(made, data.Batches(on(device), 8, seed=0), **options)
        return list(made.state_dict().values())

    close(trained("cuda"), trained("cpu"), 1e-6)


def test_instances_trained_as_on_a_cpu():
    def trained(device):
        networks = [network(device, solver="euler", norm=None) for _ in range(3)]
        batches = [data.Batches(on(device), 8, seed=seed) for seed in range(3)]
        made = fit_instances(
            networks, batches, epochs=2, optimizer=SGD, objective=LeastAction, measured={"test": [on(device)] * 3}
        )  # fmt: skip
        return made.train_loss, *(p for each in networks for p in each.parameters())

    close(trained("cuda"), trained("cpu"), 1e-6)


def test_depth_adapts_as_on_a_cpu():
    def adapted_depth(device):
        made = network(device)
        optimizer = SGD(made.parameters())
        made(X.to(device)).sum().backward()
        optimizer.step()
        adapt_depth(made, lambda: [X.to(device)], DepthRule(tolerance=1e-9), optimizer)
        return torch.tensor(made.h), made(X.to(device)).detach()

    close(adapted_depth("cuda"), adapted_depth("cpu"))


def test_features_of_a_path_as_on_a_cpu():
    features = Trajectory("residue", "cosine", "stages", "error", "action", vectors=2)
    close([features(network("cuda").eval(), X.cuda())], [features(network().eval(), X)])


def test_weights_cross_devices(tmp_path):
    made = network("cuda")
    path = odenets.checkpoints.save_weights(made, tmp_path / "weights.safetensors")
    other = odenets.checkpoints.load_weights(network(), path)
    close(made.state_dict().values(), other.state_dict().values(), 0)
    again = odenets.checkpoints.load_weights(copy.deepcopy(made), path)
    assert all(p.is_cuda for p in again.parameters())


def test_recalibrated_and_evaluated_as_on_a_cpu():
    def measured(device):
        made = network(device)
        odenets.recalibrate(made, [X.to(device)])
        evaluation = evaluate(made, data.Batches(IMAGES, 10))
        return torch.tensor([evaluation.loss, evaluation.accuracy]), *made.buffers()

    close(measured("cuda"), measured("cpu"))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # looked at by the compiler of torch 2.11
def test_a_compiled_training_step_as_the_eager_one():
    made, x = network("cuda", torch.float32, solver="euler", h=1.0), X.float().cuda()

    def loss():
        output, records = made.record(x, action=measures.action)
        return output.square().mean() + records["action"].sum()

    expected = torch.autograd.grad(loss(), list(made.parameters()))
    compiled = torch.autograd.grad(torch.compile(loss)(), list(made.parameters()))
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)
