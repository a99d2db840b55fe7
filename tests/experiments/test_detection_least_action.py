"""Least action against plain training: a run on digits, pairs, weights by other names, local Lipschitz constants."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detection_least_action import EXPERIMENT, Job, constants_of, jobs
from detection_least_action_lipschitz import CLEAN, apart, constants, path_of, singular_values, slopes
from detection_least_action_setup import LEAST_ACTION, METHODS, PLAIN, Config, parts_of, read_pair, resnet14, trained
from detection_least_action_tables import AREAS, LEAST, MEAN, adjusted, details, matched, summarize, verdict
from detection_pretrained_setup import images_of
from safetensors.torch import save_file
from scipy import stats
from torch import nn

from lab import images
from lab.experiment import run
from lab.results import Outcome
from odenets import measures
from odenets.detection import preset, run_attack
from odenets.training.runs import read_summary

TINY = Config(
    dataset="digits", attacks=("FGM",), eps=(0.1,), pool=60, train=100, seeds=(0,), splits=(0,), epochs=1,
    batch_size=64, apart=100.0, points=4, iterations=2, workers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return parts_of(TINY)[0]


def test_a_run_leaves_weights_and_a_row_for_every_measure(tmp_path):
    run(EXPERIMENT, replace(TINY, output=tmp_path))
    results = read_summary(tmp_path / "digits")["results"]
    areas = [row for row in results["rows"] if row["measure"] == AREAS["auroc"]]
    assert [(row["noisy"], row["images"]) for row in areas[:2]] == [(False, "FGM 0.1"), (False, MEAN)]
    assert {(row["noisy"], row["detector"]) for row in areas} == {(n, d) for n in (False, True) for d in four()}
    assert results["pairs"] == [["plain_seed0", "least_action_seed0"]]
    assert "below 4: no sign is claimed" in results["verdict"][0]
    assert results["verdict"][1].startswith("pair 1: plain, seed 0 (")
    assert results["verdict"][2].startswith("the action is lower with least action in ")
    assert all("no sign is claimed" in line for line in results["verdict"][3:])
    assert {"auroc.png", "constants.png"} == {path.name for path in (tmp_path / "digits/figures").iterdir()}
    for method in METHODS:
        assert (tmp_path / "digits" / Job(method, 0).name / "weights.safetensors").exists()
    again = trained(replace(TINY, output=tmp_path), PLAIN, 0)  # read, not trained
    assert not again.training


def four():
    return ("eq. 34, forest", "eq. 34, clean only", "separation, logistic", "Mahalanobis, logistic")


def test_jobs_are_a_network_of_every_seed_and_method():
    step = jobs(replace(TINY, seeds=(0, 3)))
    assert [(job.seed, job.method) for job in next(step)] == [(s, m) for s in (0, 3) for m in (PLAIN, LEAST_ACTION)]


def test_pairs_are_made_on_images_that_are_not_attacked():
    others = {image.numpy().tobytes() for image in parts_of(TINY)[1].x}
    pool = images_of(TINY.attacked)[1]
    assert len(pool) == 60
    assert len(parts_of(TINY)[1]) == 300
    assert sum(image.numpy().tobytes() in others for image in pool.x) == 0


def test_as_many_pairs_as_there_can_be_then_the_nearest():
    assert matched([80.0, 81.0], [80.4, 79.7], 0.5) == [(0, 1)]
    assert matched([80.0, 80.3], [80.3, 80.7], 0.5) == [(0, 0), (1, 1)]  # the nearest alone would leave one
    assert matched([80.0, 80.3], [80.3, 79.0], 0.5) == [(1, 0)]
    assert matched([80.0], [90.0], 0.5) == []
    assert matched([80.0], [80.5], 0.5) == [(0, 0)]


def test_what_least_action_adds_at_equal_accuracy_is_the_coefficient_of_least_squares():
    draw = np.random.default_rng(0)
    least, accuracy = np.arange(9) % 2 == 1, draw.normal(83, 1, 9)
    values = 3 * least + 2 * accuracy + draw.normal(size=9)
    found = adjusted(list(values), list(least), list(accuracy))
    X = np.column_stack([np.ones(9), least, accuracy])
    fit, rest, *_ = np.linalg.lstsq(X, values, rcond=None)
    half = stats.t.ppf(0.975, 6) * np.sqrt(rest[0] / 6 * np.linalg.inv(X.T @ X)[1, 1])
    np.testing.assert_allclose(found, [fit[1], fit[1] - half, fit[1] + half])
    assert adjusted([1.0, 2.0, 3.0], [False, True, True], [1.0, 2.0, 3.0]) is None


def results_of(differences):
    """Networks whose areas differ so, in pairs of one accuracy."""
    of = []
    for seed, difference in enumerate(differences):
        for method in METHODS:
            moved = difference if method == LEAST_ACTION else 0.0
            area = 0.9 + 0.01 * seed + moved
            score = {"noisy": False, "tested": "FGM", "detector": "eq. 34, forest"} | dict.fromkeys(AREAS, area)
            of.append(
                {
                    "name": Job(method, seed).name, "method": method, "seed": seed, "accuracy": 0.8 + 0.02 * seed,
                    "accuracy_of_others": 0.8 + 0.02 * seed, "action": 1.0, "attacks": [], "scores": [score],
                    "mechanism": [{"quantity": "block", "points": CLEAN, "log": [0.0, 2 * moved]}],
                }
            )  # fmt: skip
    return of


def test_a_sign_is_claimed_of_four_pairs_and_of_no_fewer():
    few = summarize(TINY, results_of([0.01, 0.012, 0.011]))
    outcome = Outcome(few, TINY.output, details(TINY, results_of([0.0] * (LEAST - 1))))
    assert sum("no sign is claimed" in line for line in verdict(TINY, outcome)) == 3
    rows = summarize(TINY, results_of([0.01, 0.012, 0.011, 0.01]))
    outcome = Outcome(rows, TINY.output, details(TINY, results_of([0.0] * LEAST)))
    by = {(row["measure"], row.get("images")): row for row in rows}
    assert by[AREAS["auroc"], MEAN]["difference"].mean == pytest.approx(1.075)
    assert by[AREAS["auroc"], MEAN]["p"] < 0.001
    assert "it raises it" in verdict(TINY, outcome)[4 + LEAST]
    block = next(row for row in rows if "log_difference" in row)
    assert block["log_difference"].mean == pytest.approx(0.01075)
    assert block["factor"][0] == pytest.approx(np.exp(0.01075))
    assert block["factor"][1] < block["factor"][0] < block["factor"][2]
    assert block["plain"].mean == pytest.approx(1.0)  # a geometric mean
    assert summarize(replace(TINY, apart=0.5), results_of([0.01])[:1] + results_of([0.0, 0.0])[3:]) == []


def named_as_in_files(network):
    """The weights of a network under the names of the files."""
    names = {"encoder.1": "conv", "encoder.2": "bn", "head.0": "bn_out", "head.3": "linear"}
    found = {}
    for name, value in network.state_dict().items():
        if name.endswith(("_extra_state", "recalibrated")):
            continue
        if name.startswith("_flows"):
            _, flow, _, block, _, _, layer, what = name.split(".")
            layer, what = layer.replace("norm", "bn"), what.replace("batches", "num_batches_tracked")
            value = value[0] if layer.startswith("bn") and what not in ("weight", "bias") else value
            name = f"stages.{flow}.{block}.{layer}.{what}"
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value.contiguous()
    return found


def test_a_file_gives_the_network_of_its_names(tmp_path, digits):
    network = resnet14(digits, 0, (4, 8, 16))
    network(digits.x[:50])  # moves the statistics
    save_file(named_as_in_files(network), tmp_path / "resnet14-lap-5.safetensors")
    read = trained(replace(TINY, pairs=tmp_path, output=tmp_path / "none"), LEAST_ACTION, 5)
    assert torch.equal(read(digits.x[:9]), network.eval()(digits.x[:9]))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="holds another network: "):
        read_pair(resnet14(digits, 0, (4, 8, 16), blocks=3), tmp_path / "resnet14-lap-5.safetensors")


def test_the_network_is_a_preactivation_resnet_by_hand(digits):
    network = resnet14(digits, 1, (4, 8, 16)).eval()
    x = digits.x[:5]
    state = network.encoder[2](network.encoder[1]((x - digits.mean[0]) / digits.std[0]))
    for i, flow in enumerate(network.flows):
        for block in flow.blocks:
            field = block.fields[0]
            inner = field.conv1(field.norm1(state).relu())
            state = state + field.conv2(field.norm2(inner).relu())
        state = network.transitions[i](state) if i < 2 else state
    logits = network.head[3](network.head[0](state).relu().mean((2, 3)))
    torch.testing.assert_close(network(x), logits)
    assert sum(p.numel() for p in resnet14(images.train_and_test("digits", None)[0], 0).parameters()) == 197_946


def test_power_iteration_finds_the_singular_value_of_each_sample():
    network = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    exact = torch.stack([torch.linalg.svdvals(torch.autograd.functional.jacobian(network, each))[0] for each in x])
    found = singular_values(network, x, iterations=200)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    few = singular_values(network, x, iterations=3)
    assert (few <= exact * (1 + 1e-12)).all()
    assert (few <= found).all()


def test_constants_are_those_of_the_jacobians_along_the_path(digits):
    network = resnet14(digits, 0, (2, 3), blocks=1).double().eval()
    x = digits.x[:2].double()
    found = constants(network, x, 60)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "block": (2, 2), "path": (1, 2), "flow": (1, 2)
    }  # fmt: skip
    first = network.encode(x).detach()
    states = path_of(network, first)[0]

    def exact(f, state):
        jacobian = torch.autograd.functional.jacobian(lambda flat: f(flat.reshape(state.shape)), state.flatten())
        return torch.linalg.svdvals(jacobian)[0]

    for m, (flow, state) in enumerate(zip(network.flows, states, strict=True)):
        of = torch.stack([exact(lambda s, flow=flow: (flow(s) - s).flatten(), each[None]) for each in state])
        torch.testing.assert_close(found["block"][m], of.detach(), rtol=1e-3, atol=0)
    residues = [exact(lambda s: torch.cat([r.flatten() for r in path_of(network, s)[1]]), each[None]) for each in first]
    torch.testing.assert_close(found["path"][0], torch.stack(residues).detach(), rtol=1e-3, atol=0)
    last = [exact(lambda s: path_of(network, s)[2].flatten(), each[None]) for each in first]
    torch.testing.assert_close(found["flow"][0], torch.stack(last).detach(), rtol=1e-3, atol=0)


def test_the_path_is_that_of_the_solver(digits):
    network = resnet14(digits, 0, (4, 8, 16)).eval()
    x = digits.x[:3]
    states, residues, last = path_of(network, network.encode(x))
    _, records = network.record(x, residue=measures.residue)
    assert len(states) == network.depth
    ours = torch.stack([r.square().flatten(1).mean(1) for r in residues])
    torch.testing.assert_close(ours, records["residue"])
    torch.testing.assert_close(network.head(last), network(x))


def test_slopes_and_distances_are_quotients_of_norms(digits):
    network = resnet14(digits, 0, (4, 8)).eval()
    clean = digits.x[:3]
    sets = {CLEAN: clean, "attacked": (clean + 0.1 * torch.rand_like(clean)).clamp(0, 1)}
    (first, residues), (start, there) = (
        (network.encode(x), path_of(network, network.encode(x))[1]) for x in sets.values()
    )
    found, far = slopes(network, sets), apart(network, sets)
    assert found[CLEAN].shape == (4, 3)
    assert found["attacked"].shape == (4, 3)
    one = (residues[2][0] - residues[2][1]).norm() / (first[0] - first[1]).norm()
    torch.testing.assert_close(found[CLEAN][2, 0], one.detach())
    moved = (there[1][2] - residues[1][2]).norm() / (start[2] - first[2]).norm()
    torch.testing.assert_close(found["attacked"][1, 2], moved.detach())
    shift = torch.stack([(there[0][i] - residues[0][i]).norm() for i in range(3)]).mean()
    spread = torch.pdist(residues[0].flatten(1)).mean()
    torch.testing.assert_close(far["attacked"][0, 0], (shift / spread).detach())
    still = slopes(network, sets | {"attacked": torch.cat([clean[:1], sets["attacked"][1:]])})
    assert still["attacked"].shape == (4, 2)  # the image that is not moved does not count


def test_constants_are_of_images_that_the_attack_changes(digits):
    network = resnet14(digits, 0, (4, 8, 16)).eval()
    pool = digits.subset(torch.arange(10))
    moved = pool.x.clone()
    moved[[3, 7, 8]] = pool.x[[3, 7, 8]].flip(-1)
    one = run_attack(network, preset("FGM", eps=0.1), pool.x, pool.y)
    config = replace(TINY, points=2, iterations=3)
    rows = constants_of(config, network, pool, {"FGM 0.1": replace(one, images=moved)})
    found = {row["points"]: row["log"] for row in rows if row["quantity"] == "block"}
    for name, x in {CLEAN: pool.x, "attacked": moved}.items():
        of = constants(network, x[[3, 7]], 3)["block"]
        torch.testing.assert_close(torch.tensor(found[name]), of.log().mean(1))


def test_bad_input():
    with pytest.raises(ValueError, match="seeds must hold at least one"):
        Config(seeds=())
    with pytest.raises(ValueError, match="apart must be points of accuracy, not negative, got -1"):
        Config(apart=-1)
    with pytest.raises(ValueError, match="points must be at most pool, got 600 of 400"):
        Config(points=600)
    with pytest.raises(ValueError, match=r"attacks and slow must be among .*, got 'PGD'"):
        Config(attacks=("PGD",))


def test_measures_are_compared_by_name_whatever_their_order():
    results = results_of([0.01, 0.012, 0.011, 0.01])
    for i, result in enumerate(results):
        off = (
            {"quantity": "apart", "points": "noise", "log": [1.0]},
            {"quantity": "apart", "points": "attacked", "log": [2.0]},
        )
        result["mechanism"] += off[:: (-1) ** i]
    by = {row["images"]: row for row in summarize(TINY, results) if "distance" in row["measure"]}
    assert by["noise"]["log_difference"].values == (0, 0, 0, 0)
    assert by["attacked"]["plain"].mean == pytest.approx(np.exp(2))
