import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, adapt, data, models
from odenets.module_wise import ModuleWise, conv_head, linear_head, module_wise, token_head

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def small(depth=4):
    return models.resnet9(1, 10, features=8, size=8, depth=depth)


def test_each_module_has_a_head_and_the_last_the_networks_own():
    network = small()
    modules = module_wise(network, 2, IMAGES)
    assert (modules.K, modules.ends) == (2, (2, 4))
    outputs = list(modules.eval().outputs(IMAGES))
    torch.testing.assert_close(outputs[-1], network.eval()(IMAGES), rtol=0, atol=0)
    assert modules.modules_in_order[-1].head is network.head
    other = module_wise(network, [1], IMAGES, last_head="auxiliary")
    assert other.ends == (1, 4)
    assert other.modules_in_order[-1].head is not network.head


def test_an_early_exit_does_not_call_later_modules():
    modules = module_wise(small(), 4, IMAGES).eval()
    outputs = list(modules.outputs(IMAGES))
    modules.modules_in_order[2].part.forward = None  # type: ignore[assignment, method-assign]
    for depth in (1, 2):
        torch.testing.assert_close(modules.eval()(IMAGES, depth), outputs[depth - 1], rtol=0, atol=0)
        assert torch.equal(modules.train().predict(IMAGES, depth), outputs[depth - 1].argmax(1))
        assert modules.training
    for depth in (0, 5):
        with pytest.raises(ValueError, match=f"depth must be between 1 and the number of modules, 4, got {depth}"):
            modules(IMAGES, depth)


def test_accuracy_after_each_module_and_the_best():
    class Constant(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), self.label), 3).float()

    labels = torch.tensor([0, 1, 1, 2, 1, 0])
    batches = data.Batches(data.Dataset("six", torch.rand(6, 2), labels, 3, (0.0,), (1.0,)), 4)
    made = iter([0, 1, 2])
    modules = module_wise(
        Flow(lambda: MLPField(2), depth=3), 3, torch.rand(2, 2), classes=3, head=lambda state, c: Constant(next(made))
    )
    assert modules.accuracies(batches) == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert modules.best(batches) == 2


def test_one_head_for_all():
    head = conv_head(torch.rand(2, 8, 4, 4), 10)
    modules = module_wise(small(), 4, IMAGES, head=head, last_head="auxiliary")
    assert all(module.head is head for module in modules.modules_in_order)


def test_heads_of_the_literature():
    head = conv_head(torch.rand(2, 16, 32, 32), 10)
    assert [type(layer).__name__ for layer in head] == [
        "Conv2d",
        "ReLU",
        "AvgPool2d",
        "BatchNorm2d",
        "Rearrange",
        "Linear",
    ]
    assert head[2].kernel_size == 8  # as in the thesis' on CIFAR-100: 8 on 32 x 32, 4 on 16 x 16
    assert conv_head(torch.rand(2, 16, 16, 16), 10)[2].kernel_size == 4
    for state in (torch.rand(2, 5, 6), torch.rand(2, 5, 5, 6)):
        torch.testing.assert_close(
            token_head(state, 3)[:2](state), nn.functional.layer_norm(state, (6,)).flatten(1, -2).mean(1)
        )
    assert linear_head(torch.rand(2, 3, 4), 7)(torch.rand(5, 3, 4)).shape == (5, 7)


def test_the_head_follows_the_shape():
    vectors = module_wise(Flow(lambda: MLPField(3), depth=2), 2, torch.rand(2, 3), classes=4)
    assert isinstance(vectors.modules_in_order[0].head[-1], nn.Linear)  # type: ignore[index]
    tv = pytest.importorskip("torchvision.models")
    swin = adapt(tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5))
    images = torch.rand(2, 3, 32, 32)
    modules = module_wise(swin, [2], images, at="start", head="token")
    assert modules.modules_in_order[0].part(images).shape == (2, 4, 4, 32)  # behind the merging of patches
    assert modules(images, 1).shape == (2, 5)


def test_errors():
    with pytest.raises(ValueError, match="modules must be between 1 and the number of blocks, 4, got 5"):
        module_wise(small(), 5, IMAGES)
    with pytest.raises(ValueError, match="ends must rise"):
        module_wise(small(), [3, 2], IMAGES)
    with pytest.raises(ValueError, match="at least two inputs"):
        module_wise(small(), 2, IMAGES[:1])
    with pytest.raises(ValueError, match="classes must be given"):
        module_wise(Flow(lambda: MLPField(2)), 1, torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"head of module 1 does not fit states \(4, 8, 4, 4\)"):
        module_wise(small(), 2, IMAGES, head=nn.Linear(3, 10))
    with pytest.raises(ValueError, match=r"head of module 1 must return \(4, 10\)"):
        module_wise(small(), 2, IMAGES, head=lambda state, classes: nn.Flatten())
    with pytest.raises(ValueError, match="head must be 'auto', 'conv', 'token', 'linear'"):
        module_wise(small(), 2, IMAGES, head="mlp")
    with pytest.raises(ValueError, match="pool must be at most 4"):
        conv_head(torch.rand(2, 8, 4, 4), 10, pool=5)
    with pytest.raises(ValueError, match="balance must be"):
        module_wise(small(), 2, IMAGES, balance="weight")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network must be"):
        module_wise(nn.Linear(2, 2), 2, IMAGES)  # type: ignore[arg-type]


def test_what_is_split_by_memory_is_more_even():
    network = models.resnet110(blocks=3, channels=(4, 8, 16))
    images = torch.rand(2, 3, 32, 32)
    assert module_wise(network, 3, images).ends == (3, 6, 9)
    assert isinstance(modules := module_wise(network, 3, images, balance="memory"), ModuleWise)
    assert modules.ends[0] < 3
