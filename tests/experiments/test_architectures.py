"""The comparison of architectures, on a few digits."""

from dataclasses import replace

import pytest
import torch
from architectures import EXPERIMENT, choose, largest_size, summarize, verdict
from architectures_setup import ARCHITECTURES, Config, Job, build, measure, sizes_of

from lab.experiment import Outcome, run
from lab.training import parts_of
from odenets.training.runs import read_summary

TINY = Config(seeds=(0,), epochs=1, train_size=100, test_size=50, rates=(0.1,), parameters=8000, workers=1)
FEW = ("ResNet (Euler)", "LM-ResNet", "FractalNet")


def test_a_run_leaves_its_table_and_figures(tmp_path, capsys):
    run(EXPERIMENT, replace(TINY, architectures=FEW, output=tmp_path))
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [row["architecture"] for row in rows] == [*FEW, *FEW]
    assert {row["budget"] for row in rows} == {"parameters", "evaluations"}
    for name in ("accuracy_parameters", "norms_evaluations"):
        assert (tmp_path / f"figures/{name}.png").exists()
    assert "residual network" in capsys.readouterr().out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_keeps_to_its_budgets(name):
    config = Config(train_size=100, test_size=50)
    data = parts_of(config)
    wide, deep = (build(config, Job(name, budget, 0.1, 0), data.train) for budget in ("parameters", "evaluations"))
    assert sum(p.numel() for p in wide.parameters()) <= config.parameters
    assert deep.evaluations <= config.evaluations
    channels, blocks = sizes_of(config, name, "parameters")
    wider = build(replace(config, parameters=10**6), Job(name, "parameters", 0.1, 0), data.train)
    assert blocks == config.blocks
    assert next(iter(wider.steps(data.test.x[:2]))).x0.shape[1] > channels


def test_measuring_leaves_a_network_as_it_was():
    config = Config(train_size=100, test_size=50)
    data = parts_of(config)
    network = build(config, Job("bs23", "parameters", 0.1, 0), data.train).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = measure(config, network, data.test)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert found["evaluations"] == network.evaluations  # of an explicit method
    assert len(found["norms"]) == network.depth
    assert found["memory"] > 0


def of(name, budget="parameters", seed=0, size=1.0, **found):
    job = {"architecture": name, "budget": budget, "rate": 0.1, "seed": seed, "size": size, "tuning": False}
    rest = {"parameters": 10, "depth": 2, "channels": 4, "evaluations": 2, "memory": 1.0, "inverse": None}
    rest |= {"noise": 0.5, "attack": 0.5, "action": 1.0, "norms": [1.0, 2.0], "diverged": False, "validation": 0.9}
    return job | rest | found


def test_the_largest_size_is_the_last_before_one_that_does_not_learn():
    rows = [of("LM-ResNet", "step size", size=size) for size in (1.0, 4.0)]
    rows += [of("LM-ResNet", "step size", size=16.0, diverged=True, validation=0.0)]
    rows += [of("LM-ResNet", "step size", size=64.0)]
    assert largest_size(rows) == 4.0


def test_differences_are_paired_and_a_diverged_network_is_right_on_nothing():
    config = Config(architectures=FEW[:2], budgets=("parameters",), seeds=(0, 1, 2))
    results = [of(FEW[0], seed=seed, test=0.5 + 0.1 * seed) for seed in range(3)]
    results += [of(FEW[1], seed=seed, test=0.7 + 0.1 * seed) for seed in range(2)]
    results += [of(FEW[1], seed=2, diverged=True)]
    rows = summarize(config, results)
    assert rows[1]["accuracy"].values == pytest.approx((70, 80, 0))
    assert rows[1]["difference"].values == pytest.approx((20, 20, -70))
    assert rows[1]["diverged"] == 1
    assert verdict(config, Outcome(rows, None, {})) == [
        "on one budget of parameters, no different from the residual network: LM-ResNet"
    ]


def test_rates_are_those_best_on_validation_images():
    config = Config(architectures=FEW[:2], rates=(0.1, 0.2))
    tuned = [
        of(name, seed=10_000, tuning=True, rate=rate, validation=value)
        for name, rate, value in [(FEW[0], 0.1, 0.9), (FEW[0], 0.2, 0.8), (FEW[1], 0.1, 0.1), (FEW[1], 0.2, 0.3)]
    ]
    assert choose(config, tuned) == {("parameters", FEW[0]): 0.1, ("parameters", FEW[1]): 0.2}
