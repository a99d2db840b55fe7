import pytest

from odenets.training import datasets


@pytest.fixture(scope="session")
def parts():
    """200 digits to train on, 50 to validate."""
    return datasets.split(*datasets.load("digits"), size=250)
