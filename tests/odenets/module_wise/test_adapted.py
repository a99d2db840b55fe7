"""Networks of other libraries in modules, with inputs by keyword and masks."""

from functools import partial

import pytest
import torch
from torch import nn

from odenets import Flow, MLPField, adapt, measures
from odenets.module_wise import balanced, fit_modules, parallel_step, partition, split_into_modules, trgl
from odenets.module_wise.partition import activation_memory
from odenets.training import CrossEntropy

hf = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

IDS = torch.randint(1, 50, (24, 9), generator=torch.Generator().manual_seed(0))
LABELS = IDS[:, 0] % 3
ADAM = {"optimizer": partial(torch.optim.Adam, lr=1e-2), "objective": trgl(tau=1.0)}


def batch(samples, length=9):
    """Every second sample is padded."""
    mask = torch.ones_like(IDS)
    mask[::2, 4:] = 0
    return {"input_ids": IDS[:samples, :length], "attention_mask": mask[:samples, :length]}


class Reader(nn.Module):
    """Classifies by the mean of GPT-2's states where the mask is 1."""

    def __init__(self):
        super().__init__()
        self.gpt = hf.GPT2Model(hf.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask):
        states = self.gpt(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return {"logits": self.head((states * mask).sum(1) / mask.sum(1))}


@pytest.mark.filterwarnings("ignore:the heads of modules average over all tokens")
def test_gpt2_with_masks_trains_in_modules():
    torch.manual_seed(0)
    network = adapt(Reader())
    modules = split_into_modules(network, 2, batch(2))
    assert modules.ends == (2, 4)
    swapped = dict(reversed(batch(7, 5).items()))
    batches = [(batch(24), LABELS), (swapped, LABELS[:7])]
    rows = fit_modules(modules, batches, epochs=4, **ADAM).rows
    for k in (1, 2):
        first, *_, last = [row["train_loss"] for row in rows if row["module"] == k]
        assert last < 0.8 * first
    modules.eval()
    expected, records = network.eval().record(**batch(24), action=measures.action)
    output, of_modules = modules.record(*modules.arguments(batch(24)), action=measures.action)
    torch.testing.assert_close(output["logits"], expected["logits"], rtol=0, atol=0)
    torch.testing.assert_close(of_modules["action"], records["action"], rtol=0, atol=0)
    assert modules.predict(*modules.arguments(batch(1))).shape == (1,)
    assert len(modules.evaluate(batches)) == 2
    with pytest.raises(TypeError, match="with which the network was cut, input_ids, attention_mask, got input_ids"):
        modules.arguments({"input_ids": IDS})


def test_the_memory_of_modules_is_measured_by_inputs_by_keyword(monkeypatch):
    sizes = []

    def measured(*arguments):
        sizes.extend(activation_memory(*arguments))
        return sizes

    monkeypatch.setattr(partition, "activation_memory", measured)
    assert balanced(adapt(Reader()), 2, batch(2))[-1] == len(sizes) == 4


def test_timms_vit_trains_in_modules():
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 2, "drop_path_rate": 0.05}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
    x, y = torch.rand(12, 3, 32, 32), torch.arange(12) % 3
    modules = split_into_modules(adapt(model, x[:2]), [1, 4], x[:2])
    options = ADAM | {"optimizer": partial(torch.optim.Adam, lr=1e-3)}
    rows = fit_modules(modules, [(x, y)], epochs=25, **options).rows
    for k in (1, 2):
        losses = [row["train_loss"] for row in rows if row["module"] == k]
        assert min(losses[-5:]) < 0.9 * losses[0]


class Unit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.way = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.way(x))


class Own(nn.Module):
    """A flow among other blocks."""

    def __init__(self):
        super().__init__()
        self.widen = nn.Linear(4, 6)
        self.flow = Flow(lambda: MLPField(6), depth=3, solver="euler", h=0.2)
        self.layers = nn.Sequential(*(Unit(6) for _ in range(3)))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layers(self.flow(self.widen(x))))


def test_a_network_with_a_flow_trains_in_modules():
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    network = adapt(Own(), x)
    modules = split_into_modules(network, 2, x)
    optimizers = [torch.optim.Adam(module.parameters(), 1e-2) for module in modules.modules_in_order]
    losses = [parallel_step(modules, [CrossEntropy()] * 2, optimizers, x, y)[:, 0] for _ in range(40)]
    assert (losses[-1] < 0.9 * losses[0]).all()
    records = network.eval().record(x, action=measures.action)[1]["action"]
    torch.testing.assert_close(modules.eval().record(x, action=measures.action)[1]["action"], records)


def test_a_flow_beside_sums_in_no_module_is_not_cut():
    class Summing(Own):
        def forward(self, x):
            x = self.flow(self.widen(x))
            for layer in self.layers:
                x = x + torch.tanh(layer.way(x))
            return self.head(x)

    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="'flow' records its own steps, which no exported graph does"):
        split_into_modules(adapt(Summing(), x), 2, x)
