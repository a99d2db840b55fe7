"""Networks cut in the graphs of torch.export."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import measures
from odenets.adapting import adapt
from odenets.adapting.cutting.cut import blocks_in, cut_adapted
from tests.odenets.adapting.models import SMALL, small_resnet, small_swin, small_vit
from tests.odenets.checks import unchanged

hf = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}


def masked(ids):
    """Keyword inputs, of which the first sample is padded."""
    mask = torch.ones_like(ids)
    mask[0, len(ids[0]) // 2 + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gpt2():
    return hf.GPT2Model(hf.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=16))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class Sums(nn.Module):
    """Residual additions in no module of their own, one in place, with a scale besides."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.drop = nn.Dropout(0.3)

    def forward(self, x, scale=None):
        x = x * 2
        x = x + torch.tanh(self.layers[0](x))
        x = torch.add(self.drop(torch.relu(self.layers[1](x))), x)
        x = x + scale * torch.tanh(self.layers[2](x)) if scale is not None else x
        return {"last": x, "mean": x.mean(1)}


WORDS = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0))
ROWS = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
EXPORTED = {
    "gpt2": (gpt2, masked(IDS)),
    "bert": (lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **SIZES)), masked(IDS)),
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(vocab_size=50, **SIZES)), masked(IDS)),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **SIZES)), {"pixel_values": SMALL}),
    "encoder": (encoder, WORDS),
    "sums": (Sums, (ROWS, torch.rand(4, 1))),
}
TRACED = {
    "resnet": (small_resnet, SMALL),
    "torchvision's vit": (small_vit, SMALL),
    "swin": (small_swin, SMALL),
    "timm's vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5, drop_path_rate=0.2),
        SMALL,
    ),
}


def places(example):
    """Positional and keyword inputs, and those that parts are given."""
    if isinstance(example, dict):
        first, *rest = example.values()
        return (), example, first, rest
    first, *rest = example if isinstance(example, tuple) else (example,)
    return (first, *rest), {}, first, rest


def values_of(output):
    return [x for x in (output.values() if isinstance(output, dict) else [output]) if isinstance(x, torch.Tensor)]


def passes(network, parts, head, example):
    """Output and records of the whole, and of its parts, each with gradients from the same state."""
    args, kwargs, first, rest = places(example)

    def composed():
        state, rows = first, []
        for part in parts:
            state, records = part.record(state, *rest, action=measures.action)
            rows.append(records["action"])
        return head(state, *rest) if rest else head(state), torch.cat(rows)

    def whole():
        output, records = network.record(*args, **kwargs, action=measures.action)
        return output, records["action"]

    before = copy.deepcopy(dict(network.named_buffers()))
    for run in (whole, composed):
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
        network.zero_grad()
        torch.manual_seed(1)
        output, action = run()
        sum(x.square().mean() for x in values_of(output)).backward()
        gradients = {name: p.grad for name, p in network.named_parameters()}
        yield values_of(output), action, gradients, copy.deepcopy(dict(network.named_buffers()))


def check_parts(network, parts, head, example):
    for training, tolerance in ((True, {}), (False, {"rtol": 0, "atol": 0})):
        for module in (network, *parts, head):
            module.train(training)
        whole, composed = passes(network, parts, head, example)
        torch.testing.assert_close(composed, whole, **tolerance)


CUTS = [*((name, "end") for name in (*EXPORTED, *TRACED)), *((name, "start") for name in ("gpt2", *TRACED))]
LONG = {("gpt2", "end"), ("gpt2", "start"), ("bert", "end"), ("llama", "end"), ("vit", "end"), ("encoder", "end")}
"""Of which GPT-2 with its fixture, the sums and what is traced show fast what these show."""


@pytest.mark.parametrize(
    ("name", "at"), [pytest.param(*cut, marks=pytest.mark.slow) if cut in LONG else cut for cut in CUTS]
)
def test_parts_are_the_whole(name, at):
    """Outputs, records, gradients and buffers; to the last bit in eval mode."""
    make, example = (EXPORTED | TRACED)[name]
    network = adapt(make(), example)
    depth = len(blocks_in(network))
    with unchanged(network):
        parts, head = cut_adapted(network, [1, depth - 1, depth], at, example)
    assert (parts[0].model.exports is not None) == (name in EXPORTED)
    check_parts(network, parts, head, example)
    ours, theirs = ({id(p) for p in one.parameters()} for one in (nn.ModuleList([*parts, head]), network))
    assert ours <= theirs


@pytest.mark.parametrize("name", ["resnet", pytest.param("timm's vit", marks=pytest.mark.slow)])
def test_what_can_be_traced_can_be_exported(name, monkeypatch):
    def untraceable(*args):
        raise ValueError("not traced")

    monkeypatch.setattr("odenets.adapting.cutting.cut._cut_traced", untraceable)
    make, example = TRACED[name]
    network = adapt(make(), example)
    parts, head = cut_adapted(network, [1, len(blocks_in(network))], "end", example)
    assert parts[0].model.exports is not None
    check_parts(network, parts, head, example)


@pytest.fixture(scope="module")
def cut_gpt2():
    torch.manual_seed(0)
    network = adapt(gpt2().eval())
    network.find(**masked(IDS))
    return network, *cut_adapted(network, [1, 3], "end", masked(IDS))


@pytest.mark.parametrize(("samples", "length"), [(5, 13), (1, 9), (3, 1), (1, 1), (2, 16)])
def test_parts_hold_for_other_numbers_of_samples_and_tokens(cut_gpt2, samples, length):
    network, (one, two), head = cut_gpt2
    inputs = masked(torch.randint(1, 50, (samples, length)))
    mask = inputs["attention_mask"]
    expected = network(**inputs).last_hidden_state
    assert torch.equal(head(two(one(inputs["input_ids"], mask), mask)).last_hidden_state, expected)
    assert torch.equal(two(one(**inputs), attention_mask=mask), two(one(inputs["input_ids"], mask), mask))


def test_copies_of_parts_are_parts(cut_gpt2):
    _, (one, two), _ = cut_gpt2
    mask = masked(IDS)["attention_mask"]
    state, expected = one.record(IDS, mask, action=measures.action)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        again, records = other.record(IDS, mask, action=measures.action)
        assert torch.equal(again, state)
        assert torch.equal(records["action"], expected["action"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert two(state, mask).shape == state.shape


def test_other_inputs_than_at_the_cut_are_refused(cut_gpt2):
    _, (one, two), _ = cut_gpt2
    mask = masked(IDS)["attention_mask"]
    state = one(IDS, mask)
    with pytest.raises(TypeError, match=r"besides input_ids: attention_mask; got nothing\. Cut the network with"):
        two(state)
    with pytest.raises(TypeError, match="besides input_ids: attention_mask; got 2 by position"):
        two(state, mask, mask)
    with pytest.raises(TypeError, match="got tokens"):
        two(state, tokens=mask)
    with pytest.raises(ValueError, match=r"attention_mask must have the size 9 where it has 5, got \(2, 5\)"):
        two(state, mask[:, :5])
    with pytest.raises(ValueError, match="attention_mask must have 2 dimensions, as at the cut"):
        two(state, mask[0])


@pytest.mark.slow
def test_a_mode_or_a_precision_that_the_graphs_do_not_have_is_refused():
    network = adapt(gpt2().eval())
    network.find(**masked(IDS))
    (one, two), _ = cut_adapted(network, [1, 3], "end", masked(IDS))
    mask = masked(IDS)["attention_mask"]
    state = one(IDS, mask)
    network.model.h[1].ln_1.train()
    with pytest.raises(ValueError, match=r"'h\.1\.ln_1' is in training mode within a part in eval mode"):
        two(state, mask)
    network.model.double().eval()
    with pytest.raises(ValueError, match=r"the network was cut in torch\.float32, and is in torch\.float64 now"):
        two(state.double(), mask)


@pytest.mark.slow
def test_what_is_frozen_at_the_cut_stays_so():
    model = encoder()
    model.layers[1].eval()
    network = adapt(model, WORDS)
    parts, head = cut_adapted(network, [1, 3], "end", WORDS)
    torch.manual_seed(0)
    expected = network(WORDS)
    torch.manual_seed(0)
    state = WORDS
    for part in parts:
        state = part(state)
    assert torch.equal(head(state), expected)
    assert not model.layers[1].training


def t5():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2}
    return hf.T5EncoderModel(hf.T5Config(vocab_size=50, **sizes))


def classifier():
    sizes = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 16}
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(vocab_size=50, pad_token_id=0, num_labels=3, **sizes))


class Reversal(torch.autograd.Function):
    """Has derivatives of its own, which graphs of operators do not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Counting(Sums):
    """Changes what Python holds."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)["last"] * self.calls


class Reversing(Sums):
    def forward(self, x):
        return Reversal.apply(super().forward(x)["last"])


class Deciding(Sums):
    def forward(self, x):
        return super().forward(x)["last"] * (1 if x.sum() > 0 else 2)


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        pytest.param(
            t5,
            masked(IDS),
            r"would cross the cut, and only one tensor may; .* is computed of parameters in 'encoder.*'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            classifier,
            masked(IDS),
            "input_ids is the first input itself, in whose place later parts get the state",
            marks=pytest.mark.slow,
        ),
        (Reversing, ROWS, "in training mode the gradients of its parts differ from those of the whole"),
        (Counting, ROWS, "in eval mode the states of its parts differ from those of the whole"),
        (Deciding, ROWS, "torch.export cannot follow its forward pass .*; by torch.fx: "),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(make, example, message):
    network = adapt(make().eval())
    args, kwargs, *_ = places(example)
    network.find(*args, **kwargs)
    with pytest.raises(ValueError, match=message):
        cut_adapted(network, [1, len(blocks_in(network))], "end", example)


@pytest.mark.slow
def test_images_of_another_size_are_refused():
    network = adapt(hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **SIZES)), {"pixel_values": SMALL})
    (part, *_), _ = cut_adapted(network, [1, 3], "end", {"pixel_values": SMALL})
    with pytest.raises(ValueError, match=r"the state must have the size 32 where it has 16, got \(2, 3, 16, 16\)"):
        part(F.avg_pool2d(SMALL, 2))
