"""How often a solve in a graph waits for a device."""

import pytest
import torch
from torch import nn

from benchmarks.gpu.timing import waits
from solvers import Fixed, Tolerance, integrate
from solvers.graph import compilation
from solvers.graph.compiler import compile_loops


@pytest.mark.gpu
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_one_wait_for_each_step(control, monkeypatch):
    """The loop's condition is read on the host; the numbers of a solve are read once, at its end."""
    monkeypatch.setattr(compilation, "BACKEND", compile_loops)
    field, x, found = nn.Linear(2, 2).double().cuda(), torch.randn(5, 2, dtype=torch.float64, device="cuda"), {}
    for steps in (2, 8):
        tolerance = Tolerance(first_step=1 / steps, max_step=1 / steps)
        options = {"tolerance": tolerance, "controller": Fixed(), "control": control, "keep": "last", "graph": True}

        def solve(options=options):
            with torch.no_grad():
                return integrate(lambda t, x: field(x), x, 0.0, 1.0, **options)

        assert solve().stats.accepted in (steps, 5 * steps)
        found[steps] = waits(solve)
    assert found[8] - found[2] == 6
    assert found[2] <= 6
