"""The experiment on depth without batch norm, on a few digits."""

from dataclasses import replace

import pytest
import torch
from no_batchnorm import EXPERIMENT, METHODS, Config, Job, build, choose, jobs, objective, parts_of

from lab.experiment import run
from odenets.least_action import LeastAction
from odenets.training.runs import read_summary

JOB = Job(2, "vanilla", 0.01, 0.0, (0,), tuning=False)


def test_a_run_leaves_its_table_and_figure(tmp_path):
    few = {"depths": (1, 2), "instances": 2, "tuning": 2, "train_size": 50, "epochs": 1}
    run(EXPERIMENT, Config(**few, learning_rates=(0.01,), lambdas=(1.0,), workers=1, output=tmp_path))
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [(row["depth"], row["method"]) for row in rows] == [(d, m) for d in (1, 2) for m in METHODS]
    assert (tmp_path / "figures" / "fig_14.png").exists()


def test_the_networks_are_as_said_and_no_convolution_is_dead():
    train = parts_of(Config()).train
    for method in METHODS:
        net = build(Config(), train, replace(JOB, method=method), 0)
        assert set(net.h) == {0.1 if method == "h = 0.1" else 1.0}
        norms = [m for m in net.flows[0].modules() if "Norm" in type(m).__name__ and list(m.parameters())]
        assert bool(norms) == (method == "batch norm")
        net(train.x[:16]).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in net.flows[0].parameters())
    found = objective(replace(JOB, method="least action", first_lambda=0.1))
    assert isinstance(found, LeastAction)
    assert torch.equal(found.multiplier, torch.tensor(0.1, dtype=torch.float64))


def test_settings_are_chosen_per_depth():
    config = Config(depths=(1, 2))
    tuning = next(jobs(config))
    tuned = [
        {"depth": j.depth, "method": j.method, "learning_rate": j.learning_rate, "first_lambda": j.first_lambda}
        | {"accuracy": [j.learning_rate * (1 if j.depth == 1 else -1)]}
        for j in tuning
    ]
    chosen = {(job.depth, job.method): job for job in choose(config, tuned)}
    assert chosen[1, "vanilla"].learning_rate == max(config.learning_rates)
    assert chosen[2, "vanilla"].learning_rate == min(config.learning_rates)
    assert not {s for job in tuning for s in job.seeds} & {s for job in chosen.values() for s in job.seeds}


def test_errors():
    with pytest.raises(ValueError, match="depths"):
        Config(depths=(0,))
    with pytest.raises(ValueError, match="instances and tuning"):
        Config(tuning=1)
