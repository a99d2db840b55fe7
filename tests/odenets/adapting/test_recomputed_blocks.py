"""Adapted models whose blocks are under activation checkpointing: records and gradients are those without it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from odenets import adapt, measures
from tests.odenets.adapting.test_masking import IDS, MASK, POSITIONS, bert, gpt2

X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(step):
    return (step.residue.exp() * step.x1.sin()).flatten(1).mean(1) ** 2


MEASURES = {
    "action": measures.action,
    "cosine": measures.cosine,
    "mine": by_hand,
    "speed": measures.action.map(torch.sqrt),
}


class Block(nn.Module):
    """One that draws random numbers, and whose sum is in no module of its own."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x):
        return torch.sin(x + self.branch(x))


class Own(nn.Module):
    """A network that calls its blocks, and functions that add, under checkpointing or not."""

    def __init__(self):
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(4, 4)
        self.checkpointing = False
        self.double()

    def add(self, x):
        return x + self.last(x).tanh()

    def forward(self, x):
        for block in [*self.blocks, self.add]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x.exp()

    def gradient_checkpointing_enable(self):
        self.checkpointing = True


def vit():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, drop_path_rate=0.2, num_classes=3).double()


HF = {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS}
NETWORKS = {
    "own": (Own, {"x": X}),
    "bert": (bert, HF),
    "gpt2": (gpt2, HF | {"use_cache": False}),
    "vit": (vit, {"x": torch.randn(2, 3, 32, 32, dtype=torch.float64)}),
}


def trained(network, inputs):
    """Output, records and gradients of a loss of both, with the same random numbers at each call."""
    network.train().zero_grad()
    torch.manual_seed(1)
    output, records = network.record(**inputs, **MEASURES)
    state = output if isinstance(output, torch.Tensor) else output.last_hidden_state
    (state.square().mean() + sum(one.mean() for one in records.values())).backward()
    return state.detach(), records, [p.grad.clone() for p in network.parameters() if p.grad is not None]


def enable(model):
    getattr(model, "gradient_checkpointing_enable", getattr(model, "set_grad_checkpointing", None))()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(
    ("name", "per"), [*((name, "sample") for name in NETWORKS), ("bert", "token"), ("vit", "token")]
)
def test_records_and_gradients_are_those_without_checkpointing(name, per):
    make, inputs = NETWORKS[name]
    model = make()
    network = adapt(model.eval(), inputs, per=per)
    output, records, gradients = trained(network, inputs)
    enable(model)
    again = trained(network, inputs)
    assert torch.equal(again[0], output)
    for key in MEASURES:
        assert torch.equal(again[1][key], records[key])
    assert again[1].blocks == records.blocks
    for one, other in zip(again[2], gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_plain_gradients_are_those_of_the_model():
    """Without a loss of the records, while they are recorded."""
    plain = Own().train()
    plain.gradient_checkpointing_enable()
    network = adapt(copy.deepcopy(plain), X)
    network.train()
    for call in (plain, lambda x: network.record(x, **MEASURES)[0]):
        torch.manual_seed(1)
        call(X).sum().backward()
    for one, other in zip(plain.parameters(), network.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_a_sequence_in_segments_is_recorded_once():
    layers = nn.Sequential(*(Block() for _ in range(4))).double()

    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    network = adapt(Segments(), X)
    assert network.depth == 4
    expected = trained(adapt(layers, X), {"input": X})
    actual = trained(network, {"x": X})
    assert torch.equal(actual[1]["mine"], expected[1]["mine"])
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-10, atol=1e-14)


def test_two_passes_may_be_differentiated_together():
    network = adapt(Own(), X).train()
    network.model.gradient_checkpointing_enable()
    losses = [network.record(x, **MEASURES)[1]["action"].sum() for x in (X, 2 * X)]
    sum(losses).backward()
    network.record(X, **MEASURES)[1]["mine"].sum().backward()


def test_what_is_measured_in_a_checkpoint_goes_with_the_records():
    """An output that is kept for its own gradient would hold the graph that holds it."""
    network = adapt(Own(), X).train()
    network.model.gradient_checkpointing_enable()
    kept = []

    def measure(step):
        value = step.residue.exp()
        kept.append(weakref.ref(value))
        return value.sum(1)

    _, records = network.record(X, mine=measure)
    assert len(kept) == 3
    del records, _
    gc.collect()
    assert [one() for one in kept] == [None] * 3
