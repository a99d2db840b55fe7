import pytest

from lab.runs import Run, finished_trainings
from odenets.training.runs import read_metrics, read_summary


def test_a_run_of_trainings_is_closed_once(tmp_path):
    run = Run(tmp_path / "run", {"epochs": 1})
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        finished_trainings(run.folder)
    results = []
    for seed in (1, 0):
        training = Run(run.folder / f"net-{seed}", {"seed": seed})
        training.log([{"epoch": 1, "loss": 0.5 + seed}])
        training.finish({}, seeds=[seed])
        results.append({"name": f"net-{seed}", "seed": seed, "way": "a"})
    assert [path.name for path in finished_trainings(run.folder)] == ["net-0", "net-1"]
    shown = run.conclude(results, ("way", "seed"), [{"accuracy": 0.9}], "| 0.9 |", ["it works"])
    assert (run.folder / "table.md").read_text() == "| 0.9 |\n\nit works\n"
    assert shown.startswith("| 0.9 |\n\nit works\n")
    assert [row["loss"] for row in read_metrics(run.folder)] == ["1.5", "0.5"]
    summary = read_summary(run.folder)
    assert summary["results"] == {"rows": [{"accuracy": 0.9}], "verdict": ["it works"]}
    assert summary["seeds"] == [0, 1]
    run.conclude(results, ("way", "seed"), [], "", [])
    assert read_summary(run.folder) == summary
