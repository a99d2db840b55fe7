"""The figure of the page on any residual network: ``python docs/adapted_figure.py`` writes it to ``docs/figures``.

How far the steps of three adapted networks move their states, before and after training: a ResNet and a vision
transformer on digits, a language model on the manual of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.style
import timm
import torch
from figures import BLUE, FOLDER, RUST
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet18
from transformers import GPT2Config, GPT2LMHeadModel

from odenets import Records, adapt, plotting
from odenets.adapting import AdaptedModel
from odenets.training import Batches, load
from solvers import Step

Batch = tuple[Tensor, Callable[[object], Tensor]]
"""Inputs, and the loss of an output."""


def relative_displacement(step: Step) -> Tensor:
    """How far a step moves a sample, in terms of where the sample is."""
    return (step.x1 - step.x0).flatten(1).norm(dim=1) / step.x0.flatten(1).norm(dim=1)


def digits(epochs: int, size: int) -> Iterator[Batch]:
    """Batches of scikit-learn's digits, as color images of 32 pixels or in their own size."""
    train, _ = load("digits")
    for epoch in range(epochs):
        for x, y in Batches(train, 32, seed=epoch):
            images = F.interpolate(x, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
            yield images, lambda output, y=y: F.cross_entropy(output, y)


def texts(steps: int, length: int) -> Iterator[Batch]:
    """Batches of parts of the manual of Python, as bytes."""
    manual = torch.tensor([*"\n".join(topics.values()).encode()])
    for _ in range(steps):
        ids = torch.stack([manual[i : i + length] for i in torch.randint(len(manual) - length, (32,))])
        yield ids, lambda output, ids=ids: F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained(network: AdaptedModel, batches: Iterator[Batch], lr: float) -> list[Records]:
    """What the steps do on the first batch before training, and on the last after it."""
    optimizer, records = torch.optim.AdamW(network.parameters(), lr=lr), []

    def look(x: Tensor) -> None:
        with torch.no_grad():
            records.append(network.eval().record(x, moved=relative_displacement)[1])
        network.train()

    for step, (x, loss_of) in enumerate(batches):
        if step == 0:
            look(x)
        optimizer.zero_grad()
        loss = loss_of(network(x))
        loss.backward()
        optimizer.step()
    look(x)
    print(f"{type(network.model).__name__}: {step + 1} steps, last loss {loss.item():.3f}")
    return records


def networks() -> Iterator[tuple[str, AdaptedModel, list[Records]]]:
    """Each network with a title and its records."""
    torch.manual_seed(0)
    network = adapt(resnet18(num_classes=10), torch.rand(2, 3, 32, 32))
    yield "torchvision: ResNet-18, digits", network, trained(network, digits(4, 32), 1e-3)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
    network = adapt(timm.create_model("vit_tiny_patch16_224", **sizes), torch.rand(2, 3, 16, 16))
    yield "timm: ViT, digits", network, trained(network, digits(12, 16), 1e-3)
    config = GPT2Config(n_embd=96, n_layer=6, n_head=3, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
    network = adapt(GPT2LMHeadModel(config), torch.randint(256, (2, 64)))
    yield "Hugging Face: GPT-2, Python's manual", network, trained(network, texts(500, 64), 1e-3)


def draw(axis: Axes, title: str, network: AdaptedModel, before: Records, after: Records) -> None:
    """The mean of each step, by its kind: projection or not, attention or MLP."""
    start, end = (records["moved"].mean(1).numpy() for records in (before, after))
    steps = range(1, len(end) + 1)
    axis.plot(steps, start, "_", color="0.6", markersize=9, markeredgewidth=2, label="before training")
    axis.plot(steps, end, color="0.75", linewidth=0.8, zorder=1)
    kinds = ["MLP" if spec.name.endswith("mlp") else "attention" for spec in network.blocks]
    if network.blocks[0].kind == "ResNet":
        kinds = ["block" if spec.projection is None else "block with a projection" for spec in network.blocks]
    for kind, color, marker in zip(dict.fromkeys(kinds), (BLUE, RUST), ("o", "s"), strict=True):
        rows = [m for m, one in enumerate(kinds) if one == kind]
        axis.plot([steps[m] for m in rows], end[rows], marker, color=color, markersize=6, label=kind)
    axis.set(title=title, xlabel="step", yscale="log", xticks=steps)
    axis.legend(fontsize="small")


def main() -> None:
    """Write the figure, for light pages and for dark."""
    matplotlib.style.use(FOLDER / "static" / "figures.mplstyle")
    figure = Figure(figsize=(12, 3.5))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, network, records) in zip(axes, networks(), strict=True):
        draw(axis, title, network, *records)
    axes[0].set_ylabel("|x1 - x0| / |x0|, mean")
    for path in plotting.save({"adapted": figure}, FOLDER / "figures", dark=True):
        print(Path(path).relative_to(FOLDER))


if __name__ == "__main__":
    main()
