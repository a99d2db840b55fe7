"""Calibration data that is none: errors by the name of the argument."""

from __future__ import annotations

import pytest
import torch

from odenets.depth import compress
from tests.odenets.depth.compression.networks import images


def test_inputs_that_the_network_does_not_take_are_refused_by_the_name_of_the_calibration():
    network, x, y = images(), torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.long)
    for data in ([y], [x, x, y], [x[:, :, 0]], [{"pixels": x}]):
        with pytest.raises(ValueError, match="calibration must hold batches of inputs that Sequential takes"):
            compress(network, data, remove=1)
    for data in (x, {"x": x}, "x", (x, y)):
        with pytest.raises(TypeError, match="calibration must hold batches"):
            compress(network, data, remove=1)
