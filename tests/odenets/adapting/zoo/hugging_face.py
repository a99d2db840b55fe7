"""Hugging Face's transformers: small random configurations, with masks where a model takes one; nothing is downloaded.

Every layer adds twice, attention and what comes after it, but ConvNeXt's, which add once (the sum in its response
normalization lies within the layer).
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.odenets.adapting.zoo import Case, pictures

hf = pytest.importorskip("transformers")

LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PICTURES = {"image_size": 32, "patch_size": 8}


def sentences(length: int = 7, words: int = 50) -> Mapping[str, Tensor]:
    """Two sentences of unlike length, the second padded."""
    numbers = torch.randint(1, words, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(numbers)
    mask[1, -3:] = 0
    return {"input_ids": numbers * mask, "attention_mask": mask}


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **LAYERS))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None
        )
    )


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=50, num_key_value_heads=1, max_position_embeddings=16, **LAYERS)
    )


def vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(**PICTURES, **LAYERS))


def dinov2() -> nn.Module:
    options = {key: value for key, value in LAYERS.items() if key != "intermediate_size"}
    return hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **PICTURES, **options))


def swin() -> nn.Module:
    return hf.SwinModel(
        hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    )


def convnext_v2() -> nn.Module:
    return hf.ConvNextV2Model(hf.ConvNextV2Config(hidden_sizes=[8, 16, 24], depths=[1, 2, 1], num_stages=3))


def t5_encoder() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=2))


CASES = {
    "BERT": Case(bert, sentences(), 2 * 3),  # norms stand after the additions
    "GPT-2": Case(gpt2, sentences(), 2 * 3),
    "Llama": Case(llama, sentences(), 2 * 3),
    "ViT": Case(vit, {"pixel_values": pictures(32)}, 2 * 3),
    "DINOv2": Case(dinov2, {"pixel_values": pictures(32)}, 2 * 3),
    "Swin": Case(swin, {"pixel_values": pictures(32)}, 2 * (2 + 2)),
    "ConvNeXt V2": Case(convnext_v2, {"pixel_values": pictures(32)}, 1 + 2 + 1),
    "T5 encoder": Case(t5_encoder, sentences(), 2 * 3),
}
