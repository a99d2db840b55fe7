"""Graphs of tests are traced whole and run by torch itself, which takes a tenth of the compiler's time."""

import pytest

from solvers.graph import compilation, loop, solve


@pytest.fixture(autouse=True)
def _traced(monkeypatch, request):
    if not compilation.WRITES and request.node.get_closest_marker("gpu") is None:
        pytest.skip("this torch has no graphs with gradients")
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")


@pytest.fixture
def few_slots(monkeypatch):
    """Room for the states of five steps, and for three on the way."""
    monkeypatch.setattr(solve, "SLOTS", 5)
    monkeypatch.setattr(compilation, "SLOTS", 5)
    monkeypatch.setattr(loop, "MARKS", 3)
    compilation.forget()
    yield
    compilation.forget()
