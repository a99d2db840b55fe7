"""Extraction: samples that were seen already are told by their bytes."""

import pytest
import torch

from odenets.detection.extraction import first_of_each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.long, torch.bool])
def test_samples_that_come_again_are_told(dtype):
    x, seen = torch.tensor([[0, 1], [1, 0], [0, 1]]).to(dtype), set()
    assert first_of_each(x, seen).tolist() == [True, True, False]
    assert first_of_each(x.flip(0), seen).tolist() == [False, False, False]
    assert first_of_each(x[:1] * 0, seen).tolist() == [True]


def test_of_inputs_by_keyword_all_count():
    ids, mask, seen = torch.ones(3, 4), torch.ones(3, 4), set()
    mask[1] = 0
    assert first_of_each({"ids": ids, "mask": mask, "deep": True}, seen).tolist() == [True, True, False]
