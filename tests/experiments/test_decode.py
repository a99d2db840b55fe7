"""The experiment on decoded states, on a few digits."""

import torch
from decode import EXPERIMENT, SETTINGS, Config, Frozen, build, objective

from lab.experiment import run
from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.runs import read_summary


def test_a_run_leaves_pictures(tmp_path):
    run(EXPERIMENT, Config(quick=True, workers=1, output=tmp_path))
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"vanilla", "least_action"}
    decoded = torch.load(tmp_path / "vanilla" / "decoded.pt", weights_only=True)
    assert decoded.shape == (11, 6, 1, 8, 8)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert len(read_summary(tmp_path / "least_action")["results"]["change"]) == 9


def test_a_frozen_encoder_stays_as_it_is():
    train, _ = datasets.load("digits")
    network, _ = build(Config(), train)
    frozen = Frozen(network.encoder)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.train()
    frozen(train.x[:32])
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


def test_settings_are_those_of_the_thesis():
    least = objective(Config(dataset="cifar10"), "least action")
    assert isinstance(least, LeastAction)
    assert (least.multiplier.item(), least.tau, least.every) == SETTINGS["cifar10"] == (10.0, 0.1, 50)
