"""Models and examples that ``adapt`` refuses, and what it tells."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import adapt, measures
from odenets.adapting.calls import inputs_and_measures
from tests.odenets.adapting.styles import STYLES
from tests.odenets.adapting.styles.skeleton import Around
from tests.odenets.adapting.styles.structures import Plain
from tests.odenets.checks import unchanged

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(11, 8, 3, 1, 1), nn.Linear(19, 5)

    def forward(self, x):
        for layer in (self.one, self.two):
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x.mean((2, 3)))


def test_a_network_that_only_concatenates_is_refused_for_this_reason():
    with pytest.raises(ValueError, match="concatenat"):
        adapt(Dense(), IMAGE)
    with pytest.raises(ValueError, match="concatenat"):
        adapt(Dense()).record(IMAGE, action=measures.action)


def test_a_chain_is_refused_with_the_remedy():
    chain = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="displacement=True"):
        adapt(chain, IMAGE)
    adapted = adapt(chain, IMAGE, displacement=True)
    first = chain[:2](IMAGE)
    steps = adapted.steps(IMAGE)
    torch.testing.assert_close([step.x1 for step in steps], [first, chain[2:4](first)], rtol=0, atol=0)


@pytest.mark.parametrize("linear", [nn.Linear(8, 5), nn.Sequential(nn.Flatten(), nn.Linear(192, 5))])
def test_a_model_of_linear_maps_is_refused(linear):
    with pytest.raises(ValueError, match="addition"):
        adapt(linear, IMAGE)


@pytest.mark.parametrize(
    "example",
    [
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 3),
        torch.randint(9, (2, 3, 8, 8)),
        (IMAGE, IMAGE),
        (),
        {"image": IMAGE},
        IMAGE.double(),
        IMAGE[:0],
        torch.full_like(IMAGE, torch.nan),
    ],
    ids=["channels", "dimensions", "integers", "two", "none", "keyword", "float64", "empty", "nan"],
)
def test_an_example_that_the_model_does_not_take_is_named(example):
    network = STYLES["torch.add(branch, x)"].network()
    with unchanged(network), pytest.raises((TypeError, ValueError), match=r"example|finite|at least one sample"):
        adapt(network, example)
    adapted = adapt(network, IMAGE)  # no hook or mode is left
    assert adapted.depth == 2


@pytest.mark.parametrize("names", [["blocks.0"], "blocks.0", ("blocks.0", "blocks.1"), {"blocks.0": None}, Plain])
def test_names_of_blocks_are_no_example(names):
    network = STYLES["nested"].network()
    with pytest.raises(TypeError, match="blocks="):
        adapt(network, names)


class Branching(Plain):
    """Whether it takes a step hangs on the values of its input."""

    limit = 0.0

    def forward(self, x):
        if x.mean() > self.limit:
            return x + self.branch(x)
        return self.branch(x)


@pytest.mark.parametrize("limit", [-100.0, 100.0])
def test_a_pass_that_data_lead_another_way_is_refused_with_the_place(limit):
    """Also where both ways go through the same modules, as they do here."""
    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), Branching(), Plain()], 8, (2, 3))
    network.blocks[1].limit = limit
    adapted = adapt(network, IMAGE)
    assert adapted.depth == (3 if limit < 0 else 2)
    adapted.record(2 * IMAGE, action=measures.action)
    network.blocks[1].limit = -limit
    with pytest.raises(ValueError, match=r"test_refusals.py:\d+ in 'blocks\.1'(.|\n)*blocks="):
        adapted.record(IMAGE, action=measures.action)
    named = adapt(network, blocks=["blocks.0", "blocks.2"])
    assert named.record(IMAGE, action=measures.action)[1]["action"].shape == (2, 2)


class Checked(Plain):
    def forward(self, x):
        assert torch.isfinite(x).all()
        return x + self.branch(x)


class Noted(Plain):
    def forward(self, x):
        self.mean = self.read(x.detach().mean())
        return x + self.branch(x)


@pytest.mark.parametrize("read", [torch.Tensor.item, float, torch.Tensor.tolist, torch.Tensor.numpy])
def test_numbers_that_are_read_are_warned_of_with_the_place(read):
    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), Noted()], 8, (2, 3))
    network.blocks[1].read = read
    with pytest.warns(UserWarning, match=r"test_refusals.py:\d+ in 'blocks\.1'"):
        adapted = adapt(network, IMAGE)
    assert adapted.depth == 2


class AlwaysDropped(Plain):
    def forward(self, x):
        return x + F.dropout(self.branch(x))  # in eval mode too


def test_outputs_that_differ_between_two_calls_are_refused():
    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), AlwaysDropped()], 8, (2, 3))
    with unchanged(network), pytest.raises(ValueError, match=r"random|differ"):
        adapt(network, IMAGE)


def test_inputs_of_a_model_without_a_signature_are_all_that_is_no_measure():
    class Scripted(nn.Module):
        forward = max  # as that of a script, which inspect knows nothing of

    named = {"x": IMAGE, "action": measures.action}
    assert inputs_and_measures(Scripted(), named) == ({"x": IMAGE}, {"action": measures.action})


def test_an_input_that_the_model_does_not_take_is_named():
    adapted = adapt(STYLES["nested"].network(), IMAGE)
    with pytest.raises(TypeError, match="the model takes no input 'image', which is a tensor; its inputs are x"):
        adapted.record(image=IMAGE)


def test_an_adapted_model_is_not_adapted():
    with pytest.raises(TypeError, match="records its steps"):
        adapt(adapt(STYLES["nested"].network(), IMAGE), IMAGE)


def test_a_module_without_a_forward_pass_is_refused():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = STYLES["nested"].network()

    with pytest.raises((TypeError, ValueError), match=r"forward"):
        adapt(Trained(), IMAGE)
