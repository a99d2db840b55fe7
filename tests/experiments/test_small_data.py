"""The small-data experiment on a few digits."""

from dataclasses import replace

import pytest
import torch
from small_data import candidates, choose, main, reported
from small_data_setup import CONDITIONS, METHODS, Config, Job, build, objective, parts_of, training_images

from odenets.least_action import ActionPenalty, LeastAction
from odenets.normalization import StageBatchNorm
from odenets.runs import read_summary

TINY = Config(workers=1, quick=True)


def test_a_run_prints_its_table_and_goes_on(tmp_path, capsys):
    main(replace(TINY, output=tmp_path / "run"))
    shown = capsys.readouterr().out
    rows = read_summary(tmp_path / "run")["results"]["rows"]
    assert [row["method"] for row in rows] == [*METHODS, *METHODS, "thesis: vanilla", "thesis: least action"]
    assert all(0 <= row["accuracy"]["mean"] <= 100 for row in rows)
    assert "p = " in shown
    main(replace(TINY, output=tmp_path / "run", resume=True))
    assert capsys.readouterr().out == shown


def test_settings_are_chosen_on_validation_alone():
    tuned = [
        {"method": method, "learning_rate": rate, "weight": 0.0, "last": [value], "recalibrated": [1 - value]}
        for method in METHODS
        for rate, value in ((0.01, 0.2), (0.1, 0.9))
    ]
    chosen = choose(tuned)
    assert chosen["vanilla", "last"]["learning_rate"] == 0.1
    assert chosen["vanilla", "recalibrated"]["learning_rate"] == 0.01
    jobs = candidates(Config(), "standard", 100)
    assert all(job.tuning for job in jobs)
    found = reported(Config(), "standard", 100, chosen)
    assert not {seed for job in jobs for seed in job.seeds} & {seed for job in found for seed in job.seeds}
    assert all(sum(len(job.seeds) for job in found if job.method == method) >= 20 for method in METHODS)


def test_parts_are_disjoint():
    pool, validation, test = parts_of(Config())
    everything = torch.cat([part.x.flatten(1) for part in (pool, validation, test)])
    assert len(everything) == 1797
    assert len(validation) == 300


def test_the_methods():
    job = Job("standard", 100, "least action", 0.1, 10.0, (0, 1), tuning=False)
    found = objective(job)
    assert isinstance(found, LeastAction)
    assert (found.multiplier.item(), found.tau, found.every, found.weigh) == (10, 1, 5, "divide")
    theirs = objective(replace(job, method="thesis: least action"))
    assert (theirs.multiplier.item(), theirs.weigh) == (5, "multiply")
    assert isinstance(objective(replace(job, method="fixed weight")), ActionPenalty)
    pool = parts_of(Config())[0]
    same = zip(
        build(Config(), CONDITIONS["standard"], pool, 3).parameters(),
        build(Config(), CONDITIONS["standard"], pool, 3).parameters(),
        strict=True,
    )
    assert all(torch.equal(p, q) for p, q in same)


def test_the_conditions():
    pool = parts_of(Config())[0]
    job = Job("label noise", 500, "vanilla", 0.1, 0.0, (0,), tuning=False)
    clean, noisy = (training_images(pool, j, 3) for j in (replace(job, condition="standard"), job))
    assert torch.equal(clean.x, noisy.x)
    assert 0.25 < (clean.y != noisy.y).float().mean() < 0.47  # 0.4 drawn anew, a tenth of which hit the same class
    built = {name: build(Config(), condition, pool, 0) for name, condition in CONDITIONS.items()}
    assert built["deep"].depth == 30
    assert built["wide"].flows[0](torch.rand(1, 64, 4, 4)).shape == (1, 64, 4, 4)
    assert any(isinstance(m, StageBatchNorm) for m in built["standard"].modules())
    assert not any(isinstance(m, StageBatchNorm) for m in built["no batch norm"].modules())
    assert built["bad start"].flows[0].blocks[0].fields[0].conv1.weight.std() > 0.4  # type: ignore[union-attr]


def test_errors():
    with pytest.raises(ValueError, match="conditions must be among standard, label noise"):
        Config(conditions=("noise",))
    with pytest.raises(ValueError, match="instances and tuning"):
        Config(instances=1)
    with pytest.raises(ValueError, match="sizes"):
        Config(sizes=(5,))
    with pytest.raises(ValueError, match="together must be at least 1"):
        Config(together=0)


def test_settings_are_chosen_on_the_mean_over_all_groups_of_tuning_seeds():
    config = Config(tuning=5, together=2, learning_rates=(0.1,), weights=(1.0,), lambdas=(1.0,))
    assert [job.seeds for job in candidates(config, "standard", 100) if job.method == "vanilla"] == [
        (10_000, 10_001),
        (10_002, 10_003),
        (10_004,),
    ]
    tuned = [
        {"method": method, "learning_rate": rate, "weight": 0.0, "last": last, "recalibrated": last[::-1]}
        for method in METHODS
        for rate, last in ((0.1, [0.9, 0.9]), (0.1, [0.0]), (0.3, [0.7, 0.7]), (0.3, [0.7]))
    ]
    assert {setting["learning_rate"] for setting in choose(tuned).values()} == {0.3}
