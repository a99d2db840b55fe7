import pytest

from tests.odenets.detection.victims import digits


@pytest.fixture(scope="session")
def batch():
    """Images and labels to attack."""
    _, test = digits()
    return test.x[:12], test.y[:12]
