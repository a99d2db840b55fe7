import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet18

from odenets import adapt, measures, models
from odenets.analysis.memory import measure_memory
from odenets.least_action import ActionPenalty
from odenets.module_wise import end_to_end_step, greedy, parallel_step, split_into_modules, trgl, trgl_multipliers
from odenets.training import data
from odenets.training.loop import fit
from odenets.training.objectives import CrossEntropy
from tests.odenets.checks import assert_same

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(6, 1, 8, 8, generator=GENERATOR), torch.randint(10, (6,), generator=GENERATOR)


def small(seed, depth):
    torch.manual_seed(seed)
    return models.resnet9(1, 10, features=8, size=8, depth=depth)


def modules_of(seed=0, K=3, **options):
    return split_into_modules(small(seed, 2 * K), K, X, **options).train()


def sgd_of_each(modules):
    return [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules.parts]


class Keeping(torch.optim.SGD):
    """Keeps a copy of the gradients."""

    def step(self, closure=None):  # type: ignore[override]
        self.seen = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


@pytest.mark.parametrize("make", [greedy(), trgl(0.5), trgl_multipliers(every=1)])
def test_gradients_of_a_parallel_step_are_those_of_each_module_alone(make):
    network = modules_of()
    alone = copy.deepcopy(network)
    objectives = [make(k, 3) for k in range(3)]
    optimizers = [Keeping(module.parameters(), lr=0.1) for module in network.parts]
    parallel_step(network, objectives, optimizers, X, Y)
    x = X
    for k, module in enumerate(alone.modules_in_order):
        objective = make(k, 3)
        logits, state, records = module.forward_with_records(x.detach(), objective.measures)
        objective.loss(module, (x, Y), logits, records).backward()
        torch.testing.assert_close(optimizers[k].seen, [p.grad for p in module.parameters()])
        x = state


class Careless(CrossEntropy):
    """Reads the labels as a device does that does not raise for them at once."""

    def loss(self, network, batch, output, records):
        return super().loss(network, (batch[0], batch[1].clamp(0, 9)), output, records)


@pytest.mark.parametrize("step", ["parallel", "end to end"])
def test_labels_are_looked_at_before_the_first_step_of_an_epoch(step):
    network = modules_of()
    before = copy.deepcopy(network)
    if step == "parallel":
        take = partial(parallel_step, network, [Careless() for _ in range(3)], sgd_of_each(network), X, Y + 10)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        take = partial(end_to_end_step, network, Careless(), optimizer, X, Y + 10)
    with pytest.raises(ValueError, match="the network has 10 logits, and the labels of batches go up to 1"):
        take(first=True)
    for p, q in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert take().isfinite().all()


def test_nothing_reaches_another_module():
    network = modules_of()
    objectives = [greedy()(k, 3) for k in range(3)]
    clean = copy.deepcopy(network)
    for p in network.modules_in_order[1].parameters():
        p.register_hook(lambda g: torch.full_like(g, torch.nan))  # the gradients of the second module are poisoned
    parallel_step(network, objectives, sgd_of_each(network), X, Y)
    parallel_step(clean, objectives, sgd_of_each(clean), X, Y)
    for k, (poisoned, module) in enumerate(zip(network.parts, clean.parts, strict=True)):
        for p, q in zip(poisoned.parameters(), module.parameters(), strict=True):
            assert p.isnan().all() if k == 1 else torch.equal(p, q)


def test_trgl_weighs_the_action_of_the_second_half_with_twice_tau():
    weights = [trgl(0.5)(k, 4).weight for k in range(4)]  # type: ignore[union-attr]
    assert weights == [1.0, 1.0, 0.5, 0.5]
    assert [trgl(0.5, doubled=False)(k, 3).weight for k in range(3)] == [1.0, 1.0, 1.0]  # type: ignore[union-attr]
    first = [trgl_multipliers(2.0, growth=1.0)(k, 3).multiplier.item() for k in range(3)]  # type: ignore[union-attr]
    assert first == [2.0, 4.0, 6.0]
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tau must be positive"):
            trgl(tau)
    with pytest.raises(ValueError, match="lambda0 must be positive"):
        trgl_multipliers(0.0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_end_to_end_steps_are_those_of_the_training_loop(checkpointed):
    network = small(1, 4).double()
    modules, x = split_into_modules(network, 2, X).train(), X.double()
    plain = copy.deepcopy(network)
    sgd = partial(torch.optim.SGD, lr=0.1)
    objective = ActionPenalty(0.5)
    for _ in range(2):
        end_to_end_step(modules, objective, sgd(network.parameters()), x, Y, checkpointed=checkpointed)
    batches = data.Batches((x, Y), 6)
    fit(plain, batches, epochs=2, optimizer=sgd, objective=ActionPenalty(0.5))
    assert_same(network, plain, 1e-7, 1e-7)


@pytest.mark.parametrize("step", ["parallel", "end-to-end"])
def test_gradients_of_what_was_done_before_are_forgotten(step):
    modules = modules_of(1, 2)
    clean = copy.deepcopy(modules)
    for p in modules.parameters():
        p.grad = torch.ones_like(p)
    for network in (modules, clean):
        if step == "parallel":
            parallel_step(network, [CrossEntropy()] * 2, sgd_of_each(network), X, Y)
        else:
            end_to_end_step(network, CrossEntropy(), torch.optim.SGD(network.parameters(), 0.1), X, Y)
    assert_same(modules, clean)


def peak_of_step(network, K, make, x, y):
    """Of the second parallel step."""
    modules = split_into_modules(network, K, x[:2]).train()
    step = partial(parallel_step, modules, [make(k, K) for k in range(K)], sgd_of_each(modules), x, y)
    step()
    return measure_memory(step).peak


def test_peak_memory_falls_with_the_number_of_modules():
    peaks = {}
    x, y = torch.rand(16, 1, 16, 16), torch.randint(10, (16,))
    for K in (1, 2, 4):
        torch.manual_seed(0)
        peaks[K] = peak_of_step(models.resnet9(1, 10, features=8, size=16, depth=8), K, trgl(1.0), x, y)
    assert peaks[2] < 0.75 * peaks[1]
    assert peaks[4] < 0.75 * peaks[2]


def test_a_local_loss_trains_with_its_module():
    class Pull(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, state, images, y):
            assert images.shape == X.shape
            return self.scale * state.square().mean()

    network = modules_of(local_loss=lambda k, K, state, images: Pull())
    assert all(module.local_loss.scale.item() == 1 for module in network.modules_in_order)  # type: ignore[union-attr]
    parallel_step(network, [greedy()(k, 3) for k in range(3)], sgd_of_each(network), X, Y)
    assert all(module.local_loss.scale.item() < 1 for module in network.modules_in_order)  # type: ignore[union-attr]


def test_records_of_the_modules_are_those_of_the_network():
    network = small(0, 4).eval()
    modules = split_into_modules(network, 2, X)
    expected, joined = network.record(X, action=measures.action), modules.record(X, action=measures.action)
    torch.testing.assert_close(joined[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(joined[1]["action"], expected[1]["action"], rtol=0, atol=0)
    assert joined[1].starts == (0, 2)


@pytest.mark.parametrize("adapted", [False, True], ids=["native", "adapted"])
def test_the_action_keeps_nothing_that_is_not_kept_anyway(adapted):
    x, y = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
    peaks = []
    for make in (greedy(), trgl(1.0)):
        torch.manual_seed(0)
        network = adapt(resnet18(num_classes=10)) if adapted else models.resnet110(blocks=2)
        peaks.append(peak_of_step(network, 2, make, x, y))
    assert peaks[1] < 1.01 * peaks[0]


def test_shapes_alone_tell_the_same_memory():
    def peak():
        torch.manual_seed(0)
        x, y = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
        return peak_of_step(models.resnet110(blocks=2), 2, trgl(1.0), x, y)

    real = peak()
    with FakeTensorMode():
        assert peak() == real


def test_a_checkpointed_step_repeats_what_the_forward_pass_did():
    """With a power iteration, whose vector each pass moves, running statistics of every kind, and dropout."""
    networks = []
    for checkpointed in (False, True):
        network = small(0, 2).double()
        extra = [nn.InstanceNorm2d(8, track_running_stats=True), nn.Dropout(0.3),
                 torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))]  # fmt: skip
        network.encoder = nn.Sequential(network.encoder, *extra).double()
        modules = split_into_modules(network, 2, X).train()
        torch.manual_seed(1)
        for _ in range(2):
            end_to_end_step(modules, CrossEntropy(), torch.optim.SGD(network.parameters(), 0.1), X.double(), Y,
                            checkpointed=checkpointed)  # fmt: skip
        networks.append(network)
    assert_same(*networks, atol=1e-12)


def test_records_of_an_end_to_end_step_say_where_modules_begin():
    class Looking(CrossEntropy):
        def loss(self, network, batch, output, records):
            self.starts = records.starts
            return super().loss(network, batch, output, records)

    modules, objective = modules_of(), Looking()
    objective.measures["action"] = measures.action
    end_to_end_step(modules, objective, torch.optim.SGD(modules.parameters(), 0.1), X, Y)
    assert objective.starts == (0, 2, 4)


def test_a_module_of_which_nothing_trains_is_named():
    modules = modules_of()
    modules.modules_in_order[1].requires_grad_(False)
    with pytest.raises(ValueError, match="the loss of CrossEntropy depends on no parameter that requires a gradient"):
        parallel_step(modules, [CrossEntropy() for _ in range(3)], sgd_of_each(modules), X, Y)
