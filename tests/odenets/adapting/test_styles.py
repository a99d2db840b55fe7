"""Networks in styles of many authors: what ``adapt`` finds and records is what their authors would count."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from odenets import adapt, measures
from tests.odenets.adapting.styles import STYLES
from tests.odenets.adapting.styles.skeleton import Around
from tests.odenets.adapting.styles.structures import Plain
from tests.odenets.checks import unchanged


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def clones(inputs):
    """For networks that change their inputs in place."""
    return tuple(x.clone() for x in inputs)


def example_of(inputs):
    return inputs[0].clone() if len(inputs) == 1 else clones(inputs)


def by_hand(network, inputs, seed=5):
    torch.manual_seed(seed)
    return copy.deepcopy(network).expected(*clones(inputs))


def called(network, inputs, seed=5):
    torch.manual_seed(seed)
    return network(*clones(inputs))


def recorded(adapted, inputs, seed=5):
    torch.manual_seed(seed)
    return adapted.record(*clones(inputs), action=measures.action)


def assert_same_output(one, other):
    """To the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_steps(style, adapted, inputs, expected):
    """The steps and records of a pass are the referee's."""
    steps = adapted.steps(*clones(inputs))
    torch.manual_seed(5)
    _, records = adapted.record(*clones(inputs), action=measures.action)
    assert len(steps) == len(expected)
    assert adapted.depth == len(expected)
    assert records["action"].shape == (len(expected), len(inputs[0]))
    names = adapted.names
    assert records.blocks == names
    for i, (hint, x0, x1) in enumerate(expected):
        assert hint in names[i]
        torch.testing.assert_close(steps[i].x0, x0)
        torch.testing.assert_close(steps[i].x1, x1)
        mean_square = style.mean_square(x0.double(), x1.double(), len(inputs[0]))
        loose = {"rtol": 0.05, "atol": 1e-3} if x0.dtype.itemsize < 4 else {}
        torch.testing.assert_close(
            records["action"][i].double(), mean_square, check_dtype=False, **(loose or {"rtol": 1e-4, "atol": 1e-6})
        )


@pytest.mark.parametrize("training", [False, True])
def test_a_referee_computes_what_the_network_computes(style, training):
    plain = style.network().train(training)
    x = style.batch()
    expected, steps = by_hand(plain, x)
    torch.testing.assert_close(called(plain, x), expected)
    assert len(steps) > 0 or training
    for _, x0, x1 in steps:
        assert x0.shape == x1.shape
        assert not torch.equal(x0, x1)


def test_the_steps_are_those_that_the_author_counts(style):
    network = style.network().eval()
    x = style.batch()
    expected, steps = by_hand(network, x)
    with unchanged(network):
        adapted = adapt(network, example_of(x))
    assert adapted.depth == len(steps)
    torch.testing.assert_close(called(adapted, x), expected)
    assert_steps(style, adapted, x, steps)


def test_without_an_example_they_are_found_at_the_first_batch(style):
    network = style.network().eval()
    x = style.batch()
    adapted = adapt(network)
    with pytest.raises(ValueError, match="example"):
        _ = adapted.depth
    output, records = recorded(adapted, x)
    expected, steps = by_hand(network, x)
    torch.testing.assert_close(output, expected)
    assert records["action"].shape == (len(steps), len(x[0]))
    assert_steps(style, adapted, x, steps)


@pytest.mark.parametrize(("batch", "size"), [(3, 8), (1, 8), (2, 12)])
def test_the_steps_of_other_batches_are_recorded_too(style, batch, size):
    if size != 8 and not style.sizes:
        pytest.skip("takes one size")
    network = style.network().eval()
    adapted = adapt(network, example_of(style.batch()))
    x = style.batch(batch, size)
    with torch.no_grad():
        expected, steps = by_hand(network, x)
        torch.testing.assert_close(adapted(*clones(x)), expected)
        assert_steps(style, adapted, x, steps)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(style, training):
    plain = style.network().train(training)
    network, x = copy.deepcopy(plain), style.batch()
    adapted = adapt(network, example_of(x), partial=not style.steady)
    assert network.training == training
    output = called(plain, x)
    sum(leaf.float().square().sum() for leaf in tree_leaves(output)).backward()
    before = copy.deepcopy(dict(plain.named_buffers()))
    for run in (called, lambda *a: recorded(*a)[0]):
        network.load_state_dict(style.network().state_dict())
        network.zero_grad()
        same = run(adapted, x)
        assert_same_output(same, output)
        sum(leaf.float().square().sum() for leaf in tree_leaves(same)).backward()
        for (name, p), q in zip(plain.named_parameters(), network.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        assert_same_output(dict(network.named_buffers()), before)


@pytest.mark.parametrize("training", [False, True])
def test_records_are_differentiated_as_the_author_would(style, training):
    if style.dtype.itemsize < 4:
        pytest.skip("to rounding of float32")
    network, x = style.network().train(training), style.batch()
    referee = copy.deepcopy(network)
    adapted = adapt(network, example_of(x), partial=not style.steady)
    torch.manual_seed(5)
    _, steps = referee.expected(*clones(x))
    sum(style.mean_square(x0, x1, len(x[0])).sum() for _, x0, x1 in steps).backward()
    _, records = recorded(adapted, x)
    assert len(records["action"]) == len(steps)
    records["action"].sum().backward()
    for (name, p), q in zip(referee.named_parameters(), network.parameters(), strict=True):
        zero = torch.zeros_like(p)
        grads = [zero if one.grad is None else one.grad for one in (p, q)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_steps_that_are_not_always_taken_are_accepted_only_as_partial():
    """Stochastic depth by ``if``."""
    style = STYLES["stochastic depth by if"]
    network, x = style.network().train(), style.batch()
    steps = {seed: len(by_hand(network, x, seed)[1]) for seed in range(8)}
    assert {1, 3} <= set(steps.values())
    adapted, accepting = adapt(network, *x), adapt(copy.deepcopy(network), *x, partial=True)
    for seed, count in steps.items():
        assert len(recorded(accepting, x, seed)[1]["action"]) == count
        if count == 3:
            recorded(adapted, x, seed)
        else:
            with pytest.raises(ValueError, match=r"blocks\.[02](.|\n)*partial=True"):
                recorded(adapted, x, seed)


@pytest.mark.parametrize("name", ["F.relu(x + branch)", "x += branch", "transformer", "three inputs"])
def test_under_autocast_outputs_stay_and_steps_are_the_referees(name):
    style = STYLES[name]
    network, x = style.network().eval(), style.batch()
    adapted = adapt(network, example_of(x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_same_output(recorded(adapted, x)[0], called(network, x))
        assert_steps(style, adapted, x, by_hand(network, x)[1])


@pytest.mark.parametrize("name", ["x += branch", "top level", "language model", "latents", "scripted and traced"])
def test_in_inference_mode_steps_are_recorded_too(name):
    style = STYLES[name]
    network, x = style.network().eval(), style.batch()
    adapted = adapt(network)
    with torch.inference_mode():
        torch.testing.assert_close(recorded(adapted, x)[0], called(network, x))
        assert_steps(style, adapted, x, by_hand(network, x)[1])


# -- bad input --------------------------------------------------------------------------------------------------------
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
    assert_same_output([step.x1 for step in adapted.steps(IMAGE)], [first, chain[2:4](first)])


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
    with unchanged(network), pytest.raises((TypeError, ValueError), match="example"):
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

    def forward(self, x):
        if x.mean() > self.limit:
            return x + self.branch(x)
        return self.branch(x)


@pytest.mark.parametrize("limit", [-100.0, 100.0])
def test_control_flow_that_hangs_on_the_data_is_refused_with_the_place(limit):
    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), Branching(), Plain()], 8, (2, 3))
    network.blocks[1].limit = limit
    with pytest.raises(ValueError, match=r"blocks\.1(.|\n)*blocks="):
        adapt(network, IMAGE)
    adapted = adapt(network, blocks=["blocks.0", "blocks.2"])
    assert adapted.record(IMAGE, action=measures.action)[1]["action"].shape == (2, 2)


def test_numbers_read_without_control_flow_are_no_matter():
    class Checked(Plain):
        def forward(self, x):
            assert torch.isfinite(x).all()
            self.last_mean = x.mean().item()
            return x + self.branch(x)

    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), Checked()], 8, (2, 3))
    assert adapt(network, IMAGE).depth == 2


class AlwaysDropped(Plain):
    def forward(self, x):
        return x + F.dropout(self.branch(x))  # in eval mode too


def test_outputs_that_differ_between_two_calls_are_refused():
    network = Around(nn.Conv2d(3, 8, 3, padding=1), [Plain(), AlwaysDropped()], 8, (2, 3))
    with unchanged(network), pytest.raises(ValueError, match=r"random|differ"):
        adapt(network, IMAGE)


def test_an_adapted_model_is_not_adapted():
    with pytest.raises(TypeError, match="records its steps"):
        adapt(adapt(STYLES["nested"].network(), IMAGE), IMAGE)


def test_one_model_is_adapted_twice_over():
    style = STYLES["x += branch"]
    network, x = style.network().eval(), style.batch()
    _, steps = by_hand(network, x)
    adapted = [adapt(network, *x), adapt(network)]
    for one in (*adapted, *adapted):
        assert_steps(style, one, x, steps)


def test_a_lightning_module_is_a_module():
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = STYLES["nested"].network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    style, network = STYLES["nested"], Classifier().eval()
    _, steps = by_hand(network.net, style.batch())
    assert_steps(style, adapt(network, *style.batch()), style.batch(), steps)


def test_a_module_without_a_forward_pass_is_refused():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = STYLES["nested"].network()

    with pytest.raises((TypeError, ValueError), match=r"forward"):
        adapt(Trained(), IMAGE)
