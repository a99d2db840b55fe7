"""``odenets detect``: what it prints and writes is what a monitor says of the same images."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from odenets.command.images import batches, files_of, resized
from odenets.detection import Monitor
from odenets.models import small_network

OPTIONS = ("-o", "solver=bs23", "-o", "depth=2", "-o", "size=8", "--gray")


@pytest.fixture
def folders(tmp_path):
    """Smooth clean images and others of the same kind, but for the last five, which are noise."""
    numbers = np.random.default_rng(0)
    for name, count in {"clean": 60, "new": 20}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            x = np.add.outer(np.arange(8), np.arange(8)) * numbers.uniform(2, 6) + numbers.uniform(0, 60)
            if name == "new" and i >= 15:
                x = numbers.uniform(0, 255, (8, 8))
            Image.fromarray(x.astype(np.uint8)).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def tensors(folder):
    ((_, x),) = batches(files_of([folder]), resized(None), 100, "L")
    return x


def test_what_is_printed_and_written_is_what_a_monitor_says(run, folders):
    clean, new, file = folders / "clean", folders / "new", folders / "rows.csv"
    result = run("detect", "small_network", new, "--clean", clean, *OPTIONS, "--csv", file, "--batch-size", 7)
    assert result.exit_code == 0, result.stderr
    torch.manual_seed(0)
    assessment = Monitor(small_network(solver="bs23", depth=2, size=8)).fit(tensors(clean)).check(tensors(new))
    with file.open(newline="") as opened:
        rows = [*csv.DictReader(opened)]
    assert [row["image"] for row in rows] == [str(new / f"{i:02}.png") for i in range(20)]
    np.testing.assert_allclose([float(row["score"]) for row in rows], assessment.scores, rtol=1e-3)
    np.testing.assert_allclose([float(row["p_value"]) for row in rows], assessment.p_values)
    assert [row["flagged"] == "True" for row in rows] == assessment.flags.tolist()
    assert f"{assessment.flags.sum()} of 20 images flagged" in result.stdout
    assert "60 clean images of 1 x 8 x 8, of which 30 calibrate a monitor; pixels in [0, 1]" in result.stdout
    assert "too few images for a window of 200" in result.stdout
    printed = [line.split()[1] for line in result.stdout.splitlines() if line.strip()[:1].isdigit() and ".png" in line]
    assert printed == [rows[i]["image"] for i in assessment.surest[:10]]
    assert set(assessment.surest[:5].tolist()) == set(range(15, 20))


def test_a_saved_monitor_says_the_same(run, folders):
    new, file = folders / "new", folders / "out" / "monitor.skops"
    fitted = ("--clean", folders / "clean", "--save", file, "--false-positive-rate", 0.1)
    first = run("detect", "small_network", new, *fitted, *OPTIONS, "--json", "--window", 5)
    again = run("detect", "small_network", new, "--load", file, *OPTIONS, "--json", "--window", 5)
    assert again.exit_code == 0, again.stderr
    one, other = json.loads(first.stdout), json.loads(again.stdout)
    assert one["images"] == other["images"]
    assert one["false_positive_rate"] == other["false_positive_rate"] == 0.1
    assert one["drift"]["first"] == 3
    assert len(one["images"]) == 20
    other_way = ("--transform", "torchvision.transforms.functional:to_tensor")
    result = run("detect", "small_network", new, "--load", file, *OPTIONS[:-1], *other_way)
    assert result.exit_code == 2
    assert "knows images pixels in [0, 1], these are prepared by torchvision" in " ".join(result.stderr.split())


def test_images_prepared_for_weights_are_taken_as_they_come(run, folders):
    """torchvision's normalize, so that they are outside [0, 1]."""
    words = ("resnet18", folders / "new", "--clean", folders / "clean", "--weights", "none", "--size", 32)
    result = run("detect", *words, "--batch-size", 64)
    assert result.exit_code == 0, result.stderr
    assert "prepared as for IMAGENET1K_V1 of torchvision" in result.stdout


@pytest.mark.filterwarnings("always")
def test_a_page_with_names_and_detection_rates(run, folders):
    report = folders / "report"
    (folders / "new" / "broken.png").write_text("none")
    words = ("--report", report, "--foreign", folders / "new" / "19.png", "--skip-unreadable")
    result = run("detect", "small_network", folders / "new", "--clean", folders / "clean", *OPTIONS, *words)
    assert result.exit_code == 0, result.stderr
    assert "1 of 21 images cannot be read and are left out" in result.stderr
    page = (report / "report.html").read_text()
    assert "19.png" in page
    assert f"{report / 'report.html'}: the report" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "either --clean names images that fit a monitor, or --load the file of one"),
        (("--clean", "new"), 2, "20 of 20 IMAGES are among those of --clean"),
        (("--clean", "clean", "--foreign", "clean", "--report", "page"), 2, "60 of 60 --foreign are among those"),
        (("--clean", "clean", "--size", "9"), 1, "small_network cannot be recorded on these images: RuntimeError"),
        (("--load", "none.skops"), 2, "--load: no file"),
        (("--clean", "clean", "--false-positive-rate", "1.5"), 2, "--false-positive-rate must lie in (0, 1)"),
        (("--clean", "clean", "--false-positive-rate", "0.001"), 1, "of 0.001 needs 999"),
        (("--clean", "clean", "--foreign", "new"), 2, "--foreign is for the report"),
        (("--clean", "clean", "--report", "new/00.png"), 2, "--report must be a folder"),
        (("--clean", "clean", "--save", "new"), 2, "--save must be a file, got the folder"),
        (("--clean", "nowhere"), 2, "no file or folder"),
        (("--load", "new/00.png"), 1, "holds no detector: it was not written by Monitor.save"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(run, folders, monkeypatch, words, code, message):
    monkeypatch.chdir(folders)
    result = run("detect", "small_network", "new", *OPTIONS, *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_network_of_one_block_is_told(run, folders):
    result = run("detect", "small_network", folders / "new", "--clean", folders / "clean", "-o", "size=8", "--gray",
                 "-o", "depth=1")  # fmt: skip
    assert result.exit_code == 1
    assert "at least two blocks" in result.stderr
