from dataclasses import replace

import pytest
import torch
from evaluations import EXPERIMENT, chosen, summarize, verdict
from evaluations_setup import ARMS, Config, Job, build, measured, objective, parts_of, tried

from lab.experiment import run
from lab.results import Outcome
from odenets.least_action import ActionPenalty
from odenets.penalties import ErrorPenalty, Penalty
from odenets.training.objectives import CrossEntropy
from odenets.training.runs import read_metrics, read_summary

TINY = Config(
    seeds=(0, 1, 2), choosing=2, epochs=1, train_size=100, test_size=50, features=8, workers=1,
    times=(0.5,), actions=(0.1, 1.0), errors=(100.0,), accelerations=(1.0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(EXPERIMENT, replace(TINY, output=folder))
    return folder


def test_every_arm_is_trained_and_the_chosen_settings_on_the_further_seeds(folder):
    rows = read_summary(folder)["results"]["rows"]
    assert {row["arm"] for row in rows} == {*ARMS}
    assert {row["test"]["n"] for row in rows if row["chosen"]} == {3}
    assert {row["test"]["n"] for row in rows if not row["chosen"]} <= {2}
    assert {row["arm"]: row["evaluations_1e-05"]["mean"] for row in rows}["no flow"] == 0
    assert len(read_metrics(folder)) == sum(row["test"]["n"] for row in rows)
    assert (folder / "figures/trade_off.png").exists()


@pytest.mark.parametrize(
    ("weights", "kinds"),
    [
        ({}, [CrossEntropy]),
        ({"action": 1.0}, [ActionPenalty, CrossEntropy]),
        ({"error": 1.0, "action": 0.1}, [ErrorPenalty, ActionPenalty, CrossEntropy]),
        ({"acceleration": 1.0}, [Penalty, CrossEntropy]),
    ],
)
def test_penalties_go_around_the_task(weights, kinds):
    one = objective(Job("arm", 0, 1.0, **weights))
    for kind in kinds:
        assert type(one) is kind
        one = one.task


def test_arms_of_a_seed_begin_with_the_same_weights_and_are_nothing_without_a_flow():
    parts = parts_of(TINY)
    networks = [build(TINY, parts.train, Job(arm, 0, **tried(TINY, arm)[0])) for arm in ARMS]
    first = networks[0].state_dict()
    assert all(torch.equal(first[name], other) for n in networks[1:] for name, other in n.state_dict().items())
    x = parts.train.x[:4]
    no_flow = networks[-1].eval()
    torch.testing.assert_close(no_flow(x), no_flow.head(no_flow.encoder(x)))
    mixed = (x[:1] + x[1:2]) / 2
    z = no_flow(torch.cat([x[:2], mixed]))
    torch.testing.assert_close(z[2], (z[0] + z[1]) / 2)  # affine


def test_evaluations_are_counted_by_hand():
    parts = parts_of(TINY)
    job = Job("plain", 0, 1.0)
    network, calls = build(TINY, parts.train, job), []
    found = measured(TINY, network, job, parts.test)
    network.flows[0].field.register_forward_hook(lambda *_: calls.append(1))
    again = measured(TINY, network, job, parts.test)
    assert found == again
    solves = [value for name, value in found.items() if name.startswith("evaluations")]
    assert len(solves) == 3
    assert sum(solves) + network.flows[0].evaluations == len(calls)
    assert found["without"] <= 0.5


def test_the_cost_of_training_is_per_batch(folder):
    rows = [row for row in read_metrics(folder) if row["arm"] == "no flow"]
    assert {float(row["calls"]) for row in rows} == {0.0}
    assert all(float(row["processor_seconds"]) > 0 for row in read_metrics(folder))
    plain = [read_summary(path)["results"] for path in (folder / "plain_T1").iterdir()]
    own = [float(row["processor_seconds"]) for row in read_metrics(folder) if row["arm"] == "plain"]
    assert sorted(row["seconds"] for row in plain) == pytest.approx(sorted(own))


def result(arm, setting, seed, accuracy, evaluations, without=0.1):
    row = {"arm": arm, "setting": setting, "seed": seed, "seconds": 1.0, "training_evaluations": 10.0}
    for part in ("validation", "test"):
        row |= {f"{part}_1e-05": accuracy, f"{part}_0.001": accuracy, f"{part}_without": without}
        row |= {f"{part}_evaluations_{name}": evaluations for name in ("1e-05", "0.001", "dopri5")}
        row |= {f"{part}_action": 1.0, f"{part}_acceleration": 1.0}
    return row


RESULTS = [
    *(result("plain", "T = 1", seed, 0.9 + 0.01 * seed, 100) for seed in (0, 1)),  # a standard error of half a point
    *(result("action", "weak", seed, 0.905, 80) for seed in (0, 1)),
    *(result("action", "idle", seed, 0.9, 50, without=0.5) for seed in (0, 1)),
    *(result("action", "strong", seed, 0.8, 20) for seed in (0, 1)),
    *(result("error", "wrong", seed, 0.5, 20) for seed in (0, 1)),
    *(result("error", "worse", seed, 0.4, 10) for seed in (0, 1)),
]


def test_the_rule_wants_accuracy_and_contribution():
    choices = chosen(RESULTS)
    assert choices["action"] == {"rule": "weak", "accuracy alone": "idle"}
    assert choices["error"] == {"rule": "wrong", "accuracy alone": "wrong"}  # where none is right, the most accurate


def test_the_verdict_says_what_of_the_target_is_reached():
    config = replace(TINY, arms=("plain", "action", "error"))
    rows = summarize(config, RESULTS)
    lines = verdict(config, Outcome(rows))
    assert lines[0].startswith("action, weak: the target is not reached: 0.80 ± 0.00 of the plain evaluations")
    assert "points from plain (yes); 100 ± 8 % of the plain contribution (yes)" in lines[0]
    assert lines[1].startswith("error, wrong: the target is not reached: 0.20 ± 0.00")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("action",)}, "arms must hold 'plain'"),
        ({"arms": ("plain", "nonsense")}, "arms must be among plain, shorter time"),
        ({"times": ()}, "times must hold at least one"),
        ({"choosing": -1}, "choosing must be at least 0"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)
