"""The action of clean and attacked digits."""

from dataclasses import replace

import pytest
from action_histogram import Config, main

from odenets.training.runs import read_summary


def test_a_run_prints_its_table_and_goes_on(tmp_path, capsys):
    config = Config(workers=1, quick=True, output=tmp_path / "run")
    main(config)
    shown = capsys.readouterr().out
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert [(r["method"], r["images"]) for r in rows] == [
        (method, images) for method in ("vanilla", "least action") for images in ("clean", "eps = 0.05", "eps = 0.1")
    ]
    assert (tmp_path / "run" / "figures" / "fig_21.png").exists()
    main(replace(config, resume=True))
    assert capsys.readouterr().out == shown


def test_errors():
    with pytest.raises(ValueError, match="epsilons must be positive"):
        Config(epsilons=(0.0,))
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        Config(seeds=1)
