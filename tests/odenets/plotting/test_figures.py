"""Figures as files: for light paper and for dark."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_params_from_file
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from odenets import plotting
from odenets.plotting.dark import on_dark_paper


@pytest.fixture
def figure():
    """Something of everything: lines, points, bars, text, a legend, an image, a color bar, grays of any spelling."""
    figure = Figure(figsize=(6, 2))
    left, middle, right = figure.subplots(1, 3)
    left.plot([0, 1], color="black", label="a line")
    left.scatter([0, 0.5, 1], [1, 0.5, 0], c=["k", "0.5", "tab:red"], edgecolors="white")
    left.legend()
    middle.bar([0, 1], [1, 2], color=["0.3", "tab:blue"])
    middle.grid(alpha=0.3)
    middle.annotate("text", (0, 1), arrowprops={"arrowstyle": "->"})
    figure.colorbar(right.imshow(np.eye(3), cmap="gray"))
    figure.suptitle("title")
    return figure


def pixels(figure, folder, **options):
    paths = plotting.save({"figure": figure}, folder, **options)
    return {path.stem: imread(path) for path in paths}


def test_a_figure_is_its_own_again_after_it_was_dark(figure, tmp_path):
    before = pixels(figure, tmp_path / "before")["figure"]
    pixels(figure, tmp_path, dark=True)
    np.testing.assert_array_equal(pixels(figure, tmp_path / "after")["figure"], before)


def test_a_figure_is_its_own_again_after_an_error(figure, tmp_path):
    before = pixels(figure, tmp_path / "before")["figure"]
    with pytest.raises(RuntimeError), on_dark_paper(figure):
        raise RuntimeError
    np.testing.assert_array_equal(pixels(figure, tmp_path / "after")["figure"], before)


def test_of_a_line_and_its_paper_the_dark_picture_is_the_negative(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1], color="0.2")
    light, dark = pixels(figure, tmp_path, dark=True).values()
    np.testing.assert_allclose(dark[..., 3], light[..., 3], atol=1 / 255)
    inked = light[..., 3] == 1
    np.testing.assert_allclose(dark[inked][:, :3], 1 - light[inked][:, :3], atol=2 / 255)
    assert inked.any()
    assert not light[..., 3].all()  # the paper shows


def test_boxes_of_texts_and_contours_of_one_color_are_inverted(tmp_path):
    figure = Figure(figsize=(1, 1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.contour([[0, 1], [1, 0]], levels=[0.5], colors="k", linewidths=6)
    axis.text(0.2, 0.2, "O", fontsize=30, bbox={"facecolor": "white", "edgecolor": "none"})
    axis.set_axis_off()
    light, dark = pixels(figure, tmp_path, dark=True).values()
    inked = light[..., 3] == 1
    np.testing.assert_allclose(dark[inked][:, :3], 1 - light[inked][:, :3], atol=2 / 255)
    assert {0.0, 1.0} <= set(light[inked][:, 0].tolist())  # a white box, black lines


def test_a_color_near_gray_stays(tmp_path):
    figure = Figure(figsize=(1, 1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axvline(0.5, color=(0.5, 0.55, 0.6), linewidth=30)
    axis.set_axis_off()
    light, dark = pixels(figure, tmp_path, dark=True).values()
    np.testing.assert_array_equal(dark, light)


def test_colors_and_images_stay(tmp_path):
    figure = Figure(figsize=(1, 1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow([[0.0, 1.0]], cmap="gray", aspect="auto")
    axis.axvline(0.5, color="tab:red", linewidth=8)
    axis.set_axis_off()
    light, dark = pixels(figure, tmp_path, dark=True).values()
    np.testing.assert_array_equal(dark, light)


def test_what_has_no_outline_has_none_when_dark(tmp_path):
    figure = plotting.histograms({"": {"clean": np.arange(9.0), "attacked": np.arange(9.0) + 3}}, xlabel="action")
    filled = figure.axes[0].patches
    outlines = [patch.get_edgecolor() for patch in filled]
    with on_dark_paper(figure):
        assert [patch.get_edgecolor() for patch in filled] == outlines
        assert figure.axes[0].xaxis.label.get_color() == (1, 1, 1, 1)


def test_figures_are_unknown_to_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plotting.histograms({"": {"clean": np.arange(9.0)}}, xlabel="action")
    assert plt.get_fignums() == before


def contrast(one, other):
    """Of WCAG 2, between two colors."""
    low, high = sorted(to_linear(rgb) @ [0.2126, 0.7152, 0.0722] for rgb in (one, other))
    return (high + 0.05) / (low + 0.05)


def to_linear(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def test_ten_colors_of_the_pages_are_told_apart_on_both_papers():
    """WCAG 2 wants a contrast of 3 for graphics."""
    style = Path(__file__).parents[3] / "docs" / "static" / "figures.mplstyle"
    names = rc_params_from_file(style, use_default_template=False)["axes.prop_cycle"].by_key()["color"]
    colors = [np.array(to_rgb(name)) for name in names]
    assert len(colors) == 10
    assert min(contrast(color, np.array(to_rgb(paper))) for color in colors for paper in ("#ffffff", "#131416")) > 3
    assert min(np.linalg.norm(a - b) for a, b in combinations(colors, 2)) > 0.15
