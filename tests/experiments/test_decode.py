"""The experiment on decoded states, on a few digits."""

import torch
from decode import EXPERIMENT, SETTINGS, Config, objective
from safetensors.torch import load_file

from lab.experiment import run
from odenets.least_action import LeastAction
from odenets.training.runs import read_summary


def test_a_run_leaves_pictures(tmp_path):
    run(EXPERIMENT, Config(train_size=100, epochs=1, pretraining=1, workers=1, output=tmp_path))
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"vanilla", "least_action"}
    before, after = (load_file(tmp_path / name / "weights.safetensors") for name in ("autoencoder", "vanilla"))
    encoder = {name.replace("encoder.", "0.", 1): value for name, value in after.items() if name.startswith("encoder.")}
    assert encoder
    assert all(torch.equal(before[name], value) for name, value in encoder.items())  # also statistics of batch norms
    decoded = torch.load(tmp_path / "vanilla" / "decoded.pt", weights_only=True)
    assert decoded.shape == (11, 6, 1, 8, 8)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert len(read_summary(tmp_path / "least_action")["results"]["change"]) == 9


def test_settings_are_those_of_the_thesis():
    least = objective(Config(dataset="cifar10"), "least action")
    assert isinstance(least, LeastAction)
    assert (least.multiplier.item(), least.tau, least.every) == SETTINGS["cifar10"] == (10.0, 0.1, 50)
