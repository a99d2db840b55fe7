"""The study of steps per sample, on a few digits."""

from dataclasses import replace

import pytest
import torch
from sample_steps import EXPERIMENT, best, jobs, summarize, verdict
from sample_steps_setup import EXITS, RULES, STEPS, Config, Job, build, measure, parts_of

from lab.experiment import Outcome, run
from odenets.training.runs import read_summary

TINY = Config(
    epochs=1, train_size=100, test_size=50, depth=4, budgets=(2, 3), rounds=2, permutations=1, measured=20, workers=1
)


def test_a_run_leaves_its_table_and_figures(tmp_path, capsys):
    run(EXPERIMENT, replace(TINY, seeds=(0,), output=tmp_path))
    rows = read_summary(tmp_path)["results"]["rows"]
    assert {row["arm"] for row in rows} == {"plain", "coarsening"}
    assert {row["way"] for row in rows} >= {"steps per sample", "at random", "merged for all", "exit", "no blocks"}
    assert (tmp_path / "figures/plain.png").exists()
    assert (tmp_path / "plain-seed0/weights.safetensors").exists()
    assert "steps per sample" in capsys.readouterr().out


@pytest.mark.slow
def test_every_way_keeps_to_its_budget_on_validation_images():
    config = Config(depth=4, budgets=(2, 3), rounds=6, permutations=1, test_size=100, total_time=1.0)
    parts = parts_of(config)
    found = measure(config, build(config, parts.train, 0).eval(), parts.train, parts.validation, parts.test)
    assert set(found["uniform"]) == set(RULES)
    assert found["evaluations"] == 12
    for variant in found["samples"].values():
        for budget, result in variant.items():
            assert result is None or result["evaluations"] < 3 * int(budget) + 1
    for of_heads in found["exit"].values():
        for budget, result in of_heads.items():
            assert result["evaluations"] < 3 * int(budget) + 1


def of(seed, own, random, even, exit, validation=0.9):
    """The results of a network with these accuracies on test images."""
    step = {"validation": validation, "test": own, "random": random, "evaluations": 6.0, "spread": 1.0, "rejected": 0.1}
    return {
        "arm": "plain", "seed": seed, "depth": 4, "evaluations": 12,
        "whole": {"test": 0.95}, "removed": {"test": 0.2},
        "uniform": {
            rule: {"2": {"validation": 0.5 + (rule == "even, first"), "test": even if rule == "even, first" else 1.0}}
            for rule in RULES
        },
        "samples": {
            "rms": {"2": step},
            "prediction": {"2": step | {"validation": 0.99, "test": 0.0} if seed else None},
            **{name: {"2": step | {"validation": validation / 2}} for name in STEPS if "aligned" in name},
        },
        "exit": {name: {"2": {"validation": 0.9, "test": exit, "evaluations": 5.5}} for name in EXITS},
    }  # fmt: skip


def test_variants_are_chosen_on_validation_images_and_differences_are_paired():
    config = Config(seeds=(0, 1), depth=4, budgets=(2,))
    results = [of(0, 0.8, 0.7, 0.75, 0.9), of(1, 0.9, 0.796, 0.846, 0.996)]
    assert best(results, "steps per sample") == "rms"  # the other has no steps of that budget for one seed
    assert best(results, "merged for all") == "even, first"
    rows = summarize(config, results)
    mean = {(row["way"], row.get("variant")): row for row in rows if row["budget"] == "mean"}
    assert mean["at random", "rms"]["difference"].mean == pytest.approx(10.2)
    assert mean["merged for all", "even, first"]["difference"].mean == pytest.approx(5.2)
    assert mean["exit", "fitted heads"]["difference"].mean == pytest.approx(-9.8)
    assert mean["merged for all", "even, first"]["evaluations"] == 6
    words = [line.partition(": ")[2].split(" (")[0] for line in verdict(config, Outcome(rows))[1:]]
    assert words == ["ahead of dealt at random", "ahead of merged for all samples", *["behind early exit"] * 2]


def test_networks_of_one_seed_begin_alike_in_every_arm():
    config = Config(depth=2, budgets=(1,))
    first = next(jobs(config))
    assert first == [Job("plain", 0), Job("coarsening", 0)]
    train = parts_of(config).train
    pairs = zip(build(config, train, 3).parameters(), build(config, train, 3).parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_errors():
    with pytest.raises(ValueError, match="budgets must be between 1 and depth - 1, 3, got"):
        Config(depth=4, budgets=(4,))
    with pytest.raises(ValueError, match="arms must be among plain, coarsening"):
        Config(arms=("other",))
