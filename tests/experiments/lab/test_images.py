import numpy as np
import pytest
import torch

from lab import images


@pytest.fixture
def file(tmp_path):
    arrays = {}
    for part, n in (("train", 40), ("test", 20)):
        arrays[f"{part}_images"] = np.arange(n * 2 * 2 * 3, dtype=np.uint8).reshape(n, 2, 2, 3)
        arrays[f"{part}_labels"] = np.arange(n) % 4
    np.savez(tmp_path / "made.npz", **arrays)
    return arrays


def test_a_data_set_may_be_a_file(file, tmp_path):
    parts = images.split("made.npz", tmp_path, train_size=20)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (16, 4, 20)
    assert (parts.train.name, parts.train.classes) == ("made", 4)
    expected = torch.from_numpy(file["test_images"]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(parts.test.x, expected)
    assert parts.train.mean == pytest.approx(file["train_images"].mean((0, 1, 2)) / 255)


def test_a_file_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.npz' does not exist; give its folder"):
        images.train_and_test("gone.npz", tmp_path)
    np.savez(tmp_path / "half.npz", train_images=np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="must hold arrays test_images, test_labels, train_labels, got train_images"):
        images.train_and_test("half.npz", tmp_path)
