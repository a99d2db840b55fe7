"""The circles experiment on a few instances."""

from dataclasses import replace

import pytest
import torch
from circles import EXPERIMENT, SETTINGS, Boundary, Config, build, objective, points_of

from lab.experiment import run
from odenets.least_action import LeastAction
from odenets.training.data import Batches
from odenets.training.instances import fit_instances
from odenets.training.runs import read_summary
from odenets.transport import moves


def test_a_run_leaves_its_table_and_figures(tmp_path, capsys):
    run(EXPERIMENT, Config(tables=("21", "figures"), instances=2, epochs=1, batch_size=40, workers=1, output=tmp_path))
    assert "95.8 ± 1.8" in (tmp_path / "table.md").read_text()
    assert "way of the points over the shortest" in capsys.readouterr().out
    assert len(read_summary(tmp_path)["results"]["rows"]) == 9
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"fig_22", "fig_37", "fig_38"}
    cell = read_summary(tmp_path / "21_lap")
    assert (len(cell["results"]["max"]), cell["results"]["epochs"], cell["seeds"]) == (2, [1.0] * 2, [0, 1])


@pytest.mark.slow
def test_figures_of_bad_starts(tmp_path):
    run(EXPERIMENT, Config(tables=("22", "figures"), instances=2, epochs=1, workers=1, output=tmp_path))
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"fig_12", "fig_22", "fig_37", "fig_38", "fig_39", "fig_40", "fig_41"}


def test_the_boundary_is_fourteen_units_away():
    head = Boundary()
    assert not list(head.parameters())
    logits = head(torch.tensor([[-10.0, -10.0], [0.0, 0.0], [-20.0, -20.0]]))
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], torch.tensor([0.0, 20.0, -20.0]))


@pytest.mark.parametrize(("initial", "table"), [("kaiming", "21"), ("normal", "22")])
def test_weights_are_drawn_as_said(initial, table):
    assert SETTINGS[table].initial == initial
    layers = [m for m in build(replace(SETTINGS[table], blocks=300), False, 0).modules() if hasattr(m, "in_features")]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    biases = torch.cat([layer.bias for layer in layers])
    assert weights.std().item() == pytest.approx(5.0 if initial == "normal" else 1.0, rel=0.05)
    assert biases.std().item() == pytest.approx(5.0 if initial == "normal" else 0.0, rel=0.1)


def test_the_points_of_an_instance_are_different_ones():
    parts = points_of(Config(), SETTINGS["21"], 0)
    assert {name: len(p) for name, p in parts.items()} == {"train": 40, "test": 10, "validation": 200, "fresh": 1000}
    everything = torch.cat([part.x for part in parts.values()])
    assert len(everything.unique(dim=0)) == len(everything)


def test_the_methods_are_those_of_the_thesis():
    lap = objective("lap", SETTINGS["21"])
    assert isinstance(lap, LeastAction)
    assert (lap.tau, lap.every, lap.update, lap.weigh, lap.cost.kind) == (0.1, 5, "after", "multiply", "norm")
    assert lap.multiplier.item() == pytest.approx(0.1)


@pytest.mark.slow
def test_least_action_moves_the_points_less_and_more_directly():
    """After some epochs on the circles: the claims of section 3.2.2 and Fig. 37, over ten instances."""
    setting, config = replace(SETTINGS["figures"], points=200, blocks=6), Config()
    found = {}
    for method in ("resnet", "lap"):
        parts = [points_of(config, setting, seed) for seed in range(10)]
        trained = fit_instances(
            [build(setting, False, seed) for seed in range(10)],
            [Batches(part["train"], 10) for part in parts],
            epochs=15,
            optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01, betas=(0.9, 0.99)),
            objective=lambda method=method: objective(method, setting),
        )
        found[method] = [moves(net, part["test"].x) for net, part in zip(trained.networks, parts, strict=True)]
        for each in found[method]:
            assert (each.w2 <= each.root_mean_square * (1 + 1e-5) + 1e-7).all()
            assert (each.w1 <= each.mean * (1 + 1e-5) + 1e-7).all()
    moved = {method: sum(each.root_mean_square.sum() for each in each_of) for method, each_of in found.items()}
    excess = {
        method: sum((each.root_mean_square - each.w2).sum() for each in each_of) for method, each_of in found.items()
    }
    assert moved["lap"] < moved["resnet"]
    assert excess["lap"] < excess["resnet"]
