"""The experiment on decoded states, on a few digits."""

from dataclasses import replace

import torch
from decode import SETTINGS, Config, Frozen, build, main, objective

from odenets.least_action import LeastAction
from odenets.training import datasets
from odenets.training.runs import read_summary


def test_a_run_leaves_pictures_and_goes_on(tmp_path, capsys):
    main(replace(Config(quick=True), output=tmp_path / "run"))
    shown = capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")} == {"vanilla", "least_action"}
    decoded = torch.load(tmp_path / "run" / "vanilla" / "decoded.pt", weights_only=True)
    assert decoded.shape == (10, 6, 1, 8, 8)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert len(read_summary(tmp_path / "run" / "least_action")["results"]["change"]) == 9
    main(replace(Config(quick=True), output=tmp_path / "run", resume=True))
    assert capsys.readouterr().out == shown


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
    found = objective(Config(dataset="cifar10"), "least action")
    assert isinstance(found, LeastAction)
    assert (found.multiplier.item(), found.tau, found.every) == SETTINGS["cifar10"] == (10.0, 0.1, 50)
