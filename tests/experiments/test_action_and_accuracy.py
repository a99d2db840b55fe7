"""The experiment on action and accuracy, on a few digits."""

import numpy as np
import pytest
from action_and_accuracy import EXPERIMENT, Config, Job, action, build, parts_of, summarize

from lab.experiment import run
from odenets import measures
from odenets.training.data import Batches
from odenets.training.runs import read_summary


def test_a_run_leaves_its_table_and_figures(tmp_path):
    run(EXPERIMENT, Config(workers=1, quick=True, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    initial = [("orthogonal", 0.1), ("orthogonal", 1.0), ("normal", 0.1), ("all", None)]
    assert [(row["initializer"], row["gain"]) for row in rows] == initial
    assert {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")} == {"fig_6", "fig_11"}
    cosine = read_summary(tmp_path / "run" / "orthogonal_1")["results"]["cosine"]
    assert np.array(cosine).shape == (3, 9)
    assert (np.abs(cosine) <= 1).all()


def test_the_action_is_the_mean_over_all_images():
    train, test = parts_of(Config())
    net = build(Config(), train, Job("orthogonal", 0.5), 0)
    whole = net.eval().record(test.x, action=measures.action)[1]["action"].sum(0).mean().item()
    assert action(net, Batches(test, 100)) == pytest.approx(whole, rel=1e-5)


def test_small_gains_move_less():
    train, test = parts_of(Config())
    moved = [action(build(Config(), train, Job("normal", g), 0), Batches(test, 500)) for g in (0.01, 0.1)]
    assert moved[0] < moved[1]


def test_the_correlation_within_and_over_all():
    """Within each group accuracy rises with the action, over both it falls."""
    results = [
        {"initializer": "normal", "gain": g, "action": [10.0 ** (a + g) for a in (0, 1, 2)]} | {"accuracy": acc}
        for g, acc in ((0, [0.90, 0.91, 0.92]), (10, [0.10, 0.11, 0.12]))
    ]
    one, other, whole = summarize(Config(), results)
    assert one["correlation"][0] == pytest.approx(1)
    assert other["correlation"][0] == pytest.approx(1)
    assert whole["correlation"][0] < -0.9


def test_errors():
    with pytest.raises(ValueError, match="at least 3"):
        Config(instances=2)
