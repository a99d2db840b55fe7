"""Texts of several lengths in a batch: what stands behind their ends, where the mask is 0, counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odenets.depth import compress, heal
from odenets.depth.compression.positions import at_tokens, tokens_in

LENGTHS = [3 + (5 * k) % 7 for k in range(30)]


class Causal(nn.Module):
    """A block that reads the mean of the states up to each position."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.hidden, self.last, self.relu = nn.Linear(16, 12), nn.Linear(12, 8), relu

    def forward(self, x: Tensor) -> Tensor:
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        y = x + 0.3 * self.last(self.hidden(torch.cat([x, mean], -1)).tanh())
        return y.relu() if self.relu else y


class Texts(nn.Module):
    """A language model whose mask is not needed, as the padding is last."""

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.blocks = nn.Sequential(*(Causal(relu) for _ in range(5)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.blocks(self.embedding(input_ids)))}


def texts(padding: int, cut: bool = False) -> list[dict[str, Tensor]]:
    """Thirty texts, each a batch of its own, padded to the longest; or ``cut`` where they end."""
    tokens = torch.randint(1, 20, (30, 9), generator=torch.Generator().manual_seed(1))
    batches = []
    for row, length in zip(tokens, LENGTHS, strict=True):
        ids, mask = row.clone()[None], torch.ones(1, 9, dtype=torch.long)
        ids[:, length:], mask[:, length:] = padding, 0
        end = length if cut else None
        batches.append({"input_ids": ids[:, :end], "attention_mask": mask[:, :end]})
    return batches


def joined(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: torch.cat([one[name] for one in batches]) for name in batches[0]}]


def _by_kind(row: dict[str, Any]) -> tuple[dict[str, str], dict[str, float]]:
    """Words and numbers; multiplications are those of the first batch, which of attention grow with its length."""
    words = {name: value for name, value in row.items() if isinstance(value, str)}
    return words, {name: value for name, value in row.items() if name not in words and "macs" not in name}


def assert_near(one: Any, other: Any) -> None:
    """That two compressions are the same to rounding: what becomes of which blocks, figures and weights."""
    for rows in zip([*one.table, *one.curve], [*other.table, *other.curve], strict=True):
        words, numbers = zip(*(_by_kind(row) for row in rows), strict=True)
        assert words[0] == words[1]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-6, nan_ok=True)
    assert one.divergence == pytest.approx(other.divergence, rel=1e-3)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by", ["divergence", "error", "influence", "residue", "replaceme"])
def test_what_stands_in_the_place_of_padding_changes_nothing(by):
    model = Texts()
    assert_near(*(compress(model, joined(texts(padding)), remove=2, by=by) for padding in (0, 7)))


@pytest.mark.parametrize(("by", "relu"), [("divergence", False), ("divergence", True), ("replaceme", False)])
def test_padded_texts_are_compressed_as_those_of_their_own_lengths(by, relu):
    model = Texts(relu)
    small = compress(model, texts(0, cut=True), remove=2, by=by)
    assert_near(compress(model, texts(7), remove=2, by=by), small)


def test_without_a_mask_what_stands_behind_counts():
    calibration = [[{"input_ids": one["input_ids"]} for one in joined(texts(padding))] for padding in (0, 7)]
    one, other = (compress(Texts(), data, remove=2).divergence for data in calibration)
    assert one != pytest.approx(other, rel=1e-2)


def test_healing_follows_the_teacher_at_tokens_alone():
    healed = []
    for padding in (0, 7):
        model = compress(Texts(), joined(texts(padding)), remove=3, choices=["remove"], refit=False).model
        healed.append(heal(model, Texts(), joined(texts(padding)), images=300, lr=3e-3))
    for a, b in zip(*(one.parameters() for one in healed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_padding_that_is_told_otherwise_is_refused():
    ids, mask = torch.ones(4, 9, dtype=torch.long), torch.zeros(4, 9)
    padding = torch.arange(9).expand(4, 9) > 5
    assert torch.equal(tokens_in({"x": ids, "key_padding_mask": padding}), ~padding)
    with pytest.raises(ValueError, match="attention_mask must be 1 at tokens, got zeros alone"):
        tokens_in({"input_ids": ids, "attention_mask": mask})
    for inputs in (
        {"input_ids": ids, "attention_mask": mask[:, None, :, None]},
        {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids},
    ):
        with pytest.raises(ValueError, match=r"attention_mask must be \(B, T\)"):
            compress(Texts(), [inputs], remove=1)
    with pytest.raises(ValueError, match=r"a mask \(4, 9\) does not tell what is padding in \(4, 5, 3\)"):
        at_tokens(torch.zeros(4, 5, 3), tokens_in({"attention_mask": ~padding}))


@pytest.mark.slow
def test_a_transformer_of_hugging_face_is_compressed_alike_with_and_without_padding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    wanted = {"remove": 1, "choices": ["remove", "fit"]}
    assert_near(*(compress(model, data, **wanted) for data in (texts(7), texts(0, cut=True))))


class Forgiving(Texts):
    """Takes whatever comes by keyword, as many of Hugging Face's models do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        return super().forward(input_ids, attention_mask)


def test_a_mask_of_another_name_is_told() -> None:
    model = Forgiving().eval()
    batches = [{"input_ids": one["input_ids"], "mask": one["attention_mask"]} for one in joined(texts(0))]
    with pytest.warns(UserWarning, match="'mask', which is not read as a mask of padding") as caught:
        compress(model, batches, remove=1, choices=["remove"], refit=False)
    assert caught[0].filename == __file__
    compress(model, joined(texts(0)), remove=1, choices=["remove"], refit=False)  # and no warning
