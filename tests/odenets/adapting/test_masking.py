"""Measures of the tokens that are no padding, beside each sample that is run alone without its padding."""

from inspect import signature

import pytest
import torch
from torch import nn

from odenets import adapt, measures
from odenets.adapting.masking import Masking
from odenets.detection.features import Trajectory
from odenets.least_action import LeastAction
from odenets.measures import measure
from odenets.training import Task

IDS = torch.randint(0, 50, (5, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0, 1]]
)
POSITIONS = torch.arange(7).expand(5, 7)


@measure(closing=False)
def farthest(step):
    return step.residue.square().flatten(2).sum(2).amax(1)


QUANTITIES = {
    "action": measures.action,
    "cosine": measures.cosine,
    "displacement": measures.displacement,
    "norm": measures.square_norm,
    "cubic": measures.action.bind(p=3),
    "composed": measures.action + 0.1 * measures.residue.map(torch.sqrt),
    "farthest": farthest,
    "written by hand": lambda step: step.x1[:, -1].sum(1) - step.x0.std((1, 2)) * step.x0.shape[1],
}


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).double().eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config).double().eval()


def cache_of(model):
    """The name of the input that holds a cache, by the version of transformers."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


class Mixing(nn.Module):
    """Two residual layers on tokens, of which the first looks at all tokens of the sample."""

    def __init__(self, length=None):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.length = length
        self.double()

    def forward(self, x, attention_mask=None, valid=None):
        x = x + self.first(x).tanh() * x.mean((1, 2), keepdim=True)
        return x + self.second(x[:, : self.length]).tanh()


STATES = torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_a_sample_has_the_measures_that_it_has_without_its_padding(make):
    network = adapt(make())
    with torch.no_grad():
        _, records = network.record(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS, **QUANTITIES)
        for i, tokens in enumerate(MASK.bool()):
            alone = {"input_ids": IDS[i, tokens][None], "position_ids": POSITIONS[i, tokens][None]}
            _, expected = network.record(**alone, **QUANTITIES)
            for name in QUANTITIES:
                torch.testing.assert_close(records[name][:, i], expected[name][:, 0], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:states of a sample depend on others along the first axis")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("added", [False, True])
def test_masks_of_torch_are_true_of_padding(batch_first, added):
    x = torch.randn(5, 7, 8, dtype=torch.float64)
    laid = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    network = adapt(encoder(batch_first=batch_first), laid(x))
    padding = MASK == 0
    if added:
        padding = torch.zeros(5, 7, dtype=torch.float64).masked_fill(padding, -torch.inf)
    _, records = network.record(laid(x), None, padding, **QUANTITIES)
    for i, tokens in enumerate(MASK.bool()):
        _, expected = network.record(laid(x[i : i + 1, tokens]), **QUANTITIES)
        for name in QUANTITIES:
            torch.testing.assert_close(records[name][:, i], expected[name][:, 0], rtol=1e-10, atol=1e-12)


def test_measures_are_those_of_the_rows_of_each_sample():
    """In a loop over the samples, of states that padding has touched."""
    network = adapt(Mixing())
    steps = network.steps(STATES, MASK)
    _, records = network.record(STATES, MASK, **QUANTITIES)
    for m, step in enumerate(steps):
        for i, tokens in enumerate(MASK.bool()):
            x0, x1 = step.x0[i, tokens][None], step.x1[i, tokens][None]
            alone = step._replace(x0=x0, x1=x1, stages=(x1 - x0,), reductions=None)
            for name, one in QUANTITIES.items():
                torch.testing.assert_close(records[name][m, i], one(alone)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_gradients_are_those_of_the_rows_that_are_measured(per):
    network = adapt(Mixing(), per=per)
    weights = [*network.parameters()]
    _, records = network.record(STATES, MASK, action=measures.action, farthest=lambda step: step.x1.flatten(1).amax(1))
    actual = torch.autograd.grad(records["action"].sum() + records["farthest"].sum(), weights)
    steps = network.steps(STATES, MASK)
    rows = [(step.x0[i, t], step.x1[i, t]) for step in steps for i, t in enumerate(MASK.bool())]
    if per == "token":
        rows = [pair for x0, x1 in rows for pair in zip(x0, x1, strict=True)]
    expected = torch.autograd.grad(sum((x1 - x0).square().mean() + x1.amax() for x0, x1 in rows), weights)
    torch.testing.assert_close(actual, expected)


def test_nothing_is_grouped_where_nothing_is_padded():
    network = adapt(Mixing())
    shapes = []
    _, records = network.record(
        STATES, torch.ones(5, 7), **QUANTITIES, n=lambda s: shapes.append(s.x0.shape) or s.x0[:, 0, 0]
    )
    assert shapes == [(5, 7, 3)] * 2
    expected = network.record(STATES, **QUANTITIES)[1]
    for name in QUANTITIES:
        assert torch.equal(records[name], expected[name])


def test_samples_of_as_many_tokens_are_measured_together():
    shapes = []
    adapt(Mixing()).record(STATES, MASK, n=lambda step: shapes.append(tuple(step.x0.shape)) or step.x0[:, 0, 0])
    assert shapes == [(1, 3, 3), (3, 4, 3), (1, 7, 3)] * 2


@pytest.mark.parametrize(
    ("mask", "inputs"),
    [
        ("valid", {"valid": MASK}),
        ("valid", {"valid": MASK.bool(), "attention_mask": torch.ones(5, 7)}),
        (lambda inputs: inputs["attention_mask"][:, 0], {"attention_mask": MASK[:, None]}),
        (lambda inputs: inputs["x"][..., 0] != 9, {"x": torch.where(MASK.bool()[..., None], STATES, 9)}),
    ],
)
def test_a_mask_is_named_or_made(mask, inputs):
    network = adapt(Mixing(), mask=mask)
    expected = adapt(network.model).record(inputs.get("x", STATES), MASK, action=measures.action)[1]
    _, records = network.record(**{"x": STATES} | inputs, action=measures.action)
    assert torch.equal(records["action"], expected["action"])


def test_a_mask_of_torch_that_is_named_is_true_of_padding_too():
    assert Masking("key_padding_mask").tokens(nn.MultiheadAttention(4, 2), (), {"key_padding_mask": MASK == 0}, 5)
    mask = Masking("key_padding_mask").tokens(nn.MultiheadAttention(4, 2), (), {"key_padding_mask": MASK == 0}, 5).mask
    assert torch.equal(mask, MASK.bool())


@pytest.mark.parametrize("mask", [None, lambda inputs: None])
def test_padding_is_measured_where_no_mask_is_wanted(mask):
    network = adapt(Mixing(), mask=mask)
    one, other = (network.record(STATES, m, action=measures.action)[1]["action"] for m in (MASK, None))
    assert torch.equal(one, other)


def test_a_batch_that_a_model_takes_as_a_mapping_has_its_mask_in_it():
    class Taking(Mixing):
        def forward(self, batch):
            return super().forward(batch["x"])

    network = adapt(Taking())
    _, records = network.record(
        {"x": STATES, "attention_mask": MASK}, n=lambda s: s.x0.new_full((len(s.x0),), s.x0.shape[1])
    )
    assert records["n"].tolist() == [MASK.sum(1).tolist()] * 2


def test_steps_are_whole():
    assert [step.x0.shape for step in adapt(Mixing()).steps(STATES, MASK)] == [STATES.shape] * 2


def test_a_cache_holds_the_tokens_before_those_that_are_measured():
    network = adapt(gpt2())
    cache = cache_of(network.model)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 0, 1], [1] * 7, [1] * 7])
    whole = {"attention_mask": mask, "position_ids": POSITIONS}
    counting = {"n": lambda step: step.x0.new_full((len(step.x0),), step.x0.shape[1])}
    with torch.no_grad():
        _, expected = network.record(IDS, per_token=lambda step: step.x1[:, -1].sum(1), **whole)
        first = network(IDS[:, :4], attention_mask=mask[:, :4], position_ids=POSITIONS[:, :4], use_cache=True)
        inputs = {cache: first.past_key_values, "attention_mask": mask, "position_ids": POSITIONS[:, 4:]}
        _, records = network.record(IDS[:, 4:], per_token=lambda step: step.x1[:, -1].sum(1), **counting, **inputs)
    assert records["n"].tolist() == [[3, 3, 2, 3, 3]] * 4
    torch.testing.assert_close(records["per_token"], expected["per_token"])


def test_a_cache_stays_as_it_is_while_blocks_are_found():
    model = gpt2()
    cache = cache_of(model)
    first = model(IDS[:, :4], use_cache=True).past_key_values  # with gradients
    network = adapt(model, {"input_ids": IDS[:, 4:], cache: first})
    assert first.get_seq_length() == 4
    network = adapt(model)
    output, _ = network.record(IDS[:, 4:], action=measures.action, **{cache: first})
    assert first.get_seq_length() == 7
    torch.testing.assert_close(output.last_hidden_state, model(IDS).last_hidden_state[:, 4:])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("example", [False, True])
def test_encoders_of_torch_may_leave_padding_out(example):
    """In eval mode without gradients states are nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(5, 7, 8, dtype=torch.float64), torch.arange(7) >= torch.tensor([7, 4, 1, 4, 3])[:, None]
    padding[0, 6] = True  # states are shorter than the mask
    inputs = {"src": x, "src_key_padding_mask": padding}
    network = adapt(model, inputs if example else None)
    _, expected = network.record(**inputs, **QUANTITIES)
    with torch.no_grad():
        _, records = network.record(**inputs, **QUANTITIES)
        assert network.steps(**inputs)[0].x0.shape == (5, 6, 8)
        assert adapt(model, per="token").record(**inputs, action=measures.action)[1]["action"].shape == (4, 18)
    for name in QUANTITIES:
        torch.testing.assert_close(records[name], expected[name].detach())


@pytest.mark.filterwarnings("ignore:states of a sample depend on others along the first axis")
def test_a_mask_shows_that_the_samples_lie_along_the_second_axis():
    x = torch.randn(7, 5, 8, dtype=torch.float64)
    inputs = {"src": x, "src_key_padding_mask": MASK == 0}
    network = adapt(encoder(), inputs)
    actual = network.record(**inputs, action=measures.action)[1]["action"]
    assert torch.equal(actual, adapt(network.model, x).record(**inputs, action=measures.action)[1]["action"])


def test_each_token_is_a_row():
    network = adapt(Mixing(), per="token")
    steps = network.steps(STATES, MASK)
    _, records = network.record(
        STATES, MASK, action=measures.action, cosine=measures.cosine, mine=lambda s: s.x1.amax(1)
    )
    where = MASK.nonzero()
    assert torch.equal(records.tokens, where)
    for m, step in enumerate(steps):
        x0, x1 = step.x0[MASK.bool()], step.x1[MASK.bool()]
        torch.testing.assert_close(records["action"][m], (x1 - x0).square().mean(1))
        torch.testing.assert_close(records["cosine"][m], (x1 - x0).mean(1) / (x1 - x0).square().mean(1).sqrt())
        assert torch.equal(records["mine"][m], x1.amax(1))


def test_tokens_without_a_mask_are_all_tokens():
    _, records = adapt(Mixing(), per="token").record(STATES, action=measures.action)
    assert records["action"].shape == (2, 35)
    assert torch.equal(records.tokens, torch.ones(5, 7).nonzero())
    assert adapt(Mixing()).record(STATES, action=measures.action)[1].tokens is None


def test_the_mean_of_the_tokens_of_a_sample_is_its_action():
    network = adapt(Mixing())
    expected = network.record(STATES, MASK, action=measures.action)[1]["action"]
    network = adapt(network.model, per="token")
    _, records = network.record(STATES, MASK, action=measures.action)
    frame = records.map(torch.Tensor.detach).to_dataframe()
    means = frame.groupby(["block", "sample"])["action"].mean()
    torch.testing.assert_close(torch.tensor([*means], dtype=torch.float64).reshape(2, 5), expected.detach())
    assert frame["token"][:7].tolist() == [*range(7)]


@pytest.mark.parametrize("per", ["sample", "token"])
def test_least_action_moves_the_tokens_less(per):
    network = adapt(Mixing(), per=per)
    objective = LeastAction(Task(nn.functional.mse_loss), lambda0=0.01)
    optimizer = torch.optim.SGD(network.parameters(), 0.001)
    costs = []
    for _ in range(5):
        output, records = network.record(STATES, MASK, **objective.measures)
        loss = objective.loss(network, (STATES, STATES), output, records)
        costs.append(records["action"].sum(0).mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert costs == sorted(costs, reverse=True)


def test_features_of_a_detector_are_of_samples():
    inputs = {"x": STATES, "attention_mask": MASK}
    _, features = Trajectory().output_and_features(adapt(Mixing()), inputs)
    assert len(features) == 5
    with pytest.raises(ValueError, match=r"features are of samples, and the network records tokens: .*per=\"sample\""):
        Trajectory().output_and_features(adapt(Mixing(), per="token"), inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"attention_mask": MASK[:, None, None]},
            r"attention_mask must have shape \(5, T\), .*got shape \(5, 1, 1, 7\): .*mask=None",
        ),
        ({"attention_mask": torch.ones(7, 7).tril()}, r"attention_mask must have shape \(5, T\), .*got shape \(7, 7\)"),
        ({"attention_mask": {"full": MASK}}, r"attention_mask must have shape \(5, T\), .*got dict"),
        ({"attention_mask": 2 * MASK}, r"attention_mask must hold 1 and 0, got 2: a function makes"),
        (
            {"attention_mask": MASK[:, :6]},
            r"block 'first' has states of shape \(5, 7, 3\), .* mask is of \(5, 6\) tokens",
        ),
        ({"attention_mask": MASK * (torch.arange(5) != 3)[:, None]}, r"attention_mask leaves no token of sample 3"),
    ],
)
def test_what_is_no_mask_of_the_states_is_refused(inputs, message):
    network = adapt(Mixing())
    with pytest.raises(ValueError, match=message):
        network.record(STATES, **inputs, action=measures.action)
    network.record(STATES, **inputs)
    adapt(network.model, mask=None).record(STATES, **inputs, action=measures.action)


def test_a_mask_that_no_input_is_called_by_is_refused():
    with pytest.raises(ValueError, match=r"mask 'masc' is no input of Mixing, which takes attention_mask, valid, x"):
        adapt(Mixing(), mask="masc").record(STATES, MASK, action=measures.action)
    adapt(Mixing(), mask="valid").record(STATES, MASK, action=measures.action)


def test_masks_of_encoders_beside_decoders_are_refused():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    inputs = {"src": torch.randn(5, 7, 8), "tgt": torch.randn(5, 7, 8)}
    for name in ("src_key_padding_mask", "tgt_key_padding_mask"):
        with pytest.raises(
            ValueError, match=rf"{name} is of some of the states, for Transformer has an encoder and a dec"
        ):
            Masking().tokens(model, (), inputs | {name: MASK == 0}, 5)
        assert Masking().tokens(model, (), inputs | {name: MASK == 2}, 5) is None


def test_several_masks_are_refused():
    class Two(nn.Module):
        def forward(self, x, attention_mask, padding_mask):
            return x

    with pytest.raises(ValueError, match=r"several masks, attention_mask, padding_mask: name one"):
        Masking().tokens(Two(), (STATES, MASK, MASK == 0), {}, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"per": "row"}, ValueError, "per must be 'sample' or 'token', got 'row'"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be 'auto', the name of an input, .*got Tensor"),
    ],
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        adapt(Mixing(), **arguments)


def test_states_that_are_no_tokens_have_no_measures_of_tokens():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    network = adapt(model, torch.randn(2, 3, 4, 4), blocks=["0"], per="token")
    with pytest.raises(
        ValueError, match=r"states of shape \(2, 3, 4, 4\), which are not \(B, T\) tokens .*per=\"sample\""
    ):
        network.record(torch.randn(2, 3, 4, 4), action=measures.action)
    network = adapt(nn.Sequential(nn.Linear(3, 3)), blocks=["0"], per="token")
    with pytest.raises(ValueError, match=r"states of shape \(2, 3\), which are not"):
        network.record(torch.randn(2, 3), action=measures.action)


def test_tokens_are_those_of_all_states():
    model = nn.Sequential(nn.Linear(3, 3), nn.AvgPool2d((2, 1)), nn.Linear(3, 3))
    network = adapt(model, blocks=["0", "2"], per="token")
    with pytest.raises(ValueError, match=r"'2' has states of shape \(2, 2, 3\), which are not \(2, 4\) tokens"):
        network.record(torch.randn(2, 4, 3), action=measures.action)


def test_a_mask_in_a_compiled_graph_is_refused():
    network = adapt(Mixing(), blocks=["first"]).eval()
    compiled = torch.compile(network.record, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile"):
        compiled(STATES, MASK, action=measures.action)


def test_batches_of_other_lengths_take_one_way():
    """Of a model that reads from its data, whose program is looked at again where it reads otherwise."""
    network = adapt(bert(), {"input_ids": IDS, "attention_mask": MASK})
    passes = []
    network.model.register_forward_hook(lambda *_: passes.append(1))
    for lengths in ([7, 4, 4, 3, 5], [2, 2, 3, 3, 3], [1, 2, 3, 4, 5]):
        mask = torch.arange(7) < torch.tensor(lengths)[:, None]
        network.record(input_ids=IDS, attention_mask=mask.long(), action=measures.action)
        network.record(input_ids=IDS, attention_mask=mask.long(), **QUANTITIES)
    assert len(passes) == 6


def test_the_name_of_a_mask_is_one_that_the_model_is_given():
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, **named):
            return x + self.layer(x).tanh()

    with pytest.raises(ValueError, match=r"mask 'attention_maks' is no input of Anything, .* attention_mask, x"):
        adapt(Anything(), mask="attention_maks").record(
            torch.randn(2, 3, 4), attention_mask=torch.ones(2, 3), action=measures.action
        )
