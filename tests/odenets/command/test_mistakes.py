"""What a user can get wrong is one line on the standard error with an exit code, and no traceback."""

import importlib.util
import urllib.error
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from odenets.command import mistakes, networks, pathway, preparation

NONE = ("--weights", "none", "--size", "32")


@pytest.fixture
def told(run):
    """``told(code, ...)``: the line of a call that fails."""

    def call(code, *words):
        result = run(*words)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert type(result.exception) is SystemExit
        return result.stderr.removeprefix("Error: ").strip()

    return call


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnte18", "resnet18"), ("smal_network", "small_network"), ("timm:convnext_ato", "convnext_atto"),
     ("resnet50.a1_in2k", "resnet50.a1_in1k"), ("torchvision:resnet81", "resnet18")],
)  # fmt: skip
def test_an_unknown_model_comes_with_near_ones(told, images, name, near):
    line = told(2, "record", name, images)
    assert line.startswith(f"MODEL {name} is neither torchvision's nor timm's nor one of odenets.models: did you mean ")
    assert near in line


def test_without_timm_an_unknown_model_says_that_its_names_need_it(told, images, monkeypatch):
    real = networks.import_module

    def import_module(name):
        if name.startswith("timm"):
            raise ModuleNotFoundError(name=name)
        return real(name)

    monkeypatch.setattr(networks, "import_module", import_module)
    assert told(2, "record", "convnext_atto", images).endswith("; for timm's names: pip install timm")


def test_a_file_is_no_model(told, images, tmp_path):
    torch.save({}, tmp_path / "net.pth")
    line = told(2, "record", tmp_path / "net.pth", images)
    assert line.endswith(f"odenets record resnet18 IMAGES --weights {tmp_path / 'net.pth'}")


def test_a_folder_without_images(told, tmp_path):
    (tmp_path / "a.txt").write_text("none")
    assert told(2, "record", "resnet18", tmp_path, *NONE).startswith(f"the folder {tmp_path} holds no images (.bmp, ")


@pytest.mark.parametrize("content", ["text", "cut", "empty"])
def test_an_image_that_cannot_be_read_is_named(told, images, content):
    file, whole = images / "cats" / "1.png", (images / "cats" / "1.png").read_bytes()
    file.write_bytes({"text": b"no image", "cut": whole[:1000], "empty": b""}[content])
    assert told(1, "record", "resnet18", images, *NONE).startswith(f"{file} cannot be read as an image: ")


@pytest.mark.filterwarnings("always")
def test_all_images_that_cannot_be_read_are_named(told, run, images, tmp_path):
    for i in (0, 2, 3, 4):
        (images / ("cats" if i < 3 else "dogs") / f"{i}.png").write_bytes(b"no image")
    line = told(1, "record", "resnet18", images, *NONE, "--batch-size", 2, "--csv", tmp_path / "rows.csv")
    assert line.startswith(f"4 of 5 images cannot be read: {images / 'cats' / '0.png'} cannot be read as an image: ")
    assert line.endswith("; and 1 more; --skip-unreadable goes on without")
    assert not (tmp_path / "rows.csv").exists()
    words = ("record", "resnet18", images, *NONE, "--batch-size", 2, "--csv", tmp_path / "rows.csv")
    result = run(*words, "--skip-unreadable")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith(f"Warning: 4 of 5 images cannot be read and are left out: {images / 'cats'}")
    assert result.stdout.splitlines()[1].startswith("1 image of 3 x 32 x 32")
    rows = (tmp_path / "rows.csv").read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == {str(images / "cats" / "1.png")}
    (images / "cats" / "1.png").write_bytes(b"")
    assert told(1, *words, "--skip-unreadable").endswith("and 2 more")


def test_pixels_of_16_bits_are_not_cut(told, images):
    file = images / "deep.png"
    Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16)).save(file)
    assert told(1, "record", "resnet18", images, *NONE).startswith(f"{file} has pixels of more than 8 bits (mode I;16)")


def test_images_of_several_sizes_are_named(told, images):
    Image.new("RGB", (20, 30)).save(images / "small.png")
    line = told(2, "record", "small_network", images, "--gray")
    assert line == (
        f"the images must have one shape, got 1 x 40 x 40, {images / 'cats' / '0.png'}, and 1 x 30 x 20, "
        f"{images / 'small.png'}: --size 224 makes them one size"
    )


def test_images_that_do_not_fit_the_network(told, images):
    line = told(1, "record", "small_network", images, "--size", "8")
    assert line.startswith("small_network cannot be recorded on images 5 x 3 x 8 x 8: ")
    line = told(1, "record", "vit_b_32", images, "--weights", "none", "--size", "64", "--blocks", "encoder.layers")
    assert line == (
        "vit_b_32 cannot be recorded on images 5 x 3 x 64 x 64: "
        "AssertionError: Wrong image height! Expected 224 but got 64!"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--measure", "acton"], "--measure must be action, residue, cosine, error, displacement, square_norm or "
         "module:function, got acton: did you mean action?"),
        (["--size", "x"], "--size must be a number of pixels, 224, or height and width, 224x320, got x"),
        (["--option", "classes"], "--option must be name=value, such as num_classes=10, got classes"),
        (["--weights", "IMAGENET"], "--weights must be DEFAULT, none, IMAGENET1K_V1 or a file, got IMAGENET"),
        (["--weights", "no/file.pth"], "--weights: no file no/file.pth"),
        (["--figure", "path.gif"], "--figure must end in .png, .pdf, .svg, got path.gif"),
        (["--by-folder"], "--by-folder groups the images of a figure: --figure FILE.png"),
        (["--transform", "f"], "--transform must be package.module:function, got f"),
        (["--transform", "m:f", "--gray"], "--transform takes the place of --size and --gray: name it alone"),
        (["--measure", "math:gama"], "--measure math:gama: math has no function gama: did you mean gamma or lgamma?"),
        (["--csv", "."], "--csv must be a file, got the folder ."),
        (["--seed", "99999999999999999999999"], "--seed must be from -2**63 to 2**64 - 1, got 99999999999999999999999"),
        (["-o", "num_classes=3", "-o", "num_classes=4"], "--option must name num_classes once, got it again: "
         "num_classes=4"),
        (["-m", "math:cos", "-m", "cmath:cos"], "--measure: math:cos and cmath:cos are both called cos and need names "
         "of their own: leave one out, or give the function another name"),
        (["-m", "action", "-m", "builtins:action"], "--measure: action and builtins:action are both called action and "
         "need names of their own: leave one out, or give the function another name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_argument_that_is_wrong_is_named(told, images, words, line):
    if "--weights" not in words:
        words = [*words, "--weights", "none"]
    assert told(2, "record", "resnet18", images, *words) == line


@pytest.mark.parametrize("option", ["--csv", "--figure"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(told, images, option, monkeypatch):
    monkeypatch.setattr(pathway, "build", None)
    file = images / "notes.txt" / "new" / "path.png"
    line = told(2, "record", "resnet18", images, *NONE, option, file)
    assert line == f"{option} cannot write {file}: {images / 'notes.txt'} is no folder that one may write to"


@pytest.mark.parametrize("option", ["--csv", "--figure"])
def test_a_disk_that_is_full_is_told(run, images, option, monkeypatch):
    def full(file, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "write_atomically", full)
    result = run("record", "resnet18", images, *NONE, option, images / "path.png")
    assert result.exit_code == 1
    assert "block" in result.stdout  # the table is there
    assert result.stderr == f"Error: {images / 'path.png'} cannot be written: [Errno 28] No space left on device\n"


def test_measures_and_options_that_the_model_refuses(told, images):
    assert "embedded" in told(1, "record", "resnet18", images, *NONE, "-m", "error")
    line = told(2, "record", "resnet18", images, *NONE, "-o", "depth=3")
    assert line.startswith("resnet18(depth=3) cannot be built: TypeError: ")
    assert "records its own steps" in told(2, "record", "small_network", images, "--gray", "--blocks", "flow")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "no_such_module_of_a_user:f",
            "does not load: ModuleNotFoundError: No module named 'no_such_module_of_a_user'",
        ),
        ("math:pi", "math has no function pi"),
        ("math:cos", "cannot be built: TypeError: "),
        ("builtins:dict", "MODEL builtins:dict must return a network, a torch module, got dict"),
    ],
)
def test_a_function_that_is_no_model(told, images, name, line):
    assert line in told(2, "record", name, images)


def test_weights_that_cannot_be_downloaded(told, images, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    line = told(1, "record", "resnet18", images)
    assert "URLError: <urlopen error no route to host>" in line
    assert line.endswith("--weights none takes random ones, --weights FILE those of a file")


def test_weights_of_timm_that_cannot_be_downloaded(told, images, monkeypatch):
    real = timm.create_model

    def create_model(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    assert "OSError: no route to host" in told(1, "record", "timm:resnet10t", images)


def test_a_library_that_is_missing_is_told_before_the_work(told, images, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(mistakes, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    monkeypatch.setattr(pathway, "build", None)
    line = told(1, "record", "resnet18", images, "--figure", "path.png")
    assert line == "--figure needs matplotlib, which is not installed: pip install 'odenets[plot]'"


def test_what_needs_an_extra_is_a_line(told, images, monkeypatch):
    def missing():
        raise ModuleNotFoundError("torchvision is needed here and not installed: pip install 'odenets[images]'")

    monkeypatch.setattr(networks, "_visual", missing)
    assert told(1, "record", "resnet18", images).endswith("pip install 'odenets[images]'")


def test_a_warning_is_a_line(capsys):
    with mistakes.told():
        warnings.simplefilter("always")
        warnings.warn("two\nlines", stacklevel=1)
    assert capsys.readouterr().err == "Warning: two lines\n"


def test_a_fault_of_ours_is_no_mistake_of_the_user():
    with pytest.raises(ZeroDivisionError), mistakes.told():
        1 / 0  # noqa: B018
