from typing import Any

import pytest
from depth_search import EXPERIMENT, Config, deepening, halving, search, ways_of

from lab.experiment import run
from odenets.training.runs import read_metrics, read_summary

TINY: dict[str, Any] = {
    "seeds": (0, 1),
    "depths": (1, 2),
    "tolerances": (3e-3, 1e-2),
    "epochs": 2,
    "train_size": 100,
    "test_size": 50,
    "workers": 1,
}


def trained(depth, curve, test, checks=0, way="fixed", tolerance=3e-3, per_epoch=100):
    """A result of four epochs on a hundred samples, a field evaluation for each block."""
    spent = [per_epoch * depth * (epoch + 1) for epoch in range(len(curve))]
    words = {"adaptive": f"adaptive from {depth}, {tolerance:g}"}.get(way, f"{way} {depth}")
    return {
        "name": words, "network": words, "way": way, "depth": depth, "final_depth": depth, "tolerance": tolerance,
        "validated": curve, "validation": curve[-1], "solution": test, "spent": spent, "check_evaluations": checks,
        "training_evaluations": spent[-1], "evaluations_per_forward": depth, "diverged": False, "seed": 0,
    }  # fmt: skip


ONE = trained(1, [0.5, 0.6, 0.7, 0.7], 0.71)
TWO = trained(2, [0.4, 0.7, 0.7, 0.8], 0.75)
FOUR = trained(4, [0.6, 0.5, 0.7, 0.75], 0.9)
EIGHT = trained(8, [0.3, 0.5, 0.7, 0.85], 0.6)


def test_the_search_takes_the_best_on_validation_and_costs_all_trainings_and_their_choice():
    way = search([ONE, TWO, FOUR, EIGHT], validation=10)
    assert (way.depth, way.accuracy) == (8, 0.6)
    assert way.spent == 4 * 100 * 15 + 10 * 15


def test_of_equals_the_search_takes_the_first():
    assert search([ONE, trained(2, [0.7], 0.1)], 10).depth == 1


def test_halving_trains_on_only_what_is_left():
    way = halving([ONE, TWO, FOUR, EIGHT], validation=10, epochs=4)
    assert way.depth == 1  # of one and four blocks, the better half after one epoch, it is ahead after two
    after = 100 * 15, 100 * (1 + 4), 2 * 100 * 1
    assert way.spent == sum(after) + 10 * (15 + 5 + 1)


def test_deepening_ends_at_the_first_that_is_no_better():
    way = deepening([EIGHT, FOUR, TWO, ONE], validation=10)
    assert way.depth == 2
    assert way.spent == 4 * 100 * 7 + 10 * 7  # four blocks were trained to know it; eight were not


def test_an_adaptive_training_costs_its_checks_and_a_chosen_tolerance_all_of_its_trainings():
    own = trained(1, [0.7] * 4, 0.8, checks=7, way="adaptive")
    other = trained(1, [0.9] * 4, 0.6, checks=5, way="adaptive", tolerance=1e-2)
    ways = ways_of(Config(tolerances=(3e-3, 1e-2), epochs=4), [ONE, TWO, own, other], validation=10)
    assert (ways["adaptive from 1"].accuracy, ways["adaptive from 1"].spent) == (0.8, 407)
    chosen = ways["adaptive from 1, tolerance chosen"]
    assert (chosen.accuracy, chosen.spent) == (0.6, 407 + 405 + 10 + 10)
    assert ways["adaptive from 1, 0.01"].spent == 405


def test_the_run_folder_holds_everything(tmp_path):
    run(EXPERIMENT, Config(**TINY, output=tmp_path / "run"))
    rows = {row["way"]: row for row in read_summary(tmp_path / "run")["results"]["rows"]}
    fixed = 2 * 80 * 3, 2 * 80 * 6  # epochs, samples, field evaluations a pass
    assert rows["fixed 1"]["evaluations"]["values"] == [fixed[0]] * 2
    assert rows["search"]["evaluations"]["values"] == [sum(fixed) + 20 * 9] * 2
    assert rows["search"]["share"]["mean"] == 1
    adaptive = read_summary(tmp_path / "run/search-adaptive-from-2-0.003-T1-seed1")["results"]
    spent = adaptive["training_evaluations"] + adaptive["check_evaluations"]
    assert rows["adaptive from 2"]["evaluations"]["values"][1] == spent
    assert rows["adaptive from 2"]["depths"][1] == adaptive["final_depth"]
    assert {"doubling to 2", "stacking to 2", "successive halving", "adaptive from 1, 0.01"} <= rows.keys()
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "run/search-doubling-to-2-T1-seed0")]
    assert rates == ["0.02", "0.02"]  # of two levels, an epoch each, both begin anew
    assert (tmp_path / "run/figures/cost.png").exists()


def test_the_rule_is_among_the_tolerances():
    with pytest.raises(ValueError, match=r"tolerances must hold the rule's own, 0\.003"):
        Config(tolerances=(0.1,))
