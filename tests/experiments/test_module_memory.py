"""Memory of module-wise training, on a small batch."""

import pytest
import torch
from module_memory import EXPERIMENT, SETTINGS, Config, modules_of, peak
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.experiment import run
from odenets.training.runs import read_summary


def test_a_run_prints_its_table(tmp_path, capsys):
    run(EXPERIMENT, Config(networks=("vgg19",), methods=("end-to-end", "TRGL"), workers=1, output=tmp_path))
    shown = capsys.readouterr().out
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [(row["method"], row["K"]) for row in rows] == [("end-to-end", 1), ("TRGL", 4)]
    assert rows[1]["saved"] > 0
    assert rows[1]["thesis"] == 21
    assert "| vgg19 " in shown


@pytest.mark.slow
def test_memory_saved_on_resnet110_is_at_least_the_thesis():
    """Table 9, at the thesis' size: 96 x 96 in batches of 64."""
    whole = peak("resnet110", "end-to-end", 1, 64, "cpu")["bytes"]
    for method, K, theirs in (("TRGL", 4, 24), ("TRGL", 8, 48), ("TRGL", 16, 58)):
        found = peak("resnet110", method, K, 64, "cpu")["bytes"]
        assert 100 * (1 - found / whole) >= theirs
        if K == 4:
            assert found <= 1.03 * peak("resnet110", "VanGL", K, 64, "cpu")["bytes"]


@pytest.mark.slow
def test_four_modules_end_where_the_thesis_has_them():
    with FakeTensorMode():
        x = torch.rand(2, 3, 64, 64)
        assert modules_of("resnet50", "VanGL", 4, x).ends == (3, 7, 13, 16)
        assert modules_of("resnet50", "VanGL*", 4, x).ends != (3, 7, 13, 16)
        assert modules_of("resnet110", "VanGL", 4, x).K == 4
    assert SETTINGS["resnet101"].split == (7, 16, 25, 33)


@pytest.mark.slow
def test_networks_of_table_31_are_measured(tmp_path):
    methods = ("end-to-end", "VanGL", "TRGL")
    run(EXPERIMENT, Config(networks=("vgg19", "swin_t"), methods=methods, batch_size=64, output=tmp_path / "run"))
    results = read_summary(tmp_path / "run")["results"]
    assert len(results["rows"]) == 6
    assert all(row["saved"] > 0 for row in results["rows"] if row["K"] > 1)
    assert "TRGL takes" in results["verdict"][0]
