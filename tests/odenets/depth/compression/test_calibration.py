"""Calibration data that is none: errors by the name of the argument."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from odenets.depth import compress
from odenets.depth.compression.calibration import batches_of
from tests.odenets.depth.compression.networks import images


def test_inputs_that_the_network_does_not_take_are_refused_by_the_name_of_the_calibration():
    network, x, y = images(), torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.long)
    for data in ([y], [x, x, y], [x[:, :, 0]], [{"pixels": x}]):
        with pytest.raises(ValueError, match="calibration must hold batches of inputs that Sequential takes"):
            compress(network, data, remove=1)
    for data in (x, {"x": x}, "x", (x, y)):
        with pytest.raises(TypeError, match="calibration must hold batches"):
            compress(network, data, remove=1)


def test_samples_that_are_held_out_by_the_caller():
    model, x, y = nn.Linear(3, 2), torch.rand(6, 3), torch.rand(4, 3)
    batches = batches_of([x[:4], x[4:]], model, [(y, torch.zeros(4))])
    assert batches.held_out == (False, False, True)
    assert torch.equal(batches.on_which_to_choose().inputs[0], y)
    with pytest.raises(ValueError, match="calibration and held_out must both hold samples, got 6 and 0"):
        batches_of([x], model, [y[:0]])
