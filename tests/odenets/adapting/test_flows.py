"""Flows, neural ODEs and networks of them within a model; the referee is the same flow, run by hand on its input."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from odenets import ConvField, Flow, MLPField, Network, NeuralODE, Records, adapt, measures
from odenets.detection.features import Trajectory
from odenets.least_action import LeastAction
from odenets.measures import measure
from odenets.module_wise import split_into_modules
from odenets.training.objectives import CrossEntropy
from solvers import Tolerance
from tests.odenets.networks import Calling, Unit, Velocity

WIDTH = 4


class Block(nn.Module):
    """A residual block of vectors."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.branch(x)


def field(width=WIDTH):
    return MLPField(width)


FLOWS = {
    "euler": lambda: Flow(field, solver="euler", depth=3, h=1.0),
    "bs23": lambda: Flow(field, solver="bs23", depth=2),
    "shared": lambda: Flow(field(), solver="heun", depth=3, shared=True),
    "fixed": lambda: NeuralODE(field(), solver="rk4", steps=4),
    "adaptive": lambda: NeuralODE(field(), tolerance=Tolerance(rtol=1e-3)),
    "by sample": lambda: NeuralODE(field(), tolerance=Tolerance(rtol=1e-3), control="sample"),
    "backsolve": lambda: NeuralODE(field(), gradient="backsolve"),
    "checkpoint": lambda: NeuralODE(field(), gradient="checkpoint", steps=3),
    "network": lambda: Network(
        nn.Linear(WIDTH, 3),
        [Flow(lambda: field(3), depth=2), NeuralODE(field(3), steps=2)],
        nn.Linear(3, WIDTH),
        transitions=[nn.Tanh()],
    ),
}
NAMES = {
    "euler": ("blocks.0", "blocks.1", "blocks.2"),
    "bs23": ("blocks.0", "blocks.1"),
    "shared": ("blocks.0 call 0", "blocks.0 call 1", "blocks.0 call 2"),
    "fixed": ("step 0", "step 1", "step 2", "step 3"),
    "adaptive": ("all steps",),
    "by sample": ("all steps",),
    "backsolve": ("all steps",),
    "checkpoint": ("step 0", "step 1", "step 2"),
    "network": ("flows.0 blocks.0", "flows.0 blocks.1", "flows.1 step 0", "flows.1 step 1"),
}


def around(flow):
    """A model with a block, the flow, and another block."""
    return Calling(
        lambda m, x: m.head(m.last(m.flow(m.first(x)))),
        first=Block(),
        flow=flow,
        last=Block(),
        head=nn.Linear(WIDTH, 3),
    )


@pytest.fixture(params=FLOWS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return around(FLOWS[name]()).eval()


@pytest.fixture
def x():
    return torch.randn(5, WIDTH)


def by_hand(model, x, **chosen):
    """The steps of the parts, each on its own input."""
    before = model.first(x)
    after, records = model.flow.record(before, **chosen)
    parts = []
    for block, state in ((model.first, x), (model.last, after)):
        r = block(state) - state
        parts.append(Records({one: r.square().mean(1)[None] for one in chosen}))
    return Records.join([parts[0], records, parts[1]])


@pytest.mark.parametrize("example", [True, False])
def test_the_rows_are_those_of_the_flow_run_by_hand_among_those_of_the_blocks(model, name, x, example):
    adapted = adapt(model, x) if example else adapt(model)
    output, records = adapted.record(x, action=measures.action)
    expected = by_hand(model, x, action=measures.action)
    close = {"rtol": 1e-5, "atol": 1e-6} if name == "backsolve" else {"rtol": 0, "atol": 0}  # which integrates both
    torch.testing.assert_close(output, model(x), **close)
    torch.testing.assert_close(records["action"], expected["action"])
    rows = model.flow.record(model.first(x), action=measures.action)[1].blocks
    assert records.blocks == ("first", *(f"flow {one}" for one in rows), "last")
    starts = {"network": (0, 1, 3, 5)}
    assert records.starts == starts.get(name, (0, 1, 1 + len(rows)))


def test_depth_names_and_sizes_count_the_steps_of_the_flow(model, name, x):
    adapted, flow = adapt(model, x), model.flow
    assert adapted.names == ("first", *(f"flow {one}" for one in NAMES[name]), "last")
    assert adapted.depth == flow.depth + 2
    assert adapted.h == (1.0, *flow.h, 1.0)
    assert adapted.evaluations == flow.evaluations + 2
    assert [block.kind for block in adapted.blocks] == ["residual", "flow", "residual"]
    assert repr(adapted).count("flow ") >= flow.depth
    output, records = adapted.record(x)
    assert output.equal(model(x))
    assert len(records.blocks) == len(adapted.names)


def test_gradients_are_those_of_the_plain_model_and_of_the_flow_by_hand(model, name, x):
    adapted = adapt(model, x)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(model(x).square().sum())
    recorded = gradients(adapted.record(x, action=measures.action)[0].square().sum())
    assert plain.keys() == recorded.keys()
    close = {"rtol": 1e-3, "atol": 1e-4} if name == "backsolve" else {"rtol": 0, "atol": 0}
    for one in plain:
        torch.testing.assert_close(recorded[one], plain[one], **close)
    expected = gradients(by_hand(model, x, action=measures.action)["action"].sum())
    actual = gradients(adapted.record(x, action=measures.action)[1]["action"].sum())
    assert expected.keys() == actual.keys()
    for one in expected:
        torch.testing.assert_close(actual[one], expected[one])


@pytest.mark.parametrize("solver", ["euler", "bs23", "dopri5"])
def test_outputs_are_those_of_the_plain_model_whatever_is_measured(solver):
    """States of many numbers go other ways through the sums of a step than those of few."""
    flow, x = Flow(lambda: ConvField(16), solver=solver, depth=2), torch.randn(4, 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), flow).eval()
    adapted, chosen = adapt(model, x), [measures.action, measures.residue, measures.cosine, measures.displacement]
    chosen += [] if solver == "euler" else [measures.error]
    expected = model(x)
    for one in chosen:
        output, records = adapted.record(x, one=one)
        assert output.equal(expected)
        torch.testing.assert_close(records["one"], flow.record(model[0](x), one=one)[1]["one"])


def test_steps_are_those_of_the_flow(model, name, x):
    if name in ("by sample", "backsolve", "checkpoint"):
        with pytest.raises(ValueError, match=r"control='batch'|gradient='direct'"):
            adapt(model).steps(x)
        return
    adapted = adapt(model, x)
    steps = adapted.steps(x)
    expected = list(model.flow.steps(model.first(x)))
    assert len(steps) == len(expected) + 2
    for one, other in zip(steps[1:-1], expected, strict=True):
        assert one.x1.equal(other.x1)
        assert len(one.stages) == len(other.stages)
        assert one.h == other.h
    assert steps[-1].x1.equal(model.last(steps[-1].x0))
    assert len(adapted.steps(x, closing=False)[1].stages) == expected[0].tableau.interior


def test_no_field_is_called_twice(x):
    calls = []
    velocity = Velocity(lambda m, t, x: calls.append(t) or m.layer(x), layer=nn.Linear(WIDTH, WIDTH))
    flow = Flow(velocity, shared=True, depth=2)
    adapted = adapt(around(flow), x)
    for chosen in ({}, {"action": measures.action}):
        calls.clear()
        adapted.record(x, **chosen)
        assert len(calls) == flow.evaluations == 6


def test_a_flow_without_a_field_makes_it_when_the_blocks_are_found(x):
    for example in (x, None):
        model = around(Flow(solver="bs23", depth=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        adapted = adapt(model, example)
        _, records = adapted.record(x, action=measures.action)
        assert len(records["action"]) == 4
        before = [p.clone() for p in model.flow.parameters()]
        records["action"].sum().backward()
        optimizer.step()
        assert any(not p.equal(old) for p, old in zip(model.flow.parameters(), before, strict=True))
        assert model.flow.training
        assert all(module.training for module in model.modules())


def test_a_flow_in_a_branch_is_recorded_and_so_is_the_sum(x):
    model = Calling(lambda m, x: m.head(x + m.flow(x)), flow=FLOWS["bs23"](), head=nn.Linear(WIDTH, 2))
    adapted = adapt(model, x)
    _, records = adapted.record(x, action=measures.action)
    end, own = model.flow.record(x, action=measures.action)
    torch.testing.assert_close(records["action"], torch.cat([own["action"], end.square().mean(1)[None]]))
    assert records.blocks[:2] == ("flow blocks.0", "flow blocks.1")
    assert [block.kind for block in adapted.blocks] == ["flow", "residual"]


def test_sums_within_a_flow_are_its_own(x):
    """Its fields hold residual blocks, and so does the encoder of a network."""
    inner = Velocity(lambda m, t, x: m.block(x), block=Block())
    network = Network(nn.Sequential(nn.Linear(WIDTH, WIDTH), Block()), Flow(inner, depth=2), nn.Identity())
    adapted = adapt(around(network), x)
    assert adapted.names == ("first", "flow blocks.0", "flow blocks.1", "last")


def test_a_flow_that_is_called_twice_has_the_rows_of_both_calls(x):
    model = around(FLOWS["bs23"]())
    model.function = lambda m, x: m.head(m.flow(m.first(m.flow(x))))
    adapted = adapt(model, x)
    _, records = adapted.record(x, action=measures.action)
    state, once = model.flow.record(x, action=measures.action)
    twice = model.flow.record(model.first(state), action=measures.action)[1]
    assert torch.cat([records["action"][:2], records["action"][3:]]).equal(torch.cat([once["action"], twice["action"]]))
    assert adapted.names == records.blocks
    assert records.blocks == (
        "flow blocks.0 call 0", "flow blocks.1 call 0", "first", "flow blocks.0 call 1", "flow blocks.1 call 1",
    )  # fmt: skip
    assert len(adapted.blocks) == 2


def test_conditions_of_fields_pass(x):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = Flow(Velocity2(), depth=2)
            self.last = Block()

        def forward(self, x, condition=None):
            return self.last(self.flow(x, condition))

    class Velocity2(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, t, x, c):
            return self.layer(x) * c

    model, c = Conditioned(), torch.rand(5, 1)
    adapted = adapt(model, {"x": x, "condition": c})
    output, records = adapted.record(x, condition=c, action=measures.action)
    assert output.equal(model(x, c))
    own = model.flow.record(x, c, action=measures.action)[1]
    assert records["action"][:2].equal(own["action"])


def test_the_number_of_steps_of_a_tolerance_may_differ_between_batches(x):
    velocity = Velocity(lambda m, t, x: 8 * m.layer(x).sin(), layer=nn.Linear(WIDTH, WIDTH))
    model = around(NeuralODE(velocity, tolerance=Tolerance(rtol=1e-5)))
    adapted = adapt(model, x)
    depths = {len(adapted.record(scale * x, action=measures.action)[1]["action"]) for scale in (1e-3, 1.0, 30.0)}
    assert len(depths) > 1
    assert adapted.depth == 3


def test_a_flow_may_get_another_depth(x):
    model = around(FLOWS["euler"]())
    adapted = adapt(model, x)
    model.flow.resize((0.5, 0.5, 0.5, 0.5))
    assert adapted.depth == 6
    assert adapted.h == (1.0, 0.5, 0.5, 0.5, 0.5, 1.0)
    _, records = adapted.record(x, action=measures.action)
    assert records["action"].shape == (6, 5)
    assert records.blocks == adapted.names


def test_records_of_training_mode_are_those_of_the_flow(x):
    model = around(Flow(lambda: MLPField(WIDTH, norm="batch"), solver="euler", depth=2)).train()
    adapted = adapt(model, x)
    assert adapted.training
    adapted.record(x, action=measures.action)
    torch.testing.assert_close(
        adapted.record(x, action=measures.action)[1]["action"], by_hand(model, x, action=measures.action)["action"]
    )


def test_random_numbers_are_drawn_as_in_the_plain_model(x):
    def dropping():
        return Velocity(lambda m, t, x: m.drop(m.layer(x)), layer=nn.Linear(WIDTH, WIDTH), drop=nn.Dropout())

    model = around(Flow(dropping, depth=2))
    adapted = adapt(model.train(), x)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert adapted.record(x, action=measures.action)[0].equal(expected)


def test_flows_by_name_are_flows(x):
    model = around(FLOWS["bs23"]())
    assert adapt(model, blocks=["flow"]).names == ("flow blocks.0", "flow blocks.1")
    assert adapt(model, blocks=["first", "flow"]).names == ("first", "flow blocks.0", "flow blocks.1")
    assert adapt(model, blocks=Flow).depth == 2
    by_hand = adapt(model, blocks=["first"])
    assert by_hand.record(x, action=measures.action)[1]["action"].shape == (1, 5)
    as_one = adapt(model, blocks={"flow": None})
    assert as_one.depth == 1


def test_a_chain_takes_its_flows_beside_its_layers(x):
    layers = nn.Linear(WIDTH, WIDTH), nn.ReLU(), FLOWS["bs23"](), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
    model = nn.Sequential(*layers)
    adapted = adapt(model, x, displacement=True)
    assert adapted.names == ("0:1", "2 blocks.0", "2 blocks.1", "3")
    _, records = adapted.record(x, action=measures.action)
    assert records["action"][1:3].equal(model[2].record(model[:2](x), action=measures.action)[1]["action"])
    assert adapt(model, x).names == ("2 blocks.0", "2 blocks.1")


def test_a_flow_that_the_model_does_not_always_call_is_not_left_out_silently(x):
    model = around(FLOWS["bs23"]())
    model.function = lambda m, x: m.last(m.flow(x) if m.training else x)
    adapted = adapt(model.eval(), x)
    model.train()
    with pytest.raises(ValueError, match=r"1 flows were not called when the blocks were found: flow.*partial=True"):
        adapted.record(x, action=measures.action)
    model.function = lambda m, x: m.last(x if m.training else m.flow(x))
    adapted = adapt(model.eval(), x)
    model.train()
    with pytest.raises(ValueError, match=r"1 of 2 blocks are not called: flow"):
        adapted.record(x, action=measures.action)


def test_flows_that_are_recorded_or_iterated_by_the_model_itself_are_recorded(x):
    model = around(FLOWS["bs23"]())
    model.function = lambda m, x: m.head(m.last(m.flow.record(x, action=measures.action)[0]))
    _, expected = model.flow.record(x, action=measures.action)
    _, records = adapt(model, x).record(x, action=measures.action)
    assert records["action"][:2].equal(expected["action"])
    model.function = lambda m, x: m.head(m.last([step.x1 for step in m.flow.steps(x)][-1]))
    _, records = adapt(model, x).record(x, action=measures.action)
    torch.testing.assert_close(records["action"][:2], expected["action"])
    assert records.blocks == ("flow blocks.0", "flow blocks.1", "last")


def test_recorders_of_the_user_are_looked_into(x):
    class Mine(nn.Module):
        """Has what a recorder has, and a forward pass of its own."""

        def __init__(self):
            super().__init__()
            self.block, self.flow = Block(), FLOWS["euler"]()

        def forward(self, x):
            return self.flow(self.block(x))

        def record(self, x, **measures):
            return self.flow.record(self.block(x), **measures)

        def steps(self, x, **options):
            return self.flow.steps(self.block(x), **options)

    adapted = adapt(around(Mine()), x)
    assert adapted.names == ("first", "flow.block", *(f"flow.flow blocks.{m}" for m in range(3)), "last")


TOKENS = {
    "tokens": lambda m, x: m.flow(m.first(x)),
    "one state a token": lambda m, x: m.flow(m.first(x).flatten(0, 1)).unflatten(0, x.shape[:2]),
    "tokens first": lambda m, x: m.flow(m.first(x).transpose(0, 1)).transpose(0, 1),
    "tokens first, one state a token": lambda m, x: (
        m.flow(m.first(x).transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
    ),
}


@pytest.mark.parametrize("way", TOKENS)
@pytest.mark.parametrize("name", ["bs23", "fixed"])
def test_measures_are_of_samples_however_they_lie_in_the_states_of_a_flow(way, name):
    model, x = around(FLOWS[name]()), torch.randn(4, 6, WIDTH)
    model.function = lambda m, x: m.last(TOKENS[way](m, x))
    _, records = adapt(model, x).record(x, action=measures.action)
    _, expected = model.flow.record(model.first(x), action=measures.action)
    torch.testing.assert_close(records["action"][1:-1], expected["action"])


class Masked(nn.Module):
    """Tokens with a mask of padding, of which nothing here reads others."""

    def __init__(self, flow):
        super().__init__()
        self.first, self.flow = Block(), flow

    def forward(self, x, attention_mask=None):
        return self.flow(self.first(x))


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize("name", ["bs23", "network", "fixed"])
def test_padding_is_not_measured_in_a_flow(name):
    model, x = Masked(FLOWS[name]()), torch.randn(3, 5, WIDTH)
    adapted = adapt(model, {"x": x, "attention_mask": MASK})
    _, records = adapted.record(x, attention_mask=MASK, action=measures.action)
    for i, length in enumerate((3, 5, 2)):
        _, alone = adapted.record(x[i : i + 1, :length], action=measures.action)
        torch.testing.assert_close(records["action"][:, i], alone["action"][:, 0])
    by_token = adapt(model, {"x": x, "attention_mask": MASK}, per="token")
    _, records = by_token.record(x, attention_mask=MASK, action=measures.action)
    assert records["action"].shape == (model.flow.depth + 1, 10)
    _, alone = model.flow.record(model.first(x)[0, :3], action=measures.action)
    torch.testing.assert_close(records["action"][1:, :3], alone["action"])


def test_a_mask_counts_where_a_flow_keeps_no_steps_too():
    model, x = Masked(FLOWS["backsolve"]()), torch.randn(3, 5, WIDTH)
    adapted = adapt(model, {"x": x, "attention_mask": MASK})
    _, records = adapted.record(x, attention_mask=MASK, action=measures.action)
    _, alone = adapted.record(x[:1, :3], action=measures.action)
    torch.testing.assert_close(records["action"][:, 0], alone["action"][:, 0], rtol=1e-3, atol=1e-4)
    by_token = adapt(model, {"x": x, "attention_mask": MASK}, per="token")
    with pytest.raises(ValueError, match=r"integrates measures beside its 3 states.*gradient='direct'"):
        by_token.record(x, attention_mask=MASK, action=measures.action)
    model.flow = FLOWS["by sample"]()
    with pytest.raises(ValueError, match=r"has steps of each state.*control='batch'"):
        adapt(model, {"x": x, "attention_mask": MASK}).record(x, attention_mask=MASK, action=measures.action)


def test_states_of_other_samples_are_refused(x):
    model = around(FLOWS["euler"]())
    model.function = lambda m, x: m.last(m.flow(torch.cat([x, x])).reshape(2, -1, WIDTH).sum(0))
    adapted = adapt(model, blocks=["flow", "last"])
    with pytest.raises(ValueError, match=r"flow 'flow' has 10 states for 5 samples"):
        adapted.record(x, action=measures.action)


def test_what_writes_into_the_output_of_a_flow_leaves_kept_steps_as_they_were(x):
    model = around(FLOWS["euler"]())
    model.function = lambda m, x: m.head(m.last(torch.relu_(m.flow(m.first(x)))))
    adapted = adapt(model, x)
    *_, last, _ = adapted.steps(x)
    assert last.x1.equal(model.flow(model.first(x)))


def test_a_flow_in_a_checkpoint_is_recorded_with_gradients(x):
    model = around(FLOWS["bs23"]())
    plain = model.function
    _, expected = adapt(model, x).record(x, action=measures.action)
    gradients = torch.autograd.grad(expected["action"].sum(), [*model.flow.parameters()])
    model.function = lambda m, x: m.head(m.last(checkpoint(m.flow, m.first(x), use_reentrant=False)))
    output, records = adapt(model, x).record(x, action=measures.action)
    assert records["action"].equal(expected["action"])
    assert output.equal(plain(model, x))
    actual = torch.autograd.grad(records["action"].sum(), [*model.flow.parameters()])
    for one, other in zip(actual, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_flow_is_recorded(x):
    model = around(FLOWS["bs23"]()).eval()
    expected = by_hand(model, x, action=measures.action)
    model.flow = torch.compile(model.flow, backend="eager")
    adapted = adapt(model, x)
    assert adapted.names == ("first", "flow blocks.0", "flow blocks.1", "last")
    with torch.no_grad():
        torch.testing.assert_close(adapted.record(x, action=measures.action)[1]["action"], expected["action"])


@pytest.mark.slow
def test_a_compiled_record_measures_flows_too(x):
    model = around(FLOWS["bs23"]()).eval()
    adapted = adapt(model, x)
    expected = adapted.record(x, action=measures.action)[1]["action"]

    @torch.compile(backend="eager", fullgraph=True)
    def record(x):
        return adapted.record(x, action=measures.action)[1]["action"]

    torch.testing.assert_close(record(x), expected)


def test_threads_record_at_once(x):
    model = around(FLOWS["bs23"]()).eval()
    adapted, results = adapt(model, x), [None] * 4

    def run(i):
        results[i] = adapted.record((i + 1) * x, action=measures.action)[1]["action"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(results):
        assert result.equal(adapted.record((i + 1) * x, action=measures.action)[1]["action"])


def test_images_and_own_networks_go_through_least_action_and_a_trajectory():
    flow = Flow(solver="bs23", depth=2)
    model = Calling(
        lambda m, x: m.head(m.flow(m.block(m.stem(x))).mean((2, 3))),
        stem=Unit(3, 8),
        block=Calling(lambda m, x: torch.relu(x + m.way(x)), way=nn.Conv2d(8, 8, 3, padding=1)),
        flow=flow,
        head=nn.Linear(8, 3),
    )
    adapted = adapt(model, torch.randn(2, 3, 8, 8))
    assert adapted.depth == 3
    images, targets = torch.randn(6, 3, 8, 8), torch.randint(3, (6,))
    objective, optimizer = LeastAction(CrossEntropy()), torch.optim.SGD(adapted.parameters(), 0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = objective(adapted, images, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    features = Trajectory("residue", "cosine")(adapted.eval(), images)
    assert features.shape == (6, 6)


@pytest.mark.parametrize("name", ["euler", "adaptive"])
def test_a_model_is_cut_beside_its_flow(name, x):
    model = around(FLOWS[name]())
    adapted = adapt(model, x)
    modules = split_into_modules(adapted, 2, x)
    _, records = modules.record(x, action=measures.action)
    assert records["action"].equal(adapted.record(x, action=measures.action)[1]["action"])
    assert records.blocks[:2] == ("module 1 first", f"module 1 flow {'blocks.0' if name == 'euler' else 'step 0'}")
    assert [module.depth for module in modules.modules_in_order] == [1 + model.flow.depth, 1]


def test_a_measure_of_the_end_is_that_of_the_flow(x):
    @measure(closing=False)
    def farthest(step):
        return (step.x1 - step.x0).abs().amax(1)

    model = around(FLOWS["network"]())
    adapted = adapt(model, x)
    _, records = adapted.record(x, farthest=farthest)
    _, expected = model.flow.record(model.first(x), farthest=farthest)
    torch.testing.assert_close(records["farthest"][1:-1], expected["farthest"])
