from dataclasses import replace
from types import SimpleNamespace

import compress_setup
import pytest
import torch
from compress import EXPERIMENT, WAYS, summarize, verdict
from compress_setup import Config, latencies, subject_of
from PIL import Image
from torch import nn

from lab.experiment import run
from lab.pretrained import efficientnet, smollm
from lab.results import Outcome
from odenets.depth.compression import compress
from odenets.training.runs import read_summary

TINY = Config(
    quick=True, workers=1, epochs=1, healed=(2,), images=64, methods=("block influence", "ReplaceMe", "compress")
)


def test_a_run_leaves_the_curve_of_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(compress_setup, "_seconds", lambda model, x, passes: 0.01 * len(model(x)))  # in one pass
    run(EXPERIMENT, replace(TINY, output=tmp_path))
    rows = read_summary(tmp_path)["results"]["rows"]
    assert [(row["method"], row["removed"]) for row in rows] == [(way, k) for way in TINY.methods for k in (0, 1, 2)]
    for row in rows:
        assert 0 <= row["score"]["mean"] <= 100
        assert row["macs"] <= 1
        assert ("to_replaceme" in row) == (row["method"] == "compress" and row["removed"] > 0)
        assert row["ratio_1"] > 0
        assert ("healed" in row) == (row["method"] == "compress" and row["removed"] == 2)
        if row["removed"]:
            assert row["macs"] < 1
            assert row["seconds"] > 0
    text = (tmp_path / "table.md").read_text()
    assert "compress is " in text
    assert "healed on 64 images with 2 blocks gone" in text
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"blocks", "macs"}


def test_images_of_calibration_and_test_are_apart():
    subject = subject_of(Config(calibration=300), seed=1)
    calibration = {tuple(x.flatten().tolist()) for x in torch.cat(subject.calibration)}
    assert len(calibration) > 290  # some digits are drawn twice
    train, test = compress_setup._images(Config())
    assert calibration <= {tuple(x.flatten().tolist()) for x in train.x}
    assert len(calibration & {tuple(x.flatten().tolist()) for x in test.x}) == 0
    assert not torch.equal(subject.calibration[0], subject_of(Config(calibration=300), seed=2).calibration[0])


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A language model with random weights that reads bytes, and two texts."""
    monkeypatch.setattr(smollm, "load_smollm", lambda path: smollm.small_llama(5, 128))
    monkeypatch.setattr(smollm, "tokens_of", lambda text, path: torch.tensor([*text.encode()]))
    (tmp_path / "one.txt").write_text("one text. " * 60)
    (tmp_path / "other.txt").write_text("another. " * 60)
    sources = {"text": str(tmp_path / "one.txt"), "test_text": str(tmp_path / "other.txt")}
    return Config(network="smollm2", calibration=10, test=4, window=40, **sources)


def test_a_language_model_is_judged_by_its_perplexity_on_another_text(texts):
    subject = subject_of(texts, 0)
    assert len(subject.calibration) == 10
    assert subject.calibration[0].shape == (1, 40)
    assert len(subject.blocks) == 5
    assert subject.judge(lambda x: torch.zeros(1, 40, 128)) == pytest.approx(128)
    small = compress(subject.model, subject.calibration, remove=2, samples=5, **WAYS["compress"])
    assert small.model(subject.probe[:1]).shape == (1, 8, 128)


def test_a_language_model_is_calibrated_on_what_it_writes_itself(texts):
    before = torch.get_rng_state()
    one, other = (torch.cat(subject_of(replace(texts, text="own"), seed).calibration) for seed in (0, 1))
    assert one.shape == (10, 40)
    assert torch.equal(one, torch.cat(subject_of(replace(texts, text="own"), 0).calibration))
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_windows_do_not_overlap_whatever_the_seed():
    tokens = torch.arange(1000)
    for seed in range(5):
        windows = compress_setup._windows(tokens, 9, 100, seed)
        assert windows.unique().numel() == 900
    with pytest.raises(ValueError, match="must have 11 windows of 100 tokens, it has 1000 tokens"):
        compress_setup._windows(tokens, 10, 100)


@pytest.fixture
def albums(tmp_path, monkeypatch):
    monkeypatch.setattr(
        efficientnet, "load_efficientnet",
        lambda path: nn.Sequential(nn.Conv2d(3, 10, 8, 8), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
    )  # fmt: skip
    for name in ("one/a.png", "one/b.png", "other/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = torch.randint(256, (60, 70, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / name)
    return Config(
        network="efficientnet", photographs=tmp_path / "one", test_photographs=tmp_path / "other", calibration=5, test=3
    )


def test_without_labels_a_network_is_judged_by_its_agreement_with_the_whole_one(albums):
    subject = subject_of(albums, 0)
    assert torch.cat(subject.calibration).shape == (3, 3, 224, 224)
    assert torch.cat(subject.held_out).shape == (2, 3, 224, 224)  # of the other photograph
    assert subject.judge(subject.model) == 100
    assert subject.judge(lambda x: -subject.model(x)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"network": "resnet20"}, "weights must name the folder"), ({"network": "efficientnet"}, "two folders")],
)
def test_what_is_not_told_is_asked_for(settings, message, monkeypatch):
    monkeypatch.setattr(compress_setup, "_images", lambda config: (None, None))
    with pytest.raises(FileNotFoundError, match=message):
        subject_of(Config(**settings), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("magic",)}, "methods must be among block influence"),
        ({"removed": ()}, "removed must hold at least one"),
        ({"removed": (0, 2)}, "removed must hold numbers of blocks, at least 1"),
        ({"calibration": 1}, "must be at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def result(method, scores, seed=0):
    point = {"macs": 0.5, "seconds": 1.0, "divergence": 0.1, "ratio_1": 0.5, "runs": []}
    curve = [
        {"removed": 0, "score": 100.0, "macs": 1.0},
        *({"removed": k, "score": s} | point for k, s in scores.items()),
    ]
    return {"method": method, "seed": seed, "curve": curve, "blocks": 9}


def test_the_verdict_names_the_depths_at_which_compress_is_not_ahead():
    config = Config(removed=(2, 4))
    results = [
        result("block influence", {2: 90.0, 4: 50.0}),
        result("ReplaceMe", {2: 80.0}),
        result("compress", {2: 90.0, 4: 70.0}),
    ]
    rows = summarize(config, results)
    assert [(r["removed"], r["to_influence"].mean) for r in rows if "to_influence" in r] == [(2, 0.0), (4, 20.0)]
    assert [r["removed"] for r in rows if "to_replaceme" in r] == [2]
    lines = verdict(config, Outcome(rows))
    assert lines[0] == (
        "compress is ahead of block influence with 4 blocks gone; level with block influence with 2 blocks gone "
        "(test accuracy (%))"
    )
    assert lines[1] == "compress is ahead of ReplaceMe with 2 blocks gone (test accuracy (%))"
    assert lines[2] == "test accuracy (%) with 4 of 9 blocks gone: block influence 50.00; compress 70.00; whole 100.00"
    low = replace(config, network="smollm2")
    assert verdict(low, Outcome(rows))[1] == "compress is behind ReplaceMe with 2 blocks gone (perplexity)"


def test_latencies_are_those_of_networks_in_turns(monkeypatch):
    clock, calls = SimpleNamespace(now=0.0), []

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            calls.append((self.seconds, len(x)))
            clock.now += self.seconds * len(x)
            return x

    monkeypatch.setattr(compress_setup.time, "process_time", lambda: clock.now)
    rows = latencies([Slow(2.0), Slow(1.0)], torch.zeros(3, 1), rounds=2)
    assert [row["ratio_1"] for row in rows] == [1, 0.5]
    assert [row["ms_3"] for row in rows] == [6000, 3000]
    assert calls == [(2.0, 1)] * 2 + [(2.0, 1), (1.0, 1)] * 3 + [(2.0, 3)] * 2 + [(2.0, 3), (1.0, 3)] * 3
