import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from odenets.training.runs import Run, read_config, read_metrics, read_summary


def test_a_run_is_kept(tmp_path):
    run = Run(tmp_path / "run", {"epochs": 3, "seeds": (0, 1)})
    run.log([{"epoch": 1, "h": "0.5 0.5", "loss": 0.1 + 0.2}, {"epoch": 2, "h": "1, 2", "loss": None}])
    assert read_metrics(run.folder) == [
        {"epoch": "1", "h": "0.5 0.5", "loss": "0.30000000000000004"},
        {"epoch": "2", "h": "1, 2", "loss": ""},
    ]
    assert not run.finished
    with pytest.raises(FileNotFoundError, match=r"no finished run: summary.json is missing"):
        read_summary(run.folder)
    run.finish({"accuracy": 0.9}, seeds=[0, 1])
    assert run.finished
    assert read_summary(run.folder)["results"] == {"accuracy": 0.9}
    assert read_summary(run.folder)["environment"]["versions"]["torch"] in torch.__version__
    assert read_config(run.folder)["seeds"] == [0, 1]


def test_numpy_s_and_torch_s_numbers_are_written_as_numbers(tmp_path):
    run = Run(tmp_path / "run", {"rate": np.float32(0.5)})
    run.log([{"a": np.float64(0.1), "b": np.float32(0.5), "c": torch.tensor(3), "d, e": np.int64(2), "f": "x\ry"}])
    assert read_metrics(run.folder) == [{"a": "0.1", "b": "0.5", "c": "3", "d, e": "2", "f": "x\ry"}]
    run.finish({"a": np.float32(0.5), "b": np.arange(2), "c": torch.ones(1)}, seeds=[0])
    assert read_summary(run.folder)["results"] == {"a": 0.5, "b": [0, 1], "c": [1.0]}
    assert read_config(run.folder) == {"rate": 0.5}


@pytest.mark.parametrize(("config", "changed"), [({"a": math.nan}, "b"), ({"a": 1, "b": None}, "a")])
def test_what_differs_of_a_configuration_is_named(tmp_path, config, changed):
    Run(tmp_path / "run", {"a": math.nan, "b": None})
    Run(tmp_path / "run", {"b": None, "a": math.nan}, resume=True)
    with pytest.raises(ValueError, match=rf"another configuration: \['{changed}'\] differ"):
        Run(tmp_path / "run", config, resume=True)


def test_processes_of_a_group_may_begin_a_run_together(tmp_path, monkeypatch):
    (tmp_path / "config.json.7.partial").touch()  # another has begun to write
    assert Run(tmp_path, {"epochs": 3}, resume=True).folder == tmp_path
    look = Path.iterdir

    def meanwhile(path):
        before = [*look(path)]
        other.write("config.json", b'{"epochs": 3}')  # another is done right after we have looked
        (path / "module1.pt").touch()
        return iter(before)

    other = Run(tmp_path / "run", {"epochs": 3})
    (other.folder / "config.json").rename(other.folder / "config.json.7.partial")
    monkeypatch.setattr(Path, "iterdir", meanwhile)
    assert read_config(Run(tmp_path / "run", {"epochs": 3}, resume=True).folder) == {"epochs": 3}


def test_an_existing_run_is_not_touched(tmp_path):
    Run(tmp_path / "run", {"epochs": 3})
    with pytest.raises(FileExistsError, match=r"already holds a run: pass resume=True or choose another"):
        Run(tmp_path / "run", {"epochs": 4})
    with pytest.raises(ValueError, match=r"another configuration: \['epochs'\] differ"):
        Run(tmp_path / "run", {"epochs": 4}, resume=True)
    assert read_metrics(Run(tmp_path / "run", {"epochs": 3}, resume=True).folder) == []
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no run"):
        Run(tmp_path / "other", {})


def test_rows_may_gain_columns(tmp_path):
    run = Run(tmp_path / "run", {})
    run.log([{"epoch": 1}, {"epoch": 2, "edits": "flow 0 block 0: merged, h 1 -> 2"}])
    assert read_metrics(run.folder) == [
        {"epoch": "1", "edits": ""},
        {"epoch": "2", "edits": "flow 0 block 0: merged, h 1 -> 2"},
    ]


def test_states_hold_no_code(tmp_path):
    run = Run(tmp_path / "run", {})
    assert run.load_state() is None
    run.save_state({"x": torch.ones(2), "epoch": 3})
    assert run.load_state()["epoch"] == 3
    torch.save({"x": Run}, tmp_path / "run" / "resume.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run.load_state()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    """As a schedule leaves it whose function is an object with an array."""

    class Warmup:
        def __init__(self):
            self.rates = np.linspace(0.1, 1.0, 5)

        def __call__(self, epoch):
            return self.rates[min(epoch, 4)]

    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], 0.1), Warmup())
    run = Run(tmp_path / "run", {})
    with pytest.raises(TypeError, match=r"state\['schedule'\]\['lr_lambdas'\]\[0\]\['rates'\] must be .* got ndarray"):
        run.save_state({"schedule": schedule.state_dict()})
    assert run.load_state() is None
    run.save_state({"milestones": Counter([1, 2]), "size": torch.Size([2]), "bias": torch.nn.Parameter(torch.ones(1))})
    assert run.load_state()["size"] == (2,)


def test_states_may_hold_numpy_s_scalars(tmp_path):
    """As a schedule leaves them that calls NumPy."""
    run = Run(tmp_path / "run", {})
    run.save_state({"lr": np.float64(0.5), "steps": [np.int64(3), (np.float32(0.25), "a")], "rows": torch.ones(2)})
    state = run.load_state()
    assert state is not None
    assert (state["lr"], state["steps"]) == (0.5, [3, (0.25, "a")])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config must be a mapping, .* got NoneType"),
        ({"a": [torch.ones(1)]}, r"config must hold plain values, got Tensor \(1,\): .tolist\(\)"),
    ],
)
def test_a_configuration_is_of_plain_values(tmp_path, config, message):
    with pytest.raises(TypeError, match=message):
        Run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
