"""The experiment on accuracy after each module, on a few digits."""

from dataclasses import replace

import torch
from module_depth import CONDITIONS, EXPERIMENT, Config, best, build, candidates, choose, parts_of, training_images

from lab.experiment import run
from odenets.training.runs import read_summary

TINY = Config(workers=1, quick=True)


def test_a_run_leaves_its_table_and_figures(tmp_path):
    run(EXPERIMENT, replace(TINY, validation_size=50, output=tmp_path / "run"))
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert [(row["condition"], row["method"]) for row in rows] == [("few images", "VanGL"), ("few images", "TRGL")]
    for name in ("fig_18_few_images", "fig_43"):
        assert (tmp_path / "run" / "figures" / f"{name}.png").exists()


def test_every_tau_is_reported_under_the_first_condition():
    config = Config(conditions=("standard", "label noise"), taus=(0.1, 1.0), learning_rates=(0.05,))
    tuned = [{**vars(job), "validation": [job.tau if job.tau < 1 else 0.05]} for job in candidates(config)]
    assert best(tuned, "standard", config.taus) == (0.05, 0.1)
    found = {(job.condition, job.tau) for job in choose(config, tuned)}
    assert found == {
        ("standard", 0.0),
        ("standard", 0.1),
        ("standard", 1.0),
        ("label noise", 0.0),
        ("label noise", 0.1),
    }
    assert not {job.seed for job in choose(config, tuned)} & {job.seed for job in candidates(config)}


def test_conditions_are_as_said():
    pool, *_ = parts_of(Config())
    clean, noisy = (training_images(pool, CONDITIONS[name], 3) for name in ("standard", "label noise"))
    assert torch.equal(clean.x, noisy.x)
    assert 0.2 < (clean.y != noisy.y).float().mean() < 0.5
    shared = build(Config(), CONDITIONS["same head"], pool, 0)
    assert len({id(module.head) for module in shared.modules_in_order}) == 1
    assert build(Config(), CONDITIONS["20 modules"], pool, 0).K == 20
