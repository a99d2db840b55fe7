"""The study of detection on trained networks, on a few digits."""

from dataclasses import replace
from pathlib import Path

import detection
import detection_pretrained
import numpy as np
import pytest
import torch
from detection_pretrained import ADAPTIVE, EXPERIMENT, Job, comparisons, jobs, samples_of
from detection_pretrained_detectors import CONTENDERS, FEATURES, FIRST, Sample, compare
from detection_pretrained_setup import (
    CLEAN,
    EXCHANGED,
    NOISE,
    Config,
    Set,
    attack_of,
    exchanged,
    images_of,
    network_of,
    noise_like,
    rounded,
)
from detection_pretrained_setup import sets_of as all_sets

from lab.experiment import run
from lab.pretrained.resnets import ResNet
from odenets.detection import split
from odenets.training.runs import read_summary

TINY = Config(
    network="digits",
    attacks=("FGM",),
    eps=(0.1,),
    pool=60,
    few=30,
    train=100,
    seeds=(0, 1),
    epochs=1,
    workers=1,
    starts=2,
    steps=2,
)


@pytest.fixture
def few(monkeypatch):
    """Three detectors of two kinds of features."""
    names = (FIRST, "separation", "feature squeezing")
    kinds = {name: FEATURES[name] for name in ("eq. 34", "separation", "squeezing")}
    contenders = {name: CONTENDERS[name] for name in names}
    for name, value in (("CONTENDERS", contenders), ("FEATURES", kinds), ("ADAPTIVE", ("separation",))):
        monkeypatch.setattr(detection_pretrained, name, value)
    return names


def test_a_run_leaves_a_row_for_every_detector_with_noise_left_out_and_clean(tmp_path, few):
    run(EXPERIMENT, replace(TINY, output=tmp_path))
    results = read_summary(tmp_path / "digits")["results"]
    rows = results["rows"]
    assert [(row["noisy"], row["detector"]) for row in rows] == [
        (noisy, name) for noisy in (False, True) for name in few
    ]
    assert all(0 <= row["auroc"]["mean"] <= 100 for row in rows)
    assert all(len(row["auroc"]["values"]) == 2 for row in rows)
    assert all(("difference" in row) == (row["detector"] != FIRST) for row in rows)
    (attack,) = results["attacks"]
    assert attack["images"] == 60
    assert attack["l2"] == pytest.approx(attack["noise_l2"], rel=1e-5)
    (known,) = results["adaptive"]
    assert (known["adaptive"], known["seen"], known["eps"]) == ("separation", "FGM 0.1", 0.1)
    assert known["starts"] == 0 or 0 <= known["evaded_rounded"] <= 1
    assert (tmp_path / "digits" / "figures" / "auroc.png").exists()
    samples = samples_of(replace(TINY, output=tmp_path))
    assert list(samples) == [CLEAN, "FGM 0.1", NOISE + "FGM 0.1", EXCHANGED + "FGM 0.1"]
    assert samples[CLEAN].successful.all()


def test_noise_has_the_sizes_of_the_attack_at_other_places():
    clean = rounded(torch.rand(4, 3, 8, 8))
    clean[0] = 1.0  # where every change must go down
    moved = rounded((clean + 0.1 * torch.rand(4, 3, 8, 8) - 0.05).clamp(0, 1))
    noisy = noise_like(clean, moved, seed=0)
    assert 0 <= noisy.min() < noisy.max() <= 1
    assert torch.equal(rounded(noisy), noisy)
    sizes = [((x - clean) * 255).round().abs().flatten(1).sort(1).values for x in (moved, noisy)]
    assert torch.equal(*sizes)
    assert ((noisy - clean) * (moved - clean)).flatten(1).sum(1).abs().max() < (moved - clean).square().sum()
    assert torch.equal(noisy, noise_like(clean, moved, seed=0))
    assert not torch.equal(noisy, noise_like(clean, moved, seed=1))


def test_exchanged_changes_are_those_of_the_image_before():
    clean = rounded(0.2 + 0.6 * torch.rand(5, 3, 8, 8))
    moved = rounded(clean + 0.1 * torch.rand(5, 3, 8, 8))
    moved[2] = clean[2]  # an image that the attack leaves as it is neither gives nor takes
    there = exchanged(clean, moved)
    assert torch.equal(there[2], clean[2])
    for image, giver in ((0, 4), (1, 0), (3, 1), (4, 3)):
        torch.testing.assert_close(there[image] - clean[image], moved[giver] - clean[giver], atol=1e-6, rtol=0)
    bright = torch.ones(2, 1, 2, 2)
    bright[1] = 0.0
    there = exchanged(bright, bright.new_tensor([0.8, 0.2]).reshape(2, 1, 1, 1).expand_as(bright))
    torch.testing.assert_close(there, bright.new_tensor([0.8, 0.2]).reshape(2, 1, 1, 1).expand_as(bright))


def test_sets_and_what_detectors_are_fitted_on():
    config = Config(attacks=("FGM", "BIM"), eps=(0.03, 0.01), slow=("AA", "DF"), pool=500, few=100)
    assert [(each.name, each.images) for each in all_sets(config)] == [
        *((name, 500) for name in ("FGM 0.03", "FGM 0.01", "BIM 0.03", "BIM 0.01")),
        *((name, 100) for name in ("AA 0.03", "AA 0.01", "DF")),
    ]
    of = dict(comparisons(config))
    assert of["BIM 0.01"] == ("BIM 0.01",)
    assert of["FGM 0.01"] == tuple(each.name for each in all_sets(config))


def test_attacks_have_the_sizes_and_steps_that_are_stated():
    assert dict(attack_of(Set("BIM", 0.02, 10), exact=True).settings) == {
        "eps": 0.02, "eps_step": 0.005, "max_iter": 10, "exact": True
    }  # fmt: skip
    apgd = dict(attack_of(Set("APGD", 0.02, 10), exact=False).settings)
    assert (apgd["eps_step"], apgd["max_iter"], apgd["nb_random_init"]) == (0.02, 20, 1)
    assert "eps" not in dict(attack_of(Set("DF", 0.0, 10), exact=True).settings)


def test_jobs_read_every_kind_of_features_and_report_attacks_and_splits():
    steps = jobs(TINY)
    first = next(steps)
    second = steps.send([{"set": "FGM 0.1"}] * len(first))
    third = steps.send([{}] * len(second))
    last = steps.send([{"scores": []}] * len(third))
    assert [(job.adaptive, job.eps) for job in last] == [(name, 0.1) for name in ADAPTIVE]
    assert [job.features for job in second] == list(FEATURES)
    assert all(job.tuning for job in second)
    assert len({job.name for job in (*first, *second, *third, *last)}) == sum(map(len, (first, second, third, last)))
    with pytest.raises(StopIteration) as end:
        steps.send([{}] * len(last))
    assert len(end.value.value) == len(first) + len(third) + len(last)


def test_the_pool_and_the_images_of_statistics_are_apart():
    train, pool = images_of(replace(TINY, pool=200))
    seen = {image.numpy().tobytes() for image in train.x}
    assert (len(train), len(pool)) == (100, 200)
    assert sum(image.numpy().tobytes() in seen for image in pool.x) == 0


def test_the_network_of_digits_is_the_same_every_time():
    before = torch.get_rng_state()
    one, other = (network_of(TINY) for _ in range(2))
    assert isinstance(one, ResNet)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def planted(n=200, moved=3.0):
    """Clean samples, noise that is moved along one feature, attacks that are moved along another."""
    draw = np.random.default_rng(0)
    sets = []
    for shift in ([0, 0], [moved, 0], [0, moved]):
        X = draw.normal(size=(n, 2)) + shift
        sets.append(Sample({"f": X}, np.arange(n) % 2, np.arange(n) % 4 > 0, np.arange(n) > 9))
    return sets


def test_a_detector_that_has_seen_noise_as_clean_does_not_call_it_an_attack():
    clean, noise, attack = planted()
    contender = replace(CONTENDERS["separation"], features=("f",))
    arguments = contender, clean
    more = attack, {"planted": (attack, noise, noise)}, split(200, test=0.3, validation=0.25), 0
    _, without = compare(*arguments, None, *more)
    name, of = compare(*arguments, noise, *more)
    assert name.startswith("f, ")
    assert of["planted"]["auroc"] > 0.97
    assert of["planted"]["auroc_noise"] == of["planted"]["auroc_exchanged"] > 0.97
    assert of["planted"]["noise_detected"] == of["planted"]["exchanged_detected"] < 0.1
    assert without["planted"]["auroc"] > 0.9
    assert without["planted"]["noise_detected"] >= of["planted"]["noise_detected"]
    assert of["planted"]["false_positives"] < 0.15


def test_a_detector_that_is_fitted_on_clean_images_sees_both():
    clean, noise, attack = planted(moved=5.0)
    contender = replace(CONTENDERS["eq. 34, clean only"], features=("f",))
    tested = {"planted": (attack, noise, noise)}
    _, of = compare(contender, clean, None, attack, tested, split(200, test=0.3, validation=0.25), 0)
    assert of["planted"]["auroc"] > 0.97
    assert of["planted"]["noise_auroc"] > 0.97
    assert of["planted"]["auroc_noise"] == pytest.approx(0.5, abs=0.2)


def test_sets_of_fewer_images_are_scored_on_those_of_them_in_the_test_part():
    clean, noise, attack = planted()
    short = [Sample({"f": s.X["f"][:50]}, s.predicted[:50], s.successful[:50], s.changed[:50]) for s in (attack, noise)]
    contender = replace(CONTENDERS[FIRST], features=("f",))
    parts = split(200, test=0.3, validation=0.25)
    _, of = compare(contender, clean, noise, attack, {"short": (short[0], short[1], short[1])}, parts, 0)
    count = int(((parts.test < 50) & (parts.test > 9)).sum())  # the first ten are as the attack found them
    assert round(of["short"]["detected"] * count) == pytest.approx(of["short"]["detected"] * count)


def test_the_first_script_begins_the_study_where_weights_are_given():
    experiment, words = detection.begun(["--network", "resnet56", "--weights", "FILE"])
    assert experiment is EXPERIMENT
    assert "trained ResNets" in words
    for arguments in (["--weights=FILE"], ["--network", "resnet20", "--help"], ["--network=resnet44"]):
        assert detection.begun(arguments)[0] is EXPERIMENT
    assert detection.begun(["--network", "resnet9"])[0] is detection.EXPERIMENT


def test_bad_input():
    with pytest.raises(ValueError, match=r"attacks and slow must be among .*, got 'PGD'"):
        Config(attacks=("PGD",))
    with pytest.raises(ValueError, match=r"eps must hold sizes in \(0, 1\]"):
        Config(eps=(0.0,))
    with pytest.raises(ValueError, match="few must be at most pool"):
        Config(pool=50, few=60)
    with pytest.raises(FileNotFoundError, match="weights must name the file"):
        network_of(Config(network="resnet20"))
    with pytest.raises(FileNotFoundError, match="is not there"):
        network_of(Config(network="resnet20", weights=Path("nowhere.safetensors")))


def test_settings_of_a_job_are_those_of_its_attack():
    job = Job(attack=Set("FGM", 0.1, 60))
    assert EXPERIMENT.settings(TINY, job)["attack"] == {"attack": "FGM", "eps": 0.1, "images": 60}
