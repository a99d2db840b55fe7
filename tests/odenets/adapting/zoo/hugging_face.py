"""Hugging Face's transformers: small random configurations, with masks where a model takes one; nothing is downloaded.

Every layer adds twice, attention and what comes after it; those of ConvNeXt and of Mamba add once (the sum in the
response normalization of ConvNeXt lies within the layer).
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.odenets.adapting.zoo import Case, pictures

hf = pytest.importorskip("transformers")

LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
PICTURES = {"image_size": 32, "patch_size": 8}


def sentences(length: int = 7, words: int = 50) -> Mapping[str, Tensor]:
    """Two sentences of unlike length, the second padded."""
    numbers = torch.randint(1, words, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(numbers)
    mask[1, -3:] = 0
    return {"input_ids": numbers * mask, "attention_mask": mask}


def sounds() -> Tensor:
    return torch.randn(2, 800, generator=torch.Generator().manual_seed(0))


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


def albert() -> nn.Module:
    return hf.AlbertModel(hf.AlbertConfig(vocab_size=50, embedding_size=16, max_position_embeddings=16, **LAYERS))


def gpt_neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=50, max_position_embeddings=16, **ENDS, **LAYERS))


def mixtral() -> nn.Module:
    options = {"num_key_value_heads": 1, "num_local_experts": 3, "max_position_embeddings": 16}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=50, **options, **ENDS, **LAYERS))


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, **ENDS))


def wav2vec2() -> nn.Module:
    features = {"conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    options = {"num_feat_extract_layers": 3, "apply_spec_augment": False}
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(vocab_size=50, **features, **positions, **options, **LAYERS))


def segformer() -> nn.Module:
    options = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_attention_heads": [1, 2, 2, 2]}
    return hf.SegformerModel(hf.SegformerConfig(**options))


def bart() -> nn.Module:
    layers = {"encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return hf.BartModel(hf.BartConfig(vocab_size=50, d_model=32, max_position_embeddings=16, **layers, **heads, **ends))


CASES = {
    "BERT": Case(bert, sentences(), 2 * 3),  # norms stand after the additions
    "GPT-2": Case(gpt2, sentences(), 2 * 3),
    "Llama": Case(llama, sentences(), 2 * 3),
    "ViT": Case(vit, {"pixel_values": pictures(32)}, 2 * 3),
    "DINOv2": Case(dinov2, {"pixel_values": pictures(32)}, 2 * 3),
    "Swin": Case(swin, {"pixel_values": pictures(32)}, 2 * (2 + 2)),
    "ConvNeXt V2": Case(convnext_v2, {"pixel_values": pictures(32)}, 1 + 2 + 1),
    "T5 encoder": Case(t5_encoder, sentences(), 2 * 3),
    "ALBERT": Case(albert, sentences(), 2 * 3),  # one layer, called thrice
    "GPT-NeoX": Case(gpt_neox, sentences(), 3),  # attention and layers side by side: one addition
    "Mixtral": Case(mixtral, sentences(), 2 * 3),
    "Mamba": Case(mamba, {"input_ids": sentences()["input_ids"]}, 3),
    "Wav2Vec2": Case(wav2vec2, {"input_values": sounds()}, 1 + 2 * 3),  # positions, computed from the state
    "SegFormer": Case(segformer, {"pixel_values": pictures(64)}, 2 * (1 + 2 + 1 + 1)),
    # a layer of the decoder attends twice
    "BART": Case(bart, {**sentences(), "decoder_input_ids": sentences(5)["input_ids"]}, 2 * 3 + 3 * 2, {"mask": None}),
}
