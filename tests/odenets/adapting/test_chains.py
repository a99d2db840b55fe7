import pytest
import torch
from torch import nn

from odenets import measures
from odenets.adapting import adapt
from tests.odenets.adapting.models import X, small_resnet, states_of, tv


@pytest.mark.parametrize(("name", "depth"), [("vgg11", 5), ("vgg16_bn", 10), ("vgg19", 13), ("alexnet", 2)])
def test_number_of_layers(name, depth):
    with torch.device("meta"):
        adapted = adapt(getattr(tv, name)(), displacement=True)
    assert adapted.depth == adapted.evaluations == len(adapted.names) == depth
    assert adapted.h == (1.0,) * depth


def test_plain_networks_step_by_the_layers_that_keep_the_shape():
    model = nn.Sequential()
    model.features = tv.vgg.make_layers([4, 4, "M", 8, 8, 8, "M"], batch_norm=True)
    model.flatten = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.classifier = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 5))
    adapted = adapt(model.eval(), X, displacement=True)
    assert adapted.names == (
        "features.3:features.5", "features.10:features.12", "features.13:features.15", "classifier.2:classifier.3",
    )  # fmt: skip
    with torch.no_grad():
        _, records = adapted.record(X, action=measures.action)
        for name, values in zip(adapted.names, records["action"], strict=True):
            x0, x1 = states_of(model, *name.split(":"))
            torch.testing.assert_close(values, (x1 - x0).square().flatten(1).mean(1))
    assert records.starts == (0, 1, 3)


def test_plain_layers_are_told_from_those_that_change_the_shape():
    same = nn.Conv2d(4, 4, 5, padding="same", dilation=2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), same, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Sequential(
            nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False), nn.GroupNorm(2, 4), nn.SiLU()), nn.ReLU(),
        nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Flatten(), nn.LazyLinear(3), nn.Linear(3, 3),
    )  # fmt: skip
    assert adapt(model, displacement=True).names == ("1", "4.0:4.2", "6", "10")
    model(X)
    assert adapt(model, displacement=True).record(X, action=measures.action)[1]["action"].shape == (4, 2)


def test_layers_may_share_an_activation():
    """One module that stands at several places (vision#3802)."""
    activation = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4), activation, nn.Linear(4, 2))
    own = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4])
    x = torch.randn(3, 4)
    both = [adapt(one, displacement=True).record(x, action=measures.action) for one in (model, own)]
    (output, records), (expected, others) = both
    assert records.blocks == others.blocks == ("0:1", "2:3")
    torch.testing.assert_close((output, records["action"]), (expected, others["action"]), rtol=0, atol=0)


def test_a_chain_steps_where_that_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"chain of layers, 1 of which keep the shape: .*displacement=True"):
        adapt(model, torch.randn(2, 4))
    with pytest.raises(ValueError, match="displacement=True takes the layers of a chain, and ResNet is none"):
        adapt(small_resnet(), displacement=True)
    with pytest.raises(ValueError, match=r"displacement=True .* and blocks names others: give one of them"):
        adapt(model, blocks=["0"], displacement=True)
