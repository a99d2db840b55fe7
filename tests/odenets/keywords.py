"""A network that takes its inputs by keyword and returns its logits by name, as Hugging Face's models do."""

from collections import UserDict

import torch
from torch import nn
from torch.nn import functional as F

from odenets import Flow, MLPField

WORDS, WIDTH = 11, 6


class Encoding(UserDict):
    """A batch as tokenizers return it: a mapping that is no dictionary, and that torch's trees do not know."""


class Reader(nn.Module):
    """Classifies token ids by the mean of what stands where the mask is 1."""

    def __init__(self, classes=3, depth=2):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.flow = Flow(lambda: MLPField(WIDTH), depth=depth, solver="euler", h=1.0)
        self.head = nn.Linear(WIDTH, classes)
        self.flow(torch.zeros(2, WIDTH))

    @property
    def depth(self):
        return self.flow.depth

    @property
    def h(self):
        return self.flow.h

    @property
    def evaluations(self):
        return self.flow.evaluations

    def encode(self, input_ids, attention_mask=None, scale=None):
        state = self.embed(input_ids)
        if scale is not None:
            state = state * scale[:, None, None]
        if attention_mask is None:
            return state.mean(1)
        mask = attention_mask[:, :, None].to(state.dtype)
        return (state * mask).sum(1) / mask.sum(1)

    def forward(self, **inputs):
        return self.record(**inputs)[0]

    def record(self, *, input_ids, attention_mask=None, scale=None, labels=None, **measures):
        state, records = self.flow.record(self.encode(input_ids, attention_mask, scale), **measures)
        logits = self.head(state)
        own = {} if labels is None else {"loss": 1000 * F.cross_entropy(logits, labels)}
        return {**own, "logits": logits}, records

    def steps(self, *, closing=True, labels=None, **inputs):
        return self.flow.steps(self.encode(**inputs), closing=closing)


def sentences(n=8, length=5, seed=0):
    """Token ids, some of which do not count, their mask, and classes: the kind of word that is most there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (n, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(2, length + 1, (n, 1), generator=generator)).long()
    labels = (F.one_hot(ids % 3, 3) * mask[:, :, None]).sum(1).argmax(1)
    return Encoding(input_ids=ids, attention_mask=mask), labels


def reader(seed=0, **options):
    torch.manual_seed(seed)
    return Reader(**options)
