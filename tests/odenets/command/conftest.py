import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from odenets.command.application import app


@pytest.fixture
def run():
    """``run("record", "resnet18", ...)``: the result of the command in this process."""
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture
def images(tmp_path):
    """A folder of five images in the folders of two classes, with a file beside them that is none."""
    numbers = np.random.default_rng(0)
    for i in range(5):
        folder = tmp_path / "images" / ("cats" if i < 3 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "images" / "notes.txt").write_text("none")
    return tmp_path / "images"
