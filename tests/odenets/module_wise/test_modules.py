import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, adapt, models
from odenets.module_wise import ModuleWise, conv_head, linear_head, split_into_modules, token_head
from odenets.training import data
from tests.odenets.checks import unchanged
from tests.odenets.networks import Calling

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FOUR = data.Batches((IMAGES, torch.arange(4)), 3)


def small(depth=4):
    return models.resnet9(1, 10, features=8, size=8, depth=depth)


def test_each_module_has_a_head_and_the_last_the_networks_own():
    network = small()
    modules = split_into_modules(network, 2, IMAGES)
    assert (modules.K, modules.ends) == (2, (2, 4))
    outputs = list(modules.eval().outputs(IMAGES))
    torch.testing.assert_close(outputs[-1], network.eval()(IMAGES), rtol=0, atol=0)
    assert modules.modules_in_order[-1].head is network.head
    other = split_into_modules(network, [1], IMAGES, last_head="auxiliary")
    assert other.ends == (1, 4)
    assert other.modules_in_order[-1].head is not network.head


def test_an_early_exit_does_not_call_later_modules():
    modules = split_into_modules(small(), 4, IMAGES).eval()
    outputs = list(modules.outputs(IMAGES))
    modules.modules_in_order[2].part.forward = None  # type: ignore[assignment, method-assign]
    for k in (1, 2):
        torch.testing.assert_close(modules.eval()(IMAGES, module=k), outputs[k - 1], rtol=0, atol=0)
        assert torch.equal(modules.train().predict(IMAGES, module=k), outputs[k - 1].argmax(1))
        assert modules.training
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"module must be between 1 and the number of modules, 4, got {k}"):
            modules(IMAGES, module=k)


def test_accuracy_after_each_module_and_the_best():
    def constant(label):
        return Calling(lambda m, x: nn.functional.one_hot(torch.full((len(x),), label), 3).float())

    labels = torch.tensor([0, 1, 1, 2, 1, 0])
    batches = data.Batches((torch.rand(6, 2), labels), 4)
    label, flow = iter([0, 1, 2]), Flow(lambda: MLPField(2), depth=3)
    modules = split_into_modules(flow, 3, torch.rand(2, 2), outputs=3, head=lambda state, c: constant(next(label)))
    assert modules.accuracies(batches) == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert modules.best(batches) == 2


def test_one_head_for_all():
    head = conv_head(torch.rand(2, 8, 4, 4), 10)
    modules = split_into_modules(small(), 4, IMAGES, head=head, last_head="auxiliary")
    assert all(module.head is head for module in modules.modules_in_order)


def test_heads_of_the_literature():
    head = conv_head(torch.rand(2, 16, 32, 32), 10)
    names = [type(layer).__name__ for layer in head]
    assert names == ["Conv2d", "ReLU", "AvgPool2d", "BatchNorm2d", "Rearrange", "Linear"]
    assert head[2].kernel_size == 8  # as in the thesis' on CIFAR-100: 8 on 32 x 32, 4 on 16 x 16
    assert conv_head(torch.rand(2, 16, 16, 16), 10)[2].kernel_size == 4
    for state in (torch.rand(2, 5, 6), torch.rand(2, 5, 5, 6)):
        expected = nn.functional.layer_norm(state, (6,)).flatten(1, -2).mean(1)
        torch.testing.assert_close(token_head(state, 3)[:2](state), expected)
    assert linear_head(torch.rand(2, 3, 4), 7)(torch.rand(5, 3, 4)).shape == (5, 7)


def test_the_head_follows_the_shape():
    vectors = split_into_modules(Flow(lambda: MLPField(3), depth=2), 2, torch.rand(2, 3), outputs=4)
    assert isinstance(vectors.modules_in_order[0].head[-1], nn.Linear)  # type: ignore[index]
    tv = pytest.importorskip("torchvision.models")
    swin = adapt(tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5))
    images = torch.rand(2, 3, 32, 32)
    modules = split_into_modules(swin, [2], images, at="start", head="token")
    assert modules.modules_in_order[0].part(images).shape == (2, 4, 4, 32)  # behind the merging of patches
    assert modules(images, module=1).shape == (2, 5)


@pytest.mark.parametrize(
    ("network", "split", "options", "error", "match"),
    [
        (small, 5, {}, ValueError, "modules must be between 1 and the number of blocks, 4, got 5"),
        (small, [3, 2], {}, ValueError, "ends must rise"),
        (small, 2.0, {}, TypeError, "split must be a number of modules, or a list of their ends, got 2.0"),
        (small, 2, {"head": nn.Linear(3, 10)}, ValueError, r"head of module 1 does not fit states \(4, 8, 4, 4\)"),
        (small, 2, {"head": lambda state, c: nn.Flatten()}, ValueError, r"head of module 1 must return \(4, 10\)"),
        (small, 2, {"head": "mlp"}, ValueError, "head must be 'auto', 'conv', 'token', 'linear'"),
        (small, 2, {"head": []}, ValueError, r"head must hold one for each module but the last.*: 1, got 0"),
        (small, 2, {"balance": "weight"}, ValueError, "balance must be"),
        (lambda: nn.Linear(2, 2), 2, {}, TypeError, "an adapted model, got Linear: odenets.adapt makes one"),
    ],
)
def test_errors(network, split, options, error, match):
    with pytest.raises(error, match=match):
        split_into_modules(network(), split, IMAGES, **options)


def test_errors_of_inputs():
    with pytest.raises(ValueError, match="at least two inputs"):
        split_into_modules(small(), 2, IMAGES[:1])
    with pytest.raises(ValueError, match="outputs must be given"):
        split_into_modules(Flow(lambda: MLPField(2)), 1, torch.rand(2, 2))
    with pytest.raises(ValueError, match="pool must be at most 4"):
        conv_head(torch.rand(2, 8, 4, 4), 10, pool=5)


def test_what_is_split_by_memory_is_more_even():
    network = models.resnet110(blocks=3, channels=(4, 8, 16))
    images = torch.rand(2, 3, 32, 32)
    assert split_into_modules(network, 3, images).ends == (3, 6, 9)
    assert isinstance(modules := split_into_modules(network, 3, images, balance="memory"), ModuleWise)
    assert modules.ends[0] < 3


DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("balance", ["blocks", "memory"])
@pytest.mark.parametrize(
    "head", ["auto", "linear", lambda s, c: nn.Sequential(nn.Flatten(), nn.Linear(s[0].numel(), c))]
)
def test_heads_follow_the_networks_dtype(dtype, balance, head):
    modules = split_into_modules(small().to(dtype), 2, IMAGES, balance=balance, head=head, last_head="auxiliary")
    assert {p.dtype for p in modules.parameters()} == {dtype}
    assert torch.equal(modules.predict(IMAGES), modules.eval()(IMAGES.to(dtype)).argmax(1))
    assert modules.accuracies(FOUR)[1] == (modules(IMAGES.to(dtype)).argmax(1) == FOUR.data.y).float().mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_made_by_hand_follow_the_state(dtype):
    for make, shape in ((conv_head, (2, 4, 8, 8)), (token_head, (2, 5, 6)), (linear_head, (2, 3, 4))):
        state = torch.rand(shape).to(dtype)
        assert make(state, 7)(state).dtype == dtype


def test_an_adapted_network_in_float64_and_a_lazy_flow():
    tv = pytest.importorskip("torchvision.models")
    resnet = adapt(tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)).double()
    modules = split_into_modules(resnet, 2, torch.rand(2, 3, 32, 32))
    assert [output.dtype for output in modules.outputs(torch.rand(2, 3, 32, 32).double())] == [torch.float64] * 2
    lazy = split_into_modules(Flow(depth=2, solver="euler"), 2, torch.rand(2, 3).double(), outputs=4)
    assert {p.dtype for p in lazy.parameters()} == {torch.float64}


@pytest.mark.parametrize("balance", ["blocks", "memory"])
@pytest.mark.parametrize("training", [False, True])
def test_splitting_leaves_a_network_as_it_was_and_new_layers_take_its_mode(balance, training):
    network = small().train(training)
    network.encoder.train(not training)
    network.head = nn.Sequential(nn.Dropout(), network.head).train(not training)
    with unchanged(network):
        head = Calling(lambda m, x: x.flatten(1)[:, :10])  # draws no weights
        modules = split_into_modules(network, 2, IMAGES, balance=balance, head=lambda state, classes: head)
        assert modules.training == modules.modules_in_order[0].head.training == training
        modules.predict(IMAGES)
        modules.accuracies(FOUR)


def test_modes_come_back_after_an_exception():
    network = small().train()
    network.encoder.eval()
    modules = split_into_modules(network, 2, IMAGES)
    network.flows[0].blocks[2].fields[0].register_forward_pre_hook(lambda module, args: 1 / 0)
    splits = [lambda b=b: split_into_modules(network, 2, IMAGES, balance=b) for b in ("blocks", "memory")]
    for look in (*splits, lambda: modules.predict(IMAGES), lambda: modules.accuracies(FOUR)):
        with unchanged(network), pytest.raises(ZeroDivisionError):
            look()


@pytest.mark.parametrize("how", [lambda z: (z, None), lambda z: {"scores": z}])
def test_heads_whose_outputs_are_no_tensors_are_named(how):
    network = small()
    network.head = Calling(lambda m, x: how(m.head(x)), head=network.head)
    with pytest.raises(ValueError, match="outputs must be given: the network's output is a"):
        split_into_modules(network, 2, IMAGES)
    with pytest.raises(TypeError, match=r"head of module 2 must return a tensor \(4, 10\), got (tuple|dict)"):
        split_into_modules(network, 2, IMAGES, outputs=10)


@pytest.mark.parametrize(("last", "needed"), [("own", 1), ("auxiliary", 2)])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_as_many_heads_as_modules_need(last, needed, number):
    heads = [linear_head(torch.rand(2, 8, 4, 4), 10) for _ in range(number)]
    if number == needed:
        modules = split_into_modules(small(), 2, IMAGES, head=heads, last_head=last)
        assert [module.head for module in modules.modules_in_order][:number] == heads
        return
    with pytest.raises(ValueError, match=f"head must hold one for each module.*: {needed}, got {number}"):
        split_into_modules(small(), 2, IMAGES, head=heads, last_head=last)


@pytest.mark.parametrize("adapted", [False, True])
def test_steps_of_modules_are_those_of_the_network(adapted):
    tv = pytest.importorskip("torchvision.models")
    network = adapt(tv.resnet18(num_classes=5)) if adapted else small()
    images = torch.rand(2, 3, 32, 32) if adapted else IMAGES
    modules = split_into_modules(network.eval(), 2, images)
    expected = [*network.steps(images)]
    steps = [*modules.steps(images)]
    assert len(steps) == len(expected) == modules.depth
    for one, other in zip(steps, expected, strict=True):
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.x1, other.x1)
    assert len(modules.flows) == (0 if adapted else modules.K)
