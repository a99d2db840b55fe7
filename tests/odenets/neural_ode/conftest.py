"""What the tests of neural ODEs share: states and a field."""

import pytest
import torch

from odenets import MLPField


@pytest.fixture
def x():
    return torch.randn(5, 3, dtype=torch.float64)


@pytest.fixture
def field():
    return MLPField(3, 16, activation="tanh", time=True).double()
