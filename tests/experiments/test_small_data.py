"""The small-data experiment on a few digits."""

from dataclasses import replace

import pytest
import torch
from small_data import EXPERIMENT, Config, Job, candidates, choose, epochs_of, jobs, parts_of, reported, train
from small_data_setup import CONDITIONS, METHODS, PROTOCOL, build, objective, training_images

from lab.experiment import run
from odenets.least_action import ActionPenalty, LeastAction
from odenets.normalization import StageBatchNorm
from odenets.training import datasets
from odenets.training.evaluation import Evaluation
from odenets.training.runs import read_summary

TINY = Config(workers=1, quick=True)


def test_a_run_leaves_its_table(tmp_path, capsys):
    run(EXPERIMENT, replace(TINY, validation_size=50, test_size=50, output=tmp_path))
    summary = read_summary(tmp_path)
    rows = summary["results"]["rows"]
    assert [row["method"] for row in rows] == [*METHODS, *METHODS, *PROTOCOL, *PROTOCOL, *PROTOCOL]
    assert all(0 <= row["accuracy"]["mean"] <= 100 for row in rows)
    assert "p = " in capsys.readouterr().out
    assert summary["seeds"] == [0, 1]


def test_settings_are_chosen_on_validation_alone():
    tuned = [
        {"method": method, "learning_rate": rate, "weight": 0.0, "last": [value], "recalibrated": [1 - value]}
        for method in METHODS
        for rate, value in ((0.01, 0.2), (0.1, 0.9))
    ]
    chosen = choose(tuned)
    assert chosen["vanilla", "last"]["learning_rate"] == 0.1
    assert chosen["vanilla", "recalibrated"]["learning_rate"] == 0.01
    tuning, shown = candidates(Config(), "standard", 100), reported(Config(), "standard", 100, chosen)
    assert all(job.tuning for job in tuning)
    assert not {seed for job in tuning for seed in job.seeds} & {seed for job in shown for seed in job.seeds}
    assert all(sum(len(job.seeds) for job in shown if job.method == method) >= 20 for method in METHODS)


def test_parts_are_disjoint():
    pool, validation, test = parts_of(Config())
    images, theirs = datasets.load("digits")
    assert torch.equal(test.x, theirs.x)
    found, whole = (
        [sorted(map(tuple, p.flatten(1).tolist())) for p in x] for x in ([pool.x, validation.x], [images.x])
    )
    assert sorted(found[0] + found[1]) == whole[0]
    assert len(validation) == 300


def test_rates_are_chosen_on_validation_images_and_accuracies_are_those_on_test_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("small_data_setup.evaluate", lambda _, batches: seen.append(batches.data) or Evaluation(0, 1))
    _, validation, test = parts_of(TINY)
    for tuning, images in ((True, validation), (False, test)):
        seen.clear()
        config = replace(TINY, epochs=1, output=tmp_path / str(tuning))
        train(config, Job("standard", 50, "vanilla", 0.1, 0.0, (0, 1), tuning=tuning), None, print)
        assert len(seen) == 4
        assert all(torch.equal(part.x, images.x) for part in seen)


def test_the_methods():
    job = Job("standard", 100, "least action", 0.1, 10.0, (0, 1), tuning=False)
    found = objective(Config(), job)
    assert isinstance(found, LeastAction)
    assert (found.multiplier.item(), found.tau, found.every, found.weigh) == (10, 1, 5, "divide")
    theirs = objective(Config(), replace(job, method="thesis: least action"))
    assert (theirs.multiplier.item(), theirs.tau, theirs.every, theirs.weigh) == (5, 1, 5, "multiply")
    theirs = objective(Config(dataset="cifar10"), replace(job, method="thesis: least action"))
    assert (theirs.multiplier.item(), theirs.tau, theirs.every) == (0.1, 0.1, 50)
    assert objective(Config(), replace(job, method="thesis: least action, divided")).weigh == "divide"  # type: ignore[union-attr]
    assert isinstance(objective(Config(), replace(job, method="fixed weight")), ActionPenalty)
    pool = parts_of(Config())[0]
    same = zip(build(Config(), job, pool, 3).parameters(), build(Config(), job, pool, 3).parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in same)


@pytest.mark.parametrize("method", PROTOCOL)
def test_the_protocol_draws_orthogonal_weights_of_gain_a_hundredth(method):
    network = build(Config(), Job("standard", 100, method, 0.01, 0.0, (0,), tuning=False), parts_of(Config())[0], 3)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            W = layer.weight.detach().flatten(1)
            W = W if W.shape[0] <= W.shape[1] else W.T
            torch.testing.assert_close(W @ W.T, 1e-4 * torch.eye(len(W)), atol=1e-9, rtol=0)
            assert layer.bias is None or not layer.bias.any()


def test_the_protocol_trains_thirty_epochs_whatever_the_others_do_and_can_run_alone():
    first = next(jobs(Config(sizes=(50,), instances=2, epochs=7, protocol_only=True)))
    assert {job.method for job in first} == {*PROTOCOL}
    assert {epochs_of(Config(epochs=7), job) for job in first} == {30}


def test_the_conditions():
    pool = parts_of(Config())[0]
    job = Job("label noise", 500, "vanilla", 0.1, 0.0, (0,), tuning=False)
    clean, noisy = (training_images(pool, j, 3) for j in (replace(job, condition="standard"), job))
    assert torch.equal(clean.x, noisy.x)
    assert 0.25 < (clean.y != noisy.y).float().mean() < 0.47  # 0.4 drawn anew, a tenth of which hit the same class
    built = {name: build(Config(), replace(job, condition=name), pool, 0) for name in CONDITIONS}
    assert built["deep"].depth == 30
    assert built["wide"].flows[0](torch.rand(1, 64, 4, 4)).shape == (1, 64, 4, 4)
    assert any(isinstance(m, StageBatchNorm) for m in built["standard"].modules())
    assert not any(isinstance(m, StageBatchNorm) for m in built["no batch norm"].modules())
    assert built["bad start"].flows[0].blocks[0].fields[0].conv1.weight.std() > 0.4  # type: ignore[union-attr]


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
