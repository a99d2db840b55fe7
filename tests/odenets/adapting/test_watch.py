"""Functions are watched where states pass them, in no other module, and no longer than the pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from odenets import adapt
from odenets.adapting import hooks
from odenets.measures import cosine, measure, residue


class Block(nn.Module):
    """Where the shape changes, the shortcut is every second pixel with channels of zeros."""

    def __init__(self, channels, width):
        super().__init__()
        self.stride, self.zeros = 1 if channels == width else 2, (width - channels) // 2
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        branch = self.conv2(F.relu(self.conv1(x)))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(x + branch)


@pytest.fixture
def model():
    torch.manual_seed(0)
    blocks = Block(4, 4), Block(4, 4), Block(4, 8), Block(8, 8), Block(8, 8)
    return nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


def test_functions_are_watched_in_the_modules_of_their_states_alone(model, monkeypatch):
    x = torch.rand(2, 3, 16, 16)
    adapted, seen = adapt(model, x), []
    code_of = hooks.code_of
    monkeypatch.setattr(hooks, "code_of", lambda depth: seen.append(depth) or code_of(depth + 1))
    _, records = adapted.record(x, residue=residue, cosine=cosine)
    assert 0 < len(seen) < 12  # of some 30 in a pass
    assert records.blocks == ("1", "2", "3", "4", "5")
    steps = adapted.steps(x)
    for name, one in (("residue", residue), ("cosine", cosine)):
        torch.testing.assert_close(records[name], torch.stack([one(step) for step in steps]))


def test_an_error_within_a_watched_module_ends_the_watch(model):
    x = torch.rand(2, 3, 16, 16)
    adapted = adapt(model, x)
    expected = adapted.record(x, residue=residue)[1]["residue"]

    def fail(module, args):
        raise RuntimeError("broken")

    handle = model[3].conv2.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        adapted.record(x, residue=residue)
    assert torch.overrides._get_current_function_mode() is None
    assert not adapted.hooks.watches
    handle.remove()
    assert torch.equal(adapted.record(x, residue=residue)[1]["residue"], expected)


@pytest.mark.parametrize("place", ["0", "3", "3.conv1"])
@pytest.mark.parametrize("kind", ["record", "steps"])
def test_a_pass_within_a_pass_leaves_the_outer_one_its_watch(model, place, kind):
    x, entered = torch.rand(2, 3, 16, 16), []
    adapted = adapt(model, x)
    expected = adapted.record(x, residue=residue)[1]["residue"]

    def again(module, args, output):
        if not entered:
            entered.append(module)
            adapted.record(x, residue=residue) if kind == "record" else adapted.steps(x)

    handle = model.get_submodule(place).register_forward_hook(again)
    assert torch.equal(adapted.record(x, residue=residue)[1]["residue"], expected)
    assert not adapted.hooks.watches
    handle.remove()


def test_a_measure_may_call_the_model(model):
    x = torch.rand(2, 3, 16, 16)
    adapted = adapt(model, x)
    expected = adapted.record(x, residue=residue)[1]["residue"]
    calling = measure(lambda step: (adapted(x), adapted.record(x, residue=residue), residue(step))[-1])
    assert torch.equal(adapted.record(x, residue=calling)[1]["residue"], expected)
