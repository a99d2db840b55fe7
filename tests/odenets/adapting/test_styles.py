"""Networks in styles of many authors: what ``adapt`` finds and records is what their authors would count."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from odenets import adapt, measures
from tests.odenets.adapting.styles import STYLES
from tests.odenets.checks import unchanged

PARTIAL = pytest.mark.filterwarnings(
    "ignore:blocks are called in another order or number"
)  # where partial=True is given


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


def assert_near(one, other, rtol=1e-4, atol=1e-5):
    """To rounding; the referee adds in another order, which shows in half precision."""
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        half = {"rtol": 0.03, "atol": 0.02}
        torch.testing.assert_close(a, b, **(half if b.dtype.itemsize < 4 else {"rtol": rtol, "atol": atol}))


def assert_steps(style, adapted, inputs, expected):
    """The steps and records of a pass are the referee's."""
    steps, samples = adapted.steps(*clones(inputs)), len(inputs[0])
    records = recorded(adapted, inputs)[1]
    assert len(steps) == adapted.depth == len(expected)
    assert records["action"].shape == (len(expected), samples)
    assert records.blocks == adapted.names
    for (hint, x0, x1), name, step, action in zip(expected, adapted.names, steps, records["action"], strict=True):
        assert hint in name
        assert_near((step.x0, step.x1), (style.of_samples(x0, samples), style.of_samples(x1, samples)))
        mean_square = style.mean_square(x0.float(), x1.float(), samples)
        assert_near(action.to(x0.dtype), mean_square.to(x0.dtype))


def test_the_steps_are_those_that_the_author_counts(style):
    """Also those of a single sample, after an example of two."""
    network, example = style.network().eval(), example_of(style.batch())
    with unchanged(network):
        adapted = adapt(network, example)
    for x in (style.batch(), style.batch(1)):
        expected, steps = by_hand(network, x)
        assert adapted.depth == len(steps) > 0
        assert_near(called(adapted, x), expected)
        assert_steps(style, adapted, x, steps)


def test_without_an_example_they_are_found_at_the_first_batch(style):
    """And are recorded of other batches after it, larger or longer ones."""
    network = style.network().eval()
    adapted = adapt(network)
    with pytest.raises(ValueError, match="first batch"):
        _ = adapted.depth
    with torch.no_grad():
        for x in (style.batch(3), style.batch(2, 12 if style.sizes else 8)):
            expected, steps = by_hand(network, x)
            assert_near(recorded(adapted, x)[0], expected)
            assert_steps(style, adapted, x, steps)


@pytest.mark.parametrize("style", STYLES, indirect=True)
@PARTIAL
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_network(style, training):
    """To the last bit, with the same random state, of a call (in eval mode) and of ``record``."""
    plain, network, x = style.network().train(training), style.network().train(training), style.batch()
    adapted = adapt(network, example_of(x), partial=not style.steady)
    assert network.training == training
    output = called(plain, x)
    sum(leaf.float().square().sum() for leaf in tree_leaves(output)).backward()
    before = copy.deepcopy(dict(plain.named_buffers()))
    for run in (called, lambda *a: recorded(*a)[0])[training:]:
        network.zero_grad()
        same = run(adapted, x)
        assert_same_output(same, output)
        sum(leaf.float().square().sum() for leaf in tree_leaves(same)).backward()
        for (name, p), q in zip(plain.named_parameters(), network.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
        assert_same_output(dict(network.named_buffers()), before)


@pytest.mark.parametrize("style", STYLES, indirect=True)
@PARTIAL
def test_records_in_training_and_their_gradients_are_the_referees(style):
    referee, network, x = style.network().train(), style.network().train(), style.batch()
    adapted = adapt(network, example_of(x), partial=not style.steady)
    torch.manual_seed(5)
    expected, steps = referee.expected(*clones(x))
    actions = torch.stack([style.mean_square(x0, x1, len(x[0])) for _, x0, x1 in steps])
    output, records = recorded(adapted, x)
    assert_near(output, expected)
    assert_near(records["action"].to(actions.dtype), actions)
    if style.dtype.itemsize < 4:
        return  # sums of gradients are rounded too much
    actions.sum().backward()
    records["action"].sum().backward()
    for p, q in zip(referee.parameters(), network.parameters(), strict=True):
        zero = torch.zeros_like(p)
        assert_near(zero if q.grad is None else q.grad, zero if p.grad is None else p.grad, rtol=1e-3, atol=1e-4)


@PARTIAL
def test_steps_that_are_not_always_taken_are_accepted_only_as_partial():
    style = STYLES["layers dropped at random"]
    network, x = style.network().train(), style.batch()
    steps = {seed: count for seed in range(20) if (count := len(by_hand(network, x, seed)[1]))}
    assert set(steps.values()) == {1, 2, 3}
    adapted, accepting = adapt(network, *x), adapt(copy.deepcopy(network), *x, partial=True)
    for seed, count in steps.items():
        assert len(recorded(accepting, x, seed)[1]["action"]) == count
        if count == 3:
            recorded(adapted, x, seed)
        else:
            with pytest.raises(ValueError, match=r"not called(.|\n)*partial=True"):
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
        assert_near(recorded(adapted, x)[0], called(network, x))
        assert_steps(style, adapted, x, by_hand(network, x)[1])


def test_one_model_is_adapted_twice_over():
    style = STYLES["x += branch"]
    network, x = style.network().eval(), style.batch()
    _, steps = by_hand(network, x)
    adapted = [adapt(network, *x), adapt(network)]
    for one in (*adapted, *adapted):
        assert_steps(style, one, x, steps)


@pytest.mark.slow  # to load it
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
