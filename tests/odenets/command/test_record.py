"""``odenets record``: its table and files are what ``network.record`` gives, of any model that it names."""

import csv

import pytest
import timm
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import odenets
from odenets import measures
from odenets.command import networks, pathway
from odenets.command.images import batches, files_of, resized

RESNET = ("resnet18", "--weights", "none", "--size", "32")
OPTIONS = ("-o", "solver=bs23", "-o", "depth=3", "-o", "in_channels=3", "-o", "size=8")


def table(text):
    """The numbers of a printed table, by block."""
    lines = [line.split() for line in text.splitlines()]
    start = next(i for i, words in enumerate(lines) if words[:1] == ["block"])
    heads = lines[start][1:]
    rows = [words for words in lines[start + 1 :] if words and words[0].isdecimal()]
    return {
        " ".join(row[1 : -len(heads)]): dict(zip(heads, map(float, row[-len(heads) :]), strict=True)) for row in rows
    }


def rows_of(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def direct(model, x, **measured):
    """What ``record`` gives of the same, without the command."""
    network = odenets.adapt(model.eval())
    with torch.no_grad():
        return network.record(x, **measured)[1]


def batch(folder, transform):
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files_of([folder])])


@pytest.mark.parametrize("size", [2, 32])
def test_the_table_is_the_mean_of_a_record_whatever_the_batches(run, images, size):
    result = run("record", *RESNET, images, "--batch-size", size, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    torch.manual_seed(1)
    model = torchvision.models.resnet18()
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)
    names = ["action", "residue", "cosine"]
    expected = direct(model, batch(images, transform), **{name: getattr(measures, name) for name in names})
    printed = table(result.stdout)
    assert tuple(printed) == expected.blocks
    for name in names:
        means = torch.tensor([row[name] for row in printed.values()])
        torch.testing.assert_close(means, expected[name].mean(1), rtol=1e-3, atol=1e-6)
    assert {row["h"] for row in printed.values()} == {1.0}


def test_the_file_of_rows_has_each_image_and_block(run, images, tmp_path):
    result = run("record", *RESNET, images, "--csv", tmp_path / "new" / "rows.csv", "-m", "displacement")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "new" / "rows.csv")
    torch.manual_seed(0)
    transform = torchvision.models.ResNet18_Weights.DEFAULT.transforms(crop_size=32, resize_size=32)
    expected = direct(torchvision.models.resnet18(), batch(images, transform), displacement=measures.displacement)
    assert [row["image"] for row in rows[::8]] == [*map(str, files_of([images]))]
    assert [row["name"] for row in rows[:8]] == [*expected.blocks]
    values = torch.tensor([float(row["displacement"]) for row in rows]).reshape(5, 8).T
    torch.testing.assert_close(values, expected["displacement"], rtol=1e-4, atol=1e-6)


def test_a_figure_is_drawn(run, images, tmp_path):
    result = run("record", *RESNET, images, "--figure", tmp_path / "path.png", "--by-folder")
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "path.png") as figure:
        assert figure.width > 500


@pytest.mark.parametrize(("words", "groups"), [([], []), (["--by-folder"], ["cats", "dogs"])])
def test_by_folder_groups_the_images_of_the_figure(run, images, tmp_path, monkeypatch, words, groups):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **k: figures.append(self) or savefig(self, *args, **k))
    result = run("record", *RESNET, images, "-m", "action", "--figure", tmp_path / "path.png", *words)
    assert result.exit_code == 0, result.stderr
    samples, means = figures[0].axes[:2]
    assert [line.get_label() for line in means.lines if not line.get_label().startswith("_")] == groups
    labels = [label.get_text() for label in samples.get_xticklabels()]
    assert (labels == groups) == bool(groups)
    if groups:
        assert samples.get_xticks() == pytest.approx([1.0, 3.5])  # the middles of three images and two


def test_without_a_size_images_are_prepared_as_for_the_weights(images):
    model = networks.build("resnet18", "none", [])
    usual = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    image = Image.open(files_of([images])[0]).convert("RGB")
    assert torch.equal(model.prepare(None)(image), usual(image))
    assert model.prepare((32, 48))(image).shape == (3, 32, 48)


def test_a_name_of_timm_and_its_own_preparation(run, images):
    result = run("record", "timm:resnet10t", "--weights", "none", "--size", "32", images)
    assert result.exit_code == 0, result.stderr
    torch.manual_seed(0)
    model = timm.create_model("resnet10t")
    settings = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32), "crop_pct": 1.0}
    expected = direct(model, batch(images, timm.data.create_transform(**settings)), action=measures.action)
    printed = [row["action"] for row in table(result.stdout).values()]
    torch.testing.assert_close(torch.tensor(printed), expected["action"].mean(1), rtol=1e-3, atol=1e-6)


def test_options_build_a_network_of_ours_whose_error_is_measured(run, images):
    result = run("record", "small_network", *OPTIONS, "--size", "8", images)
    assert result.exit_code == 0, result.stderr
    torch.manual_seed(0)
    network = odenets.models.small_network(3, solver="bs23", depth=3, size=8)
    with torch.no_grad():
        expected = network.eval().record(batch(images, resized((8, 8))), error=measures.error)[1]["error"].mean(1)
    printed = table(result.stdout)
    torch.testing.assert_close(torch.tensor([row["error"] for row in printed.values()]), expected, rtol=1e-3, atol=1e-6)
    assert "error" not in table(run("record", *RESNET, images).stdout)["layer1.0"]


def test_gray_images_have_one_channel(run, images):
    assert run("record", "small_network", "--gray", "--size", "8", images).exit_code == 0


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's in the working folder: a network, a transform and a measure."""
    (tmp_path / "mine_of_a_user.py").write_text("""
import torch, torchvision
def network(width=4):
    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 1), torchvision.models.resnet.BasicBlock(width, width))
def transform(image):
    return torch.full((3, 4, 4), image.width / 40)
def peak(step):
    return step.x1.flatten(1).amax(1)
def broken():
    raise OSError("no disk")
number = 3
ready = network()
""")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_module")
def test_functions_of_the_user_are_model_transform_and_measure(run, images):
    mine = [f"mine_of_a_user:{name}" for name in ("network", "transform", "peak")]
    result = run("record", mine[0], images, "--transform", mine[1], "--measure", mine[2], "-o", "width=6")
    assert result.exit_code == 0, result.stderr
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = nn.Sequential(nn.Conv2d(3, 6, 1), block(6, 6))
    expected = direct(model, torch.ones(5, 3, 4, 4), peak=lambda step: step.x1.flatten(1).amax(1))["peak"].mean(1)
    assert table(result.stdout)["1"]["peak"] == pytest.approx(expected.item(), rel=1e-3)
    assert result.stdout.startswith("mine_of_a_user:network (Sequential), the weights that it has, on ")


@pytest.mark.usefixtures("own_module")
def test_a_network_of_a_module_is_recorded_and_takes_no_options(run, images):
    words = ("record", "mine_of_a_user:ready", images)
    assert run(*words).exit_code == 0
    result = run(*words, "-o", "depth=3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: --option is for a function that returns a network; mine_of_a_user:ready is a network already: leave "
        "out depth, or name the function\n"
    )


def test_an_image_that_is_named_again_counts_once(run, images, monkeypatch):
    monkeypatch.chdir(images.parent)
    first = images / "cats" / "0.png"
    result = run("record", *RESNET, first, "images", images, "images/dogs/../cats", "--csv", "rows.csv")
    assert result.exit_code == 0, result.stderr
    assert "\n5 images of " in result.stdout
    assert [row["image"] for row in rows_of(images.parent / "rows.csv")[::8]] == [
        str(first), "images/cats/1.png", "images/cats/2.png", "images/dogs/3.png", "images/dogs/4.png"
    ]  # fmt: skip


def test_images_are_in_the_order_of_their_places_and_there_of_their_names(run, images, tmp_path):
    result = run("record", *RESNET, images / "dogs", images / "cats", "--csv", tmp_path / "rows.csv")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["image"] for row in rows[::8]] == [
        str(images / name) for name in ("dogs/3.png", "dogs/4.png", "cats/0.png", "cats/1.png", "cats/2.png")
    ]


def test_a_batch_may_be_of_any_size(run, images):
    result = run("record", *RESNET, images, "--batch-size", 10**30)
    assert result.exit_code == 0, result.stderr


def test_blocks_name_what_adapt_does_not_know(run, images):
    words = ("record", "squeezenet1_1", "--weights", "none", "--size", "64", images)
    refused = run(*words)
    assert (refused.exit_code, refused.stdout) == (1, "")
    with pytest.raises(ValueError) as raised:
        odenets.adapt(torchvision.models.squeezenet1_1(), torch.rand(2, 3, 64, 64))
    assert " ".join(str(raised.value).split()) in refused.stderr
    named = run(*words, "--blocks", "features.4")
    assert named.exit_code == 0, named.stderr
    assert list(table(named.stdout)) == ["features.4"]


def test_the_layers_of_a_chain_are_its_rows(run, images):
    result = run("record", "vgg11", "--weights", "none", "--size", "32", images)
    assert result.exit_code == 0, result.stderr
    assert "a row for each of 5 layers that keep the shape" in result.stdout
    assert "features.8:features.9" in table(result.stdout)


def test_steps_of_an_error_control_that_differ_by_batch_are_refused():
    class Control(nn.Module):
        count = 1

        def record(self, x, **measured):
            self.count += 1
            return x, odenets.Records({name: torch.zeros(self.count, len(x)) for name in measured})

    loaded = [([f"{i}.png"], torch.zeros(1, 3, 4, 4)) for i in range(2)]
    with pytest.raises(pathway.Mistake, match=r"2 steps on the first images and 3 on those from 1.png"):
        pathway.record_images(Control(), loaded, {"action": measures.action}, "ode")


def test_a_large_folder_is_read_a_batch_at_a_time(images):
    seen = []

    def transform(image):
        seen.append(image)
        return torch.zeros(3, 2, 2)

    stream = batches(files_of([images]), transform, 2)
    next(stream)
    assert len(seen) == 2
