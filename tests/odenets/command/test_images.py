"""Images as they lie in folders: of cameras, of other systems, of other modes."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from odenets.command.images import batches, files_of, resized

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def read(folder):
    """All images of a folder, (N, H, W, C) uint8."""
    ((_, x),) = batches(files_of([folder]), resized(None), 32)
    return (x * 255).round().byte().movedim(1, -1).numpy()


def test_what_macos_and_notebooks_put_beside_images_is_no_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(bytes.fromhex("00051607 00020000"))  # the head of an AppleDouble file
    (tmp_path / ".ipynb_checkpoints").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / ".ipynb_checkpoints" / "1-checkpoint.png")
    assert files_of([tmp_path]) == [tmp_path / "1.png"]


def test_a_folder_within_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".cache" / "photos").mkdir(parents=True)
    Image.fromarray(PIXELS).save(tmp_path / ".cache" / "photos" / "1.png")
    assert len(files_of([tmp_path / ".cache" / "photos"])) == 1


# EXIF 2.32, tag 274: what the first row and the first column of what is stored are in the picture
STORED = {
    1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.swapaxes(0, 1),
    6: np.rot90(PIXELS), 7: PIXELS[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(PIXELS, -1),
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(tmp_path / "1.png", exif=exif)
    assert np.array_equal(read(tmp_path)[0], PIXELS)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "palette with transparency", "CMYK"])
def test_an_image_of_another_mode_is_read_without_a_warning(tmp_path, mode):
    image = Image.fromarray(PIXELS)
    if mode.startswith(("P", "palette")):
        image = image.quantize(16)
        expected = np.array(image.convert("RGB"))
        options = {"transparency": bytes(range(0, 160, 10))} if mode != "P" else {}
        image.save(tmp_path / "1.png", **options)
    else:
        image = image.convert(mode)
        expected = np.array(image.convert("RGB"))
        image.save(tmp_path / ("1.tif" if mode == "CMYK" else "1.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(tmp_path)[0], expected)


def test_a_transform_of_the_user_sees_the_file_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(PIXELS).convert("RGBA").save(tmp_path / "1.png", exif=exif)
    seen = []

    def transform(image):
        seen.append((image.mode, image.size))
        return torch.zeros(3, 1, 1)

    list(batches(files_of([tmp_path]), transform, 1, mode=None))
    assert seen == [("RGBA", (4, 6))]
