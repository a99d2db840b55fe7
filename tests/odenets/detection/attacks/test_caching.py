"""Attacks on disk: resumed, reused, and never mistaken for one another."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from odenets.checkpoints import fingerprint
from odenets.detection import preset, run_attack
from odenets.detection.attacks import generation
from tests.odenets.detection.victims import SHORT, same, victim


@pytest.mark.parametrize(
    "damaged",
    [
        lambda stored: save(stored)[:50],
        lambda stored: save(stored | {"predicted": stored["predicted"][:2].clone()}),
        lambda stored: save(stored | {"images": stored["images"] + 2}),
    ],
    ids=["cut", "too few", "too bright"],
)
def test_a_damaged_batch_is_computed_again(batch, tmp_path, damaged):
    whole = run_attack(victim(), "FGM", *batch, batch_size=5, cache=tmp_path)
    path = next(tmp_path.glob("*/batch-00001.safetensors"))
    stored = load(path.read_bytes())
    path.write_bytes(damaged(stored))
    assert same(run_attack(victim(), "FGM", *batch, batch_size=5, cache=tmp_path), whole)
    assert torch.equal(load(path.read_bytes())["predicted"], stored["predicted"])


@pytest.mark.parametrize("name", ["APGD", "HSJ", "BA"])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(batch, name, tmp_path, monkeypatch):
    x, y = batch[0][:6], batch[1][:6]
    attack = partial(run_attack, victim(), preset(name, **SHORT[name]), x, y, batch_size=4)
    whole = attack()
    assert same(whole, attack())
    right, done = generation._attack_batch, []

    def killed(*arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_attack_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            attack(cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["attack.json", "batch-00000.safetensors"]
    first = (folder / "batch-00000.safetensors").stat().st_mtime_ns
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that ART draws from
    assert same(attack(cache=tmp_path), whole)
    assert (folder / "batch-00000.safetensors").stat().st_mtime_ns == first


def test_nothing_is_attacked_twice(batch, tmp_path):
    network, calls = copy.deepcopy(victim()), []
    network.register_forward_hook(lambda *_: calls.append(1))
    whole = run_attack(network, "FGM", *batch, batch_size=5, cache=tmp_path)
    assert calls
    calls.clear()
    assert same(run_attack(network, "FGM", *batch, batch_size=5, cache=str(tmp_path)), whole)
    assert not calls
    (folder,) = tmp_path.iterdir()
    about = json.loads((folder / "attack.json").read_text())
    assert folder.name == f"FGM-{about['key'][:24]}"
    assert about["settings"] == {"norm": "inf", "eps": 0.03}
    assert (about["class"], about["network"]) == ("FastGradientMethod", "Network")
    assert about["weights"] == fingerprint(network)


@pytest.mark.parametrize("change", ["seed", "settings", "images", "labels"])
def test_another_attack_has_a_folder_of_its_own(batch, change, tmp_path):
    x, y = batch
    run_attack(victim(), "FGM", x, y, cache=tmp_path)
    attack = preset("FGM", eps=0.1) if change == "settings" else "FGM"
    x = torch.cat([x[:-1], x[-1:].flip(2)]) if change == "images" else x
    y = y.flip(0) if change == "labels" else y
    run_attack(victim(), attack, x, y, cache=tmp_path, seed=int(change == "seed"))
    assert len(list(tmp_path.iterdir())) == 2


class Tempered(nn.Module):
    """Numbers that no state dictionary holds."""

    def __init__(self):
        super().__init__()
        self.network = copy.deepcopy(victim())
        self.temperature = 1.0
        self.shifts = [0.0]
        self.more = torch.zeros(())
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.temperature * self.network(x + self.offset + self.shifts[0] + self.more)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: nn.init.zeros_(network.network.head[1].bias),
        lambda network: setattr(network, "temperature", 2.0),
        lambda network: setattr(network, "shifts", [0.1]),
        lambda network: setattr(network, "more", torch.ones(()) / 10),
        lambda network: setattr(network, "offset", torch.ones(1) / 10),
        nn.Module.double,
    ],
    ids=["weights", "number", "list", "tensor", "buffer", "dtype"],
)
def test_another_network_has_a_folder_of_its_own(batch, change, tmp_path):
    network = Tempered()
    run_attack(network, "FGM", *batch, cache=tmp_path)
    run_attack(Tempered().train(), "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    change(network)
    run_attack(network, "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_autocast_has_a_folder_of_its_own(batch, tmp_path):
    plain = run_attack(victim(), "FGM", *batch, cache=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        run_attack(victim(), "FGM", *batch, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert same(run_attack(victim(), "FGM", *batch, cache=tmp_path), plain)
