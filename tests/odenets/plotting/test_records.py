"""The figure of a record: what it shows, and that it can be read."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from odenets import Flow, Records, adapt, measures, models, plotting
from tests.odenets.adapting.models import small_resnet, small_vit

LONG = "encoder.layers.encoder_layer_{} attention"


def shown(figure):
    """Rows of axes: the colors, the curves and the bar of each measure."""
    count = len(figure.axes) // 3
    panels, bars = figure.axes[: 2 * count], figure.axes[2 * count :]
    return [(panels[2 * i], panels[2 * i + 1], bars[i]) for i in range(count)]


def texts(labels):
    return [label.get_text() for label in labels]


def test_colors_are_the_values_of_blocks_and_samples():
    values = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 0.5]], requires_grad=True)
    figure = plotting.blocks_by_samples(Records({"action": values}, blocks=["layer1.0", "layer1.1"]))
    ((colors, curves, bar),) = shown(figure)
    np.testing.assert_array_equal(colors.images[0].get_array(), values.detach())
    assert texts(colors.get_yticklabels()) == ["layer1.0", "layer1.1"]
    assert colors.get_xlabel() == "sample"
    assert bar.get_ylabel() == "action (state² / time)"
    np.testing.assert_allclose(curves.lines[0].get_xdata(), values.detach().mean(1))
    np.testing.assert_allclose(curves.lines[0].get_ydata(), [0, 1])
    assert curves.get_ylim() == colors.get_ylim()


def test_the_interval_is_that_of_the_samples():
    values = torch.rand(3, 101).sort(1).values
    (_, curves, _), *_ = shown(plotting.blocks_by_samples(Records({"a": values})))
    points = curves.collections[0].get_paths()[0].vertices
    for m, row in enumerate(values.numpy()):
        ends = points[np.isclose(points[:, 1], m)][:, 0]
        np.testing.assert_allclose([ends.min(), ends.max()], row[[5, 95]], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "name", "limits", "extend"),
    [
        ([[0.0, 1.0], [2.0, 4.0]], "viridis", (0, 3.94), "max"),
        ([[3.0, 3.0], [3.0, 3.0]], "viridis", (0, 3), "neither"),
        ([[0.0, 0.0], [0.0, 0.0]], "viridis", (0, 1), "neither"),
        ([[0.0] * 1000, [0.0] * 999 + [2.0]], "viridis", (0, 2), "neither"),
        ([[0.0] * 1000, [-1.0] + [0.0] * 998 + [2.0]], "RdBu_r", (-2, 2), "neither"),
        ([[-4.0, 1.0], [2.0, 2.0]], "RdBu_r", (-3.85, 3.85), "min"),
        ([[-4.0, -2.0], [-3.0, -3.0]], "viridis", (-3.97, 0), "min"),
        ([[-2.0, -2.0], [-2.0, -2.0]], "viridis", (-2, 0), "neither"),
    ],
)
def test_colors_begin_at_zero_or_are_even_about_it(values, name, limits, extend):
    """One value alone has its color with a bar too (matplotlib#15566)."""
    figure = plotting.blocks_by_samples(Records({"a": torch.tensor(values)}))
    image = shown(figure)[0][0].images[0]
    figure.canvas.draw()
    assert image.get_cmap().name == name
    np.testing.assert_allclose(image.get_clim(), limits)
    assert image.colorbar.extend == extend


def test_what_is_not_finite_is_gray_and_counted_and_leaves_the_curve():
    values = torch.tensor([[1.0, 3.0, torch.nan], [torch.inf, torch.nan, torch.nan], [2.0, 2.0, 2.0]])
    ((colors, curves, _),) = shown(plotting.blocks_by_samples(Records({"a": values})))
    image = colors.images[0]
    np.testing.assert_array_equal(image.get_array().mask, ~values.isfinite())
    assert image.get_cmap().get_bad().tolist() == [0.75, 0.75, 0.75, 1]
    assert colors.get_title() == "4 of 9 values are not finite (gray)"
    np.testing.assert_allclose(curves.lines[0].get_xydata(), [[2, 0], [2, 2]])


def test_nothing_finite_is_drawn_too():
    figure = plotting.blocks_by_samples(Records({"a": torch.full((2, 3), torch.nan)}))
    figure.canvas.draw()
    assert shown(figure)[0][0].images[0].get_array().mask.all()


@pytest.mark.parametrize("labels", [torch.tensor([2, 0, 2, 0]), np.array([2, 0, 2, 0]), ["cat", "ape", "cat", "ape"]])
def test_samples_stand_by_label_and_by_mean(labels):
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    figure = plotting.blocks_by_samples(Records({"a": values}), labels=labels, sort=True)
    ((colors, curves, _),) = shown(figure)
    assert colors.images[0].get_array()[0].tolist() == [1, 3, 2, 4]
    names = sorted(set(map(str, np.asarray(labels).tolist())))
    assert texts(colors.get_xticklabels()) == texts(curves.get_legend().get_texts()) == names
    assert [line.get_xdata()[0] for line in curves.lines] == [2, 3]
    (plain, _, _), *_ = shown(plotting.blocks_by_samples(Records({"a": values}), sort=True))
    assert plain.images[0].get_array()[0].tolist() == [1, 2, 3, 4]
    assert plain.get_xlabel() == "samples by their mean"


def test_many_labels_have_one_curve():
    figure = plotting.blocks_by_samples(Records({"a": torch.rand(3, 400)}), labels=torch.arange(400) % 100)
    ((colors, curves, _),) = shown(figure)
    assert len(curves.lines) == 1
    assert curves.get_legend() is None
    assert 0 < len(colors.get_xticklabels()) < 100


@pytest.mark.parametrize(
    ("blocks", "name"),
    [(1, "block {}"), (8, LONG), (50, "block {}"), (54, LONG), (108, "a_module_of_a_very_long_name_that_goes_on_{}")],
)
def test_names_of_blocks_do_not_overlap(blocks, name):
    """As many as can be read are there, seaborn's heat maps skip or overlap (seaborn#1192)."""
    names = [name.format(m) for m in range(blocks)]
    records = Records({"action": torch.rand(blocks, 5)}, blocks=names)
    figure = plotting.blocks_by_samples(records)
    figure.canvas.draw()
    colors = shown(figure)[0][0]
    boxes = [label.get_window_extent() for label in colors.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    assert len(boxes) == blocks if blocks <= 54 else len(boxes) >= 30
    assert colors.get_window_extent().width > 0.25 * figure.bbox.width
    assert all(box.x0 >= 0 for box in boxes)


@pytest.mark.parametrize("labels", [None, torch.arange(60) % 30, [f"a long label {i % 7}" for i in range(60)]])
def test_names_of_samples_do_not_overlap(labels):
    figure = plotting.blocks_by_samples(Records({"a": 1e12 * torch.rand(8, 60)}), labels=labels)
    figure.canvas.draw()
    for axis in figure.axes[:2]:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        assert len(boxes) > 2
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_what_all_names_begin_with_is_said_once():
    blocks = [LONG.format(m) for m in range(3)]
    (colors, _, _), *_ = shown(plotting.blocks_by_samples(Records({"a": torch.rand(3, 4)}, blocks=blocks)))
    assert colors.get_ylabel() == "encoder.layers"
    assert texts(colors.get_yticklabels()) == [f"encoder_layer_{m} attention" for m in range(3)]


@pytest.mark.parametrize(
    ("network", "x"),
    [
        (Flow(solver="bs23", depth=3), torch.randn(5, 2)),
        (models.small_network(depth=3), torch.rand(2, 1, 8, 8)),
        (adapt(small_resnet().eval()), torch.rand(2, 3, 64, 64)),
        (adapt(small_vit().eval()), torch.rand(2, 3, 32, 32)),
    ],
    ids=["flow", "network", "resnet", "vit"],
)
def test_each_network_has_its_figure(network, x, tmp_path):
    _, records = network.record(x, action=measures.action, cosine=measures.cosine)
    figure = plotting.blocks_by_samples(records, units={"cosine": "of one"})
    rows = shown(figure)
    assert [bar.get_ylabel() for _, _, bar in rows] == ["action (state² / time)", "cosine (of one)"]
    for (colors, _, _), values in zip(rows, records.values(), strict=True):
        np.testing.assert_allclose(colors.images[0].get_array(), values.detach())
        borders = [line.get_ydata()[0] for line in colors.lines]
        assert borders == [start - 0.5 for start in records.starts[1:]]
    assert plotting.save({"record": figure}, tmp_path)[0].stat().st_size > 5000


RECORDS = Records({"a": torch.rand(2, 3)})


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (({"a": torch.rand(2, 3)},), {}, TypeError, r"records must be what record .* got dict"),
        ((RECORDS, "b"), {}, ValueError, "measures must be among a, got 'b'"),
        ((RECORDS, []), {}, ValueError, "must hold a measure of some blocks"),
        ((Records({}),), {}, ValueError, "must hold a measure of some blocks"),
        ((RECORDS,), {"labels": [1, 2]}, ValueError, r"each of the 3 samples, got shape \(2,\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(args, options, error, message):
    with pytest.raises(error, match=message):
        plotting.blocks_by_samples(*args, **options)
