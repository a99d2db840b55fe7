"""Features of a detector on models of torchvision, timm and Hugging Face, and the search for their steps.

    pytest benchmarks/bench_adapting.py --benchmark-only --benchmark-json=FILE.json
    python -m benchmarks.table FILE.json

Each is timed in turn with a forward pass of the plain model, in eval mode without gradients, on the same batch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from odenets import adapt, measures

FEATURES = {"action": measures.action, "cosine": measures.cosine}
"""What a detector reads of each step."""

MODELS = ("ResNet-18, 64 x 32 x 32", "ResNet-18, 8 x 224 x 224", "ViT-S, 8 x 224 x 224", "GPT-2, 4 x 128 tokens")


def make(name: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A model in eval mode, and a batch by keyword; sentences of GPT-2 have several lengths."""
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    if kind == "GPT-2":
        from transformers import GPT2Config, GPT2ForSequenceClassification

        model: Any = GPT2ForSequenceClassification(GPT2Config(pad_token_id=0))  # of two labels
        lengths = torch.tensor([[128], [100], [64], [30]])
        mask = (torch.arange(128) < lengths).long()
        inputs = {"input_ids": torch.randint(1, 50000, (4, 128)) * mask, "attention_mask": mask}
    elif kind == "ViT-S":
        import timm

        model = timm.create_model("vit_small_patch16_224")
        inputs = {"x": torch.randn(8, 3, 224, 224)}
    else:
        from torchvision.models import resnet18

        model = resnet18()
        inputs = {"x": torch.randn(64, 3, 32, 32) if "32 x 32" in name else torch.randn(8, 3, 224, 224)}
    return model.to(device).eval(), {key: x.to(device) for key, x in inputs.items()}


def work(name: str, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """What is done, "features" or "finding", and a "forward pass" of the model before it is adapted."""
    (plain, inputs), (model, _) = make(name, device), make(name, device)
    network = adapt(model, inputs)

    @torch.no_grad()
    def features() -> object:
        return network.record(**inputs, **FEATURES)

    def finding() -> object:
        return adapt(model, inputs)

    @torch.no_grad()
    def forward() -> object:
        return plain(**inputs)

    return {"features": features, "finding": finding, "forward pass": forward}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["features", "finding"])
def bench_adapting(benchmark: Any, device: str, measure: Callable[..., None], name: str, what: str) -> None:
    """Time over that of a forward pass."""
    benchmark.group = f"{what}, {device}"
    works = work(name, device)
    measure(works[what], works["forward pass"], adapted=name, what=what)
