"""What a model returns passes through, and its steps are the same whatever that is."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from odenets import adapt, measures
from tests.odenets.adapting.test_masking import IDS, MASK, bert, cache_of, gpt2

Pair = namedtuple("Pair", ["state", "mean"])
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Output:
    state: torch.Tensor
    mean: torch.Tensor


class Returning(nn.Module):
    """A block whose output, and the model's, hold its state and another tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.kind(x, x.mean())


KINDS = {
    "tuple": lambda state, mean: (state, mean),
    "nested": lambda state, mean: [{"states": (state,)}, (mean, None, "text", 3)],
    "named": Pair,
    "dictionary": lambda state, mean: {"state": state, "mean": mean},
    "data class": Output,
    "none": lambda state, mean: None,
}


def tensors(value):
    return tree_leaves(vars(value) if isinstance(value, Output) else value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_passes_through(kind):
    model = Returning(KINDS[kind])
    network = adapt(model, X)
    expected = adapt(Returning(KINDS["tuple"]), X)
    expected.load_state_dict(network.state_dict())
    plain = model(X)
    output, records = network.record(X, action=measures.action)
    for one in (output, network(X), network.output_and_steps(X)[0]):
        assert type(one) is type(plain)
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(tensors(one), tensors(plain), strict=True)
        )
    assert torch.equal(records["action"], expected.record(X, action=measures.action)[1]["action"])


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize(
    "options",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": True},
        {"use_cache": False, "return_dict": False, "output_hidden_states": True},
    ],
)
def test_what_a_model_of_hugging_face_is_to_return_does_not_change_its_steps(make, options):
    model = make()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    network = adapt(model, inputs)
    with torch.no_grad():
        _, expected = network.record(**inputs, action=measures.action, cosine=measures.cosine)
        output, records = network.record(**inputs, **options, action=measures.action, cosine=measures.cosine)
        plain = model(**inputs, **options)
    assert type(output) is type(plain)
    assert records.blocks == expected.blocks
    for name in expected:
        assert torch.equal(records[name], expected[name])
    states = output[0], plain[0]
    assert torch.equal(*states)
    if "output_hidden_states" in options:
        hidden = (one[-1] if options.get("return_dict") is False else one.hidden_states for one in (output, plain))
        for a, b in zip(*hidden, strict=True):
            assert torch.equal(a, b)


def test_a_text_is_recorded_token_by_token():
    """With a cache, and the measures of all tokens at once."""
    model = gpt2()
    network = adapt(model, {"input_ids": IDS}, per="token")
    cache = cache_of(model)
    with torch.no_grad():
        _, expected = network.record(IDS, action=measures.action)
        values, held = [], None
        for t in range(7):
            past = {} if held is None else {cache: held}
            output, records = network.record(IDS[:, t : t + 1], use_cache=True, action=measures.action, **past)
            held = output.past_key_values
            values.append(records["action"])
    torch.testing.assert_close(torch.stack(values, 2).flatten(1), expected["action"])
