"""The action of clean and attacked digits."""

from typing import Any

from action_histogram import EXPERIMENT, Config

from lab.experiment import draw, run
from odenets.training.runs import read_summary

TINY: dict[str, Any] = {
    "seeds": 2,
    "train_size": 100,
    "pool_size": 120,
    "epochs": 1,
    "epsilons": (0.05, 0.1),
    "workers": 1,
}


def test_a_run_leaves_its_table_and_a_figure_that_is_drawn_again(tmp_path):
    run(EXPERIMENT, Config(**TINY, output=tmp_path))
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [(r["method"], r["images"]) for r in rows] == [
        (method, images) for method in ("vanilla", "least action") for images in ("clean", "eps = 0.05", "eps = 0.1")
    ]
    assert [row["images"] for row in rows if "difference" in row] == ["eps = 0.05", "eps = 0.1"]
    (tmp_path / "figures" / "fig_21.png").unlink()
    assert "fig_21.png is drawn" in draw(EXPERIMENT, tmp_path)
