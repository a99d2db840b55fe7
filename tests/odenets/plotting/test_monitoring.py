"""Figures and the report of a monitor: they show what it says, and hold no more images than are shown."""

import base64
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from odenets.detection import Monitor
from odenets.models import small_network
from odenets.plotting import monitor_report, monitor_scores, surest_images
from odenets.plotting.monitor_report import _Surest

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def monitor():
    torch.manual_seed(0)
    return Monitor(small_network(depth=2)).fit(torch.rand(100, 1, 8, 8, generator=GENERATOR))


def test_the_area_is_that_of_scikit_learn():
    numbers = np.random.default_rng(0)
    clean, foreign = numbers.integers(0, 9, 50).astype(float), numbers.integers(3, 12, 40).astype(float)
    figure = monitor_scores(clean, clean, np.full(50, 0.5), threshold=8.0, false_positive_rate=0.05, foreign=foreign)
    expected = roc_auc_score([0] * 50 + [1] * 40, [*clean, *foreign])
    texts = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert texts[0] == f"AUROC {expected:.3f}"
    assert texts[1] == f"threshold: {100 * (foreign > 8).mean():.0f} % detected"
    x, y = figure.axes[3].lines[0].get_data()
    assert (x[0], y[0], x[-1], y[-1]) in [(0, 0, 1, 1), (1, 1, 0, 0)]


@pytest.mark.parametrize("scores", [np.zeros(3), np.array([5.0]), np.array([-1.0, 2.0])], ids=["0", "one", "negative"])
def test_few_or_equal_scores_are_drawn(scores):
    figure = monitor_scores(scores, scores, np.ones(len(scores)), threshold=1.0, false_positive_rate=0.05)
    figure.canvas.draw()


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4), (5, 4, 4)])
def test_images_of_any_channels_and_range_are_shown(shape):
    figure = surest_images([10 * np.random.default_rng(0).normal(size=shape)], ["$ _name"[1:]])
    figure.canvas.draw()
    shown = figure.axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1) or shape[0] == 5


def test_the_report_is_one_page_with_its_figures_and_names_as_text(monitor, tmp_path):
    images = torch.rand(40, 1, 8, 8, generator=GENERATOR)
    images[7] = 0
    names = [f"<b>{i}</b> & $x$.png" for i in range(40)]
    assessment = monitor_report(
        monitor, images.split(13), tmp_path / "report", names=names, foreign=torch.zeros(5, 1, 8, 8), title="a <b>"
    )
    np.testing.assert_allclose(assessment.scores, monitor.scores(images), rtol=1e-4)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<h1>a &lt;b&gt;</h1>" in page
    assert "<b>7" not in page
    assert page.index("&lt;b&gt;7&lt;/b&gt; &amp; $x$.png") > 0
    assert "http" not in page
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert [base64.b64decode(one)[:4] for one in pictures] == [b"\x89PNG"] * 2
    assert assessment.surest[0] == 7
    assert str(monitor.drift(assessment.p_values)) in page


def test_no_more_images_are_kept_than_are_shown(monitor):
    images = torch.rand(60, 1, 8, 8, generator=GENERATOR)
    kept = _Surest(5)
    parts = [kept.add(part) for part in monitor.stream(kept.passing(images, 7))]
    scores = np.concatenate([part.scores for part in parts])
    assert set(kept.images) == set(np.argsort(-scores, kind="stable")[:5].tolist())
    for i, image in kept.images.items():
        np.testing.assert_array_equal(image, images[i])


def test_inputs_that_are_no_images_have_a_report_without_pictures(tmp_path):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_network(depth=2)

        def forward(self, x):
            return self.network(x)

    x = torch.rand(60, 1, 8, 8, generator=GENERATOR)
    watching = Monitor(Named()).fit({"x": x})
    monitor_report(watching, {"x": x[:10]}, tmp_path)
    assert not (tmp_path / "surest.png").exists()
    assert (tmp_path / "report.html").exists()


def test_errors(monitor, tmp_path):
    with pytest.raises(ValueError, match="names must hold one for each of 10 images, got 3"):
        monitor_report(monitor, torch.rand(10, 1, 8, 8), tmp_path, names=["a", "b", "c"])
    with pytest.raises(TypeError, match="images must hold batches of inputs, got int"):
        monitor_report(monitor, 3, tmp_path)
    with pytest.raises(ValueError, match="surest must be at least 1"):
        monitor_report(monitor, torch.rand(10, 1, 8, 8), tmp_path, surest=0)
    assert not [*tmp_path.iterdir()]
