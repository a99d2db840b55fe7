import math

import pytest
import torch
from torch.nn import functional as F

from odenets import measures, models
from solvers import get_tableau


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 9), ("midpoint", 18), ("rk4", 36), ("bs23", 27)])
def test_resnet9_for_any_solver(solver, evaluations):
    net = models.resnet9(solver=solver)
    x = torch.rand(3, 1, 28, 28)
    assert net(x).shape == (3, 10)
    assert net.evaluations == evaluations
    # encoder 3x3 and 5x5 with batch norm, nine blocks of two 3x3 with batch norm, two linear layers with batch norm
    encoder = 9 * 16 + 2 * 16 + 25 * 16 * 32 + 2 * 32
    blocks = 9 * 2 * (9 * 32 * 32 + 2 * 32)
    head = 32 * 14 * 14 * 100 + 100 + 2 * 100 + 100 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == encoder + blocks + head


def test_resnet9_is_a_residual_network_of_unit_steps():
    net = models.resnet9().eval()
    assert net.flows[0].h == (1.0,) * 9
    x = torch.rand(2, 1, 28, 28)
    y = net.encoder(x)
    for block in net.flows[0].blocks:
        y = y + block.fields[0](0.0, y)
    torch.testing.assert_close(net(x), net.head(y))


FACTORIES = {
    "resnet9": models.resnet9,
    "resnet110": lambda **o: models.resnet110(blocks=3, **o),
    "wide": lambda **o: models.wide_resnet(widen=1, blocks=3, **o),
    "K-M": lambda **o: models.resnet_km(3, 2, channels=8, **o),
    "resnext": lambda **o: models.resnext50(blocks=(1, 3), groups=2, **o),
    "small": lambda **o: models.small_network(depth=3, **o),
    "points": lambda **o: models.points_network(depth=3, **o),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("solver", ["euler", "rk4", "bs23", get_tableau("bs23").forwarding("order2")], ids=str)
def test_the_step_size_is_one_whatever_the_method(name, solver):
    build = FACTORIES[name]
    with torch.device("meta"):
        assert set(build(solver=solver).h) == {1.0}
        assert set(build(solver=solver, h=0.25).h) == {0.25}
        for flow in build(solver=solver, total_time=2.0).flows:
            assert flow.total_time == pytest.approx(2.0)


@pytest.mark.parametrize("size", [28, 32, 33])
def test_resnet9_takes_any_size(size):
    net = models.resnet9(3, 7, features=8, depth=2, size=size, solver="bs23", total_time=1.0, norm="group")
    assert net(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_normalize_is_the_formula():
    normalize = models.Normalize([0.5, 0.25], [0.1, 0.2])
    x = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(x[:, 0] - 0.5) / 0.1, (x[:, 1] - 0.25) / 0.2], 1)
    torch.testing.assert_close(normalize(x), expected)
    for mean, std in (([0.0], [0.0]), ([math.nan], [1.0]), ([0.0, 0.0], [1.0])):
        with pytest.raises(ValueError, match="one finite entry per channel and std > 0"):
            models.Normalize(mean, std)


def test_images_that_cannot_be_normalized_are_named():
    net = models.small_network(normalize=models.Normalize([0.5], [0.25]))
    with pytest.raises(TypeError, match=r"floating pixels in \[0, 1\], got torch.uint8"):
        net(torch.full((2, 1, 8, 8), 128, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x must have 3 channels.*got shape \(2, 1, 4, 4\)"):
        models.Normalize([0.5] * 3, [0.25] * 3)(torch.rand(2, 1, 4, 4))


def test_small_ones_train():
    order2 = get_tableau("bs23").forwarding("order2")  # reads every stage
    points = models.points_network(depth=2, solver=order2, readout="ensemble", stage_fields="untied")
    for net, x in ((models.small_network(features=8, depth=2), torch.rand(4, 1, 8, 8)), (points, torch.randn(4, 2))):
        F.cross_entropy(net(x), torch.tensor([0, 1, 0, 1])).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


def count(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def test_parameters_are_those_of_the_literature_but_for_what_changes_the_channels():
    """Each block here keeps its channels; in the originals the first one of a flow changes them."""
    convolutions = [9 * a * b for a, b in ((16, 16), (32, 32))]  # ours minus theirs: (c, c) for (c / 2, c), 3 x 3
    he = 1_727_962  # Table 6 of He et al. (2016), 1.7 M: shortcuts of no weights, a norm behind every convolution
    ours = he + sum(2 * c for c in convolutions) + 16 * 32 + 32 * 64 - 2 * 16
    assert count(models.resnet110) == ours == 1_753_530

    zagoruyko = 36_479_194  # WRN-28-10, 36.5 M; there the norm of a changing block is that of its input
    changes = ((16, 160), (160, 320), (320, 640))
    ours = zagoruyko + sum(9 * (b - a) * b + 2 * (b - a) for a, b in changes)
    assert count(models.wide_resnet) == ours == 38_991_802

    torchvision = pytest.importorskip("torchvision").models
    theirs = count(torchvision.resnext50_32x4d)
    stem = 27 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 - (49 * 3 * 64 + 2 * 64)
    first = sum((b - a) * hidden for a, b, hidden in ((64, 256, 128), *((c, 2 * c, c) for c in (256, 512, 1024))))
    assert count(lambda: models.resnext50(classes=1000)) == theirs + stem + first == 26_439_688


@pytest.mark.parametrize(("K", "M"), [(1, 3), (2, 7), (5, 2)])
def test_parameters_of_modules_of_blocks(K, M):
    def blocks(c):
        return 2 * (9 * c * c + 2 * c)

    wide = K // 2 * M * blocks(512) + 256 * 512 if K > 1 else 0
    c = 512 if K > 1 else 256
    expected = 27 * 256 + 512 + (K + 1) // 2 * M * blocks(256) + wide + 2 * c + 10 * c + 10
    assert count(lambda: models.resnet_km(K, M)) == expected
    assert models.resnet_km(K, M, channels=8).depth == K * M


@pytest.mark.parametrize(("name", "depth"), [("resnet110", 9), ("wide", 9), ("resnext", 4), ("K-M", 6)])
@pytest.mark.parametrize("options", [{}, {"norm": None}, {"solver": "bs23", "total_time": 1.0, "norm": "group"}])
def test_every_block_is_a_step_and_every_weight_learns(name, depth, options):
    net = FACTORIES[name](**options)
    assert net.depth == depth
    y, records = net.record(torch.rand(3, 3, 16, 16), action=measures.action)
    assert records["action"].shape == (depth, 3)
    assert records.starts[0] == 0
    y.square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_depths():
    with torch.device("meta"):
        assert [net.depth for net in (models.resnet110(), models.wide_resnet(), models.resnext50())] == [54, 12, 16]


def test_residues_and_states_of_resnext_are_not_negative():
    net = models.resnext50(blocks=(2, 1), groups=2)
    for step in net.steps(torch.rand(2, 3, 16, 16)):
        assert (step.residue >= 0).all()
        assert (step.x0 >= 0).all()


def test_the_first_block_of_resnet110_begins_with_its_convolution():
    first, second = (block.fields[0] for block in models.resnet110(blocks=2).flows[0].blocks)
    x = -torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(first(0.0, x), first.conv2(first.norm2(first.conv1(x)).relu()))
    assert len(list(second.parameters())) == len(list(first.parameters())) + 2


def test_errors():
    with pytest.raises(ValueError, match="K and M must be at least 1"):
        models.resnet_km(0, 1)
