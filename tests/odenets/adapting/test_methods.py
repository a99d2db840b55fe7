"""Methods on models that people have: least action and detection on a ViT, on GPT-2 and on a model with a flow."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.nn import functional as F

from odenets import ConvField, Flow, adapt, measures
from odenets.detection import Detector, Pipeline, QuantileTest, Trajectory
from odenets.least_action import LeastAction
from odenets.training import CrossEntropy, Task, accuracy

SIZE = 32
GOOD = ["good", "fine", "great", "lovely", "bright"]
BAD = ["bad", "poor", "awful", "dull", "gray"]
OTHER = ["a", "the", "film", "was", "and"]
WORDS = ["<pad>", "<end>", *GOOD, *BAD, *OTHER, "zig", "zag", "zug"]


class Mine(nn.Module):
    """A model of one's own: a residual addition written at its top level, then a flow."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.flow = Flow(ConvField(8), depth=3, solver="bs23")
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.branch(torch.relu(x))
        return self.head(torch.relu(self.flow(x)).amax((2, 3)))


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=3, embed_dim=48, num_heads=3, num_classes=4
    )


def gpt2(kind="GPT2ForSequenceClassification", **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=24, n_embd=32, n_layer=2, n_head=2, num_labels=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def pictures(n, seed):
    """Images with a bright quarter, each of the four in a color of its own, and which."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=generator)
    x = 0.4 * torch.rand(n, 3, SIZE, SIZE, generator=generator)
    half = SIZE // 2
    for image, quarter in zip(x, y.tolist(), strict=True):
        top, left = half * (quarter // 2), half * (quarter % 2)
        color = slice(quarter, quarter + 1) if quarter < 3 else slice(None)
        image[color, top : top + half, left : left + half] += 0.5
    return x, y


def reviews(n, seed, padding=0):
    """Sentences of several lengths, as token ids and a mask, and whether they praise."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    texts = []
    for label in y:
        tells = random.choice(GOOD if label else BAD, random.integers(2, 5))
        words = [*random.choice(OTHER, random.integers(2, 8)), *tells]
        texts.append([WORDS.index(word) for word in random.permutation(words)] + [WORDS.index("<end>")])
    length = max(map(len, texts)) + padding
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    lengths = torch.tensor([[len(text)] for text in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}, torch.from_numpy(y)


def noisy(images):
    generator = torch.Generator().manual_seed(5)
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def garbled(inputs):
    """The same lengths, of words that no review holds."""
    ids = inputs["input_ids"]
    odd = torch.randint(len(WORDS) - 3, len(WORDS), ids.shape, generator=torch.Generator().manual_seed(5))
    return inputs | {"input_ids": torch.where(ids > 1, odd, ids)}


@dataclass(frozen=True)
class Case:
    """A model, its data, what is odd among them, its steps, and settings in which the cost tells."""

    make: Any
    data: Any
    odd: Any
    depth: int
    lambda0: float
    steps: int = 60
    lr: float = 3e-3

    def adapted(self):
        torch.manual_seed(0)
        model = self.make()
        return adapt(model, self.data(2, 0)[0])


CASES = {
    "vit": Case(vit, pictures, noisy, 6, 0.1, steps=100, lr=1e-3),
    "gpt2": Case(gpt2, reviews, garbled, 4, 0.1, steps=45),
    "flow": Case(Mine, pictures, noisy, 4, 0.1, lr=1e-2),
}


@cache
def trained(name, objective_of):
    """A network and the losses of its task in a plain loop, with the loss and the action on data that are new."""
    case = CASES[name]
    network, objective = case.adapted(), objective_of(case)
    optimizer = torch.optim.Adam(network.parameters(), lr=case.lr)
    losses = []
    for step in range(case.steps):
        x, y = case.data(16, 100 + step)
        network.train()
        loss = objective(network, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(objective.batch_figures()["batch_loss"] if isinstance(objective, LeastAction) else loss.item())
    return network.eval(), losses, objective


def plain(case):
    return CrossEntropy()


def least_action(case):
    return LeastAction(lambda0=case.lambda0, tau=0.02, every=5)


@torch.no_grad()
def action_and_accuracy(network, x, y):
    inputs = x if isinstance(x, dict) else {"x": x}
    output, records = network.record(**inputs, action=measures.action)
    return records["action"].sum(0), accuracy(output, y).mean().item()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "vit")) for n in CASES])
def test_least_action_solves_the_task_and_moves_the_data_less(name):
    case = CASES[name]
    new = case.data(100, 1)
    actions = {}
    for objective_of in (plain, least_action):
        network, losses, objective = trained(name, objective_of)
        assert network.depth == case.depth
        assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
        action, share = action_and_accuracy(network, *new)
        assert share > 0.85
        assert action.shape == (100,)
        assert action.isfinite().all()
        actions[objective_of] = action.mean()
    assert actions[least_action] < 0.7 * actions[plain]
    assert objective.multiplier > case.lambda0


@pytest.mark.parametrize("name", CASES)
def test_a_detector_tells_odd_inputs_by_their_path(name):
    case = CASES[name]
    network, _, _ = trained(name, least_action)
    (clean, _), (new, _) = case.data(150, 2), case.data(100, 3)
    forest = Detector(RandomForestClassifier(30, random_state=0))
    pipeline = Pipeline(network, Trajectory("action", "cosine"), forest).fit(clean, case.odd(clean))
    assert pipeline.extract(new)[0].shape == (100, 2 * case.depth)
    assert pipeline.evaluate(new, case.odd(new)).auroc > 0.9
    test = Pipeline(network, Trajectory("action"), QuantileTest(0.1, side="both")).fit(clean)
    assert test.predict(new).mean() < 0.25


def test_features_of_sentences_are_those_of_their_words_however_they_are_padded():
    network, _, _ = trained("gpt2", least_action)
    features = Trajectory("action", "residue", "cosine", "embedding")
    short, padded = (features(network, reviews(20, 4, padding)[0]).detach() for padding in (0, 7))
    torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-6)
    (alone, _), (padded, _) = reviews(1, 4), reviews(1, 4, padding=7)
    assert alone.pop("attention_mask").all()
    torch.testing.assert_close(features(network, padded), features(network, alone), rtol=1e-4, atol=1e-6)


def of_next_words(output, inputs):
    """Cross-entropy of the words that come next, without those that pad."""
    logits, ids, mask = output.logits[:, :-1], inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), ids.masked_fill(mask == 0, -100).flatten())


def test_a_language_model_trains_with_least_action():
    torch.manual_seed(0)
    network = adapt(gpt2("GPT2LMHeadModel"), reviews(2, 0)[0])
    objective = LeastAction(Task(of_next_words), lambda0=0.1, tau=0.02)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        inputs, _ = reviews(16, 100 + step)
        loss = objective(network, inputs, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(objective.batch_figures()["batch_loss"])
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert network.record(**inputs, action=measures.action)[1]["action"].isfinite().all()
