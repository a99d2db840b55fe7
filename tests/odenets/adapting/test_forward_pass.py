import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from odenets import measures
from odenets.adapting import adapt
from odenets.analysis.memory import measure_memory
from tests.odenets.adapting.models import SMALL, TINY, Repeated, X, small_resnet
from tests.odenets.checks import assert_same_gradients
from tests.odenets.networks import Calling, Unit

BUFFER = torch.empty(2, 3, 8, 8)
ADDITIONS = {"new": torch.add, "in place": torch.Tensor.add_, "buffer": lambda x, r: torch.add(x, r, out=BUFFER)}


def branchings(addition, after=None):
    """Three residual blocks, how they add, and what is called after each."""
    torch.manual_seed(2)
    parts = [nn.Conv2d(3, 3, 1)]
    for _ in range(3):
        branch = nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))
        parts.append(Calling(lambda m, x: ADDITIONS[addition](x, m.branch(x)), branch=branch))
        parts.append(Calling(lambda m, x: after(x)) if after else nn.Identity())
    return nn.Sequential(*parts)


QUANTITIES = {"action": measures.action, "cosine": measures.cosine, "displacement": measures.displacement}
NAMES = ["1", "3", "5"]


@pytest.mark.filterwarnings("ignore:the outputs of .* are changed in place")
@pytest.mark.parametrize(
    ("addition", "after", "mode"),
    [
        *[("in place", None, mode) for mode in ("gradients", "no_grad", "inference", "compiled")],
        *[("new", F.relu_, mode) for mode in ("gradients", "no_grad", "inference")],
        *[("buffer", None, mode) for mode in ("no_grad", "inference")],
        *[("in place", F.relu_, mode) for mode in ("no_grad", "inference")],
    ],
)
def test_records_and_steps_are_those_of_the_model_that_changes_nothing_in_place(addition, after, mode):
    adapted = adapt(branchings(addition, after), blocks=NAMES)
    plain = adapt(branchings("new", after and F.relu), blocks=NAMES)
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    record = torch.compile(adapted.record, backend="eager") if mode == "compiled" else adapted.record
    for _ in range(2):  # what is learned in one pass serves the next
        with context():
            output, records = record(TINY, **QUANTITIES)
            expected, values = plain.record(TINY, **QUANTITIES)
            torch.testing.assert_close(output, expected)
            for name in QUANTITIES:
                torch.testing.assert_close(records[name], values[name], atol=1e-5, rtol=1e-4)
            if mode != "compiled":
                for step, unchanged in zip(adapted.steps(TINY), plain.steps(TINY), strict=True):
                    for state in ("x0", "x1", "residue"):
                        torch.testing.assert_close(getattr(step, state), getattr(unchanged, state))


@pytest.mark.parametrize(("addition", "after"), [("in place", None), ("new", F.relu_)])
@pytest.mark.filterwarnings("ignore:the outputs of .* are changed in place")
def test_gradients_are_those_of_the_model_that_changes_nothing_in_place(addition, after):
    adapted, plain = (
        adapt(branchings(addition, after), blocks=NAMES),
        adapt(branchings("new", after and F.relu), blocks=NAMES),
    )
    adapted.record(TINY, action=measures.action)  # from which it is learned what is changed
    for network in (adapted, plain):
        output, records = network.record(TINY, action=measures.action)
        (output.square().mean() + records["action"].sum()).backward()
    assert_same_gradients(adapted, plain)


def test_outputs_changed_in_place_after_their_block_are_told_where_gradients_are_enabled():
    adapted = adapt(branchings("new", F.relu_), blocks=NAMES)
    with pytest.warns(UserWarning, match=r"outputs of 3 blocks \(1, ...\) are changed in place after them"):
        adapted.record(TINY, action=measures.action)
    adapted.record(TINY, action=measures.action)[1]["action"].sum().backward()


def test_a_block_that_returns_its_input_does_not_move_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU(True))
    adapted = adapt(model, blocks=["1", "2"])
    for _ in range(2):
        with torch.no_grad():
            records, start = adapted.record(TINY, action=measures.action)[1], model[0](TINY)
        assert (records["action"][0] == 0).all()
        expected = (start.relu() - start).square().flatten(1).mean(1)
        torch.testing.assert_close(records["action"][1], expected)


def test_nothing_is_copied_once_it_is_known_that_nothing_is_changed():
    adapted = adapt(small_resnet().eval())
    with torch.no_grad():
        adapted.record(SMALL, action=measures.action)
        before = measure_memory(lambda: adapted.model(SMALL)).peak
        assert measure_memory(lambda: adapted.record(SMALL, action=measures.action)).peak < before + 2 * 64 * 8 * 8 * 4


def test_nothing_is_kept_when_nothing_is_measured():
    model = small_resnet()
    adapted = adapt(copy.deepcopy(model))
    adapted(X)
    assert measure_memory(lambda: adapted(X)) == measure_memory(lambda: model(X))
    with torch.no_grad():
        plain = measure_memory(lambda: model(X))
        measured = measure_memory(lambda: adapted.record(X, action=measures.action))
        steps = measure_memory(lambda: adapted.steps(X))
    largest = 4 * 64 * 16 * 16 * 2
    assert measured.peak <= plain.peak + 3 * largest
    assert measured.left < steps.left / 100


def test_rows_come_in_the_order_in_which_blocks_are_called():
    adapted = adapt(Calling(lambda m, x: m.a(m.b(m.a(x))), b=Unit(3, 3), a=Unit(3, 3)), blocks=["a", "b"])
    assert adapted.names == ("b", "a")
    assert adapted.record(X, action=measures.action)[1]["action"].shape == (3, 2)
    assert adapted.names == ("a call 0", "b", "a call 1")


def test_every_call_of_a_block_counts():
    adapted = adapt(Repeated(3), blocks=["block", "other"])
    records = adapted.record(TINY, action=measures.action)[1]
    assert records["action"].shape == (4, 2)
    assert adapted.depth == adapted.evaluations == len(adapted.steps(TINY)) == 4
    assert adapted.h == (1.0,) * 4
    assert adapted.names == records.blocks == ("block call 0", "block call 1", "block call 2", "other")
    assert "4 steps" in repr(adapted)


def test_blocks_that_are_left_out_are_refused_unless_that_is_accepted():
    with pytest.raises(ValueError, match="1 of 2 blocks are not called: other; partial=True accepts it"):
        adapt(Repeated(2, both=False), blocks=["block", "other"]).record(TINY, action=measures.action)
    adapted = adapt(Repeated(2, both=False), blocks=["block", "other"], partial=True)
    with pytest.warns(UserWarning, match="the rows of records are the steps of this pass"):
        adapted.record(TINY, action=measures.action)
    assert adapted.names == ("block call 0", "block call 1")
    adapted.record(TINY, action=measures.action)


def test_another_number_of_calls_is_refused_unless_it_is_accepted():
    for partial in (False, True):
        adapted = adapt(Repeated(2), blocks=["block", "other"], partial=partial)
        adapted.record(TINY, action=measures.action)
        adapted.model.times = 1
        if partial:
            with pytest.warns(UserWarning, match="called in another order or number than before"):
                records = adapted.record(TINY, action=measures.action)[1]
            assert len(records["action"]) == adapted.depth == 2
        else:
            with pytest.raises(ValueError, match="in another order or number than before, 2 steps for 3: partial=True"):
                adapted.record(TINY, action=measures.action)


def test_a_branch_that_is_not_called_is_told_from_a_block_that_is_left_out():
    block = Calling(
        lambda m, x: torch.relu(x + m.bn2(m.conv1(x))),
        conv1=nn.Conv2d(3, 3, 1),
        shortcut=None,
        bn2=nn.InstanceNorm2d(3),
    )
    adapted = adapt(nn.Sequential(nn.Conv2d(3, 3, 1), block), residue="branch")
    assert (adapted.record(TINY, action=measures.action)[1]["action"] > 0).all()
    block.function = lambda m, x: x
    assert (adapted.record(TINY, action=measures.action)[1]["action"] == 0).all()
    block.function = lambda m, x: x + m.conv1(x)
    with pytest.raises(ValueError, match=r"does not call its branch '1.bn2' in this pass: .*displacement"):
        adapted.record(TINY, action=measures.action)


def test_checkpointing_that_takes_the_gradients_is_told():
    model = Calling(lambda m, x: checkpoint(m.block, x, use_reentrant=True), block=Unit(3, 3))
    adapted = adapt(model, blocks=["block"])
    with pytest.warns(UserWarning, match=r"'block' is computed without gradients, .* use_reentrant=True"):
        adapted.record(TINY.clone().requires_grad_(), action=measures.action)


def test_a_block_may_change_in_place_what_it_projects():
    """Its state is the output of the projection, of what has been changed."""
    block = Calling(lambda m, x: torch.relu_(x).mean() + m.shortcut(x), shortcut=nn.Conv2d(3, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), block)
    (step,) = adapt(model, blocks={"1": "1.shortcut"}).steps(TINY)
    x = model[0](TINY).relu()
    torch.testing.assert_close((step.x0, step.residue), (block.shortcut(x), x.mean().expand_as(step.x0)))


def test_the_first_tensor_of_what_a_block_returns_is_its_state():
    block = Calling(lambda m, x: {"states": (x + 1, x), "more": None})
    model = Calling(lambda m, x: m.block(x)["states"][0], block=block)
    (step,) = adapt(model, blocks=["block"]).steps(TINY)
    torch.testing.assert_close(step.residue, torch.ones_like(TINY))


# A block that begins with a ReLU in place adds to another state than its input.
OVERWRITING = adapt(
    nn.Sequential(nn.Conv2d(3, 3, 1), Calling(lambda m, x: torch.sin(torch.relu_(x)) + x)), blocks=["1"]
)
UNUSED = adapt(Calling(lambda m, x: x, unused=nn.Linear(2, 2)), blocks=["unused"])
FOLDED = adapt(Calling(lambda m, x: m.block(x[None])[0], block=nn.ReLU()), blocks=["block"])
NOTHING = adapt(Calling(lambda m, x: m.block(x) or x, block=Calling(lambda m, x: None)), blocks=["block"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: adapt(small_resnet(), blocks={"layer2.0": None})(X),
            ValueError,
            "'layer2.0' changes the shape .* shortcut",
        ),
        (lambda: adapt(small_resnet())(torch.full((1, 3, 8, 8), torch.nan)), ValueError, "x must be finite"),
        (lambda: adapt(small_resnet())(X[:0]), ValueError, "at least one sample"),
        (lambda: adapt(small_resnet()).record(X, action=1), TypeError, "measure 'action' must be a function"),
        (lambda: adapt(small_resnet()).record(X, total=lambda step: step.x1.sum()), ValueError, "'total' must return"),
        (lambda: adapt(small_resnet()).record(X, error=measures.error), ValueError, "euler carries no embedded error"),
        (
            lambda: adapt(small_resnet(), blocks=["layer2.0:layer1.0"])(X),
            ValueError,
            "not called: layer2.0:layer1.0",
        ),
        (lambda: OVERWRITING(X), ValueError, "'1' changes its input in place: .* inplace=False"),
        (lambda: OVERWRITING.record(X, a=measures.action), ValueError, "changes its input in place"),
        (lambda: OVERWRITING.steps(X), ValueError, "changes its input in place"),
        (lambda: torch.inference_mode()(OVERWRITING.record)(X, a=measures.action), ValueError, "changes its input"),
        (lambda: UNUSED(X), ValueError, "1 of 1 blocks are not called: unused;"),
        (lambda: FOLDED(X), ValueError, r"states of shape \(1, 2.* for 2 samples"),
        (lambda: NOTHING(X), TypeError, "'block' must take and return a tensor, got NoneType"),
    ],
)
def test_what_cannot_be_recorded_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
