import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from odenets import adapt, models
from odenets.module_wise import auglocal, blocks_of, fit_modules, infopro, predsim, split_into_modules
from odenets.module_wise.baselines import Reconstruction, Similarity, correlations
from odenets.training import data, datasets
from tests.odenets.checks import unchanged

DIGITS = datasets.subsample(datasets.load("digits")[0], 120)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def network():
    torch.manual_seed(0)
    return models.resnet9(1, 10, features=8, size=8, depth=4)


def test_correlations_are_numpys():
    rows = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(correlations(rows), torch.corrcoef(rows))


@pytest.mark.parametrize(("shape", "dtype"), [((6, 4, 5, 5), torch.float32), ((6, 5), torch.float64)])
def test_predsim_is_the_distance_of_two_similarity_matrices(shape, dtype):
    state, y = torch.randn(shape, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 1])
    loss = Similarity(state, 3, weight=2.0)
    target = torch.corrcoef(F.one_hot(y, 3).to(dtype))
    expected = 2 * torch.linalg.matrix_norm(torch.corrcoef(loss.layer(state).flatten(1)) - target) ** 2 / 36
    tolerance = {"rtol": 0, "atol": 1e-14} if dtype == torch.float64 else {}
    torch.testing.assert_close(loss(state, torch.zeros(6, 1), y), expected, **tolerance)


def test_infopro_decodes_the_image():
    images = torch.rand(8, 1, 8, 8)
    loss = Reconstruction(1, 1, 1.0)
    optimizer = torch.optim.Adam(loss.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(images, images, torch.zeros(8))
        value.backward()
        optimizer.step()
    entropy = F.binary_cross_entropy(images, images)
    blind = F.binary_cross_entropy(images.mean().expand_as(images), images)
    assert value < (entropy + blind) / 2  # far below what a constant image gives


def test_weights_of_infopro_fall_from_module_to_module():
    modules = split_into_modules(network(), 3, DIGITS.x[:4], local_loss=infopro(1.0, 0.0)).modules_in_order
    assert [getattr(module.local_loss, "weight", 0.0) for module in modules] == [1.0, 0.5, 0.0]


def test_auglocal_has_fewer_blocks_the_later_the_module():
    deep = models.resnet110(blocks=4, channels=(4, 8, 16))
    images = torch.rand(2, 3, 32, 32)
    ends = [1, 2, 6, 8, 12]
    heads = auglocal(deep, ends, images, deepest=6, shallowest=1)
    counts = [sum(getattr(part, "depth", 0) for part in head[:-1]) for head in heads]  # type: ignore[index, misc]
    assert counts == [8, 5, 4, 2]  # 6, 4, 3 and 1 chosen evenly, and the blocks that change the shape
    modules = split_into_modules(deep, ends, images, head=heads)
    assert [output.shape for output in modules.outputs(images)] == [(2, 10)] * 5
    mine = {id(p) for p in deep.parameters()}
    assert not mine & {id(p) for head in heads for p in head.parameters()}


def test_auglocal_on_an_adapted_network():
    tv = pytest.importorskip("torchvision.models")
    images = torch.rand(2, 3, 32, 32)
    resnet = adapt(tv.ResNet(tv.resnet.BasicBlock, [1, 2, 1, 1], num_classes=5), images)
    modules = split_into_modules(resnet, [1, 3, 5], images, head=auglocal(resnet, [1, 3, blocks_of(resnet)], images))
    assert all(output.shape == (2, 5) for output in modules.outputs(images))


BASELINES = {
    "infopro": lambda net: {"local_loss": infopro()},
    "predsim": lambda net: {"local_loss": predsim(10, 0.1)},
    "auglocal": lambda net: {"head": auglocal(net, [2, 4], DIGITS.x[:4])},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_train_and_follow_the_networks_dtype(baseline, dtype):
    net = network().to(dtype)
    modules = split_into_modules(net, 2, DIGITS.x[:4], **BASELINES[baseline](net))
    assert {p.dtype for p in modules.parameters()} == {dtype}
    epochs = 10 if dtype == torch.float32 else 1
    training = fit_modules(modules, data.Batches(DIGITS, 40, seed=0), epochs=epochs, optimizer=SGD)
    assert all(math.isfinite(row["train_loss"]) for row in training.rows)
    if dtype == torch.float32:
        assert min(modules.accuracies(data.Batches(datasets.load("digits")[1], 500))) > 0.6


def test_errors():
    with pytest.raises(ValueError, match="weight positive"):
        predsim(10, 0.0)
    with pytest.raises(ValueError, match="first and last must not be negative"):
        infopro(-1.0)
    with pytest.raises(ValueError, match="InfoPro decodes images"):
        infopro()(0, 2, torch.rand(2, 5), torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match="deepest must be at least shallowest"):
        auglocal(network(), [2, 4], DIGITS.x[:4], deepest=1, shallowest=2)


def test_infopro_decodes_in_the_order_of_its_paper():
    state, images = torch.randn(4, 6, 4, 4), torch.rand(4, 1, 16, 16)
    loss = Reconstruction(6, 1, 0.5)
    with torch.no_grad():
        large = F.interpolate(state, (16, 16), mode="bilinear", align_corners=False)
        decoded = loss.second(F.relu(F.batch_norm(loss.first(large), None, None, training=True))).sigmoid()
        expected = 0.5 * F.binary_cross_entropy(decoded, images)
    torch.testing.assert_close(loss(state, images, torch.zeros(4)).detach(), expected)


def test_infopro_needs_pixels_between_0_and_1():
    for images in (torch.full((2, 1, 8, 8), 1.5), torch.full((2, 1, 8, 8), -0.5)):
        with pytest.raises(ValueError, match=r"InfoPro decodes images with pixels in \[0, 1\], got"):
            split_into_modules(network(), 2, images, local_loss=infopro())


def test_auglocal_leaves_a_network_as_it_was_after_an_error():
    net = network().train()
    net.flows[0].blocks[1].eval()
    net.flows[0].blocks[2].fields[0].register_forward_pre_hook(lambda module, args: 1 / 0)
    with unchanged(net), pytest.raises(ZeroDivisionError):
        auglocal(net, [2, 4], DIGITS.x[:4])
