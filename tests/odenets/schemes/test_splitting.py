"""Splittings are their formulas; Strang's is of second order in exact flows of its parts."""

import itertools

import pytest
import torch

import odenets
from odenets.schemes import Splitting
from tests.odenets.schemes.fields import Tanh, assert_same, fields_of, flow_of


def test_lie_and_trotter_is_euler_of_the_parts_in_turns():
    flow, x = flow_of("lie_trotter")
    y = x
    for f, g in fields_of(flow):
        y = y + 0.3 * f(y)
        y = y + 0.3 * g(y)
    assert_same(flow, x, y)
    halves = [odenets.Block([field], block.h) for block in flow.blocks for field in block.fields]
    torch.testing.assert_close(odenets.Flow.of(halves, solver="euler")(x), y)


def test_strang_is_its_formula():
    flow, x = flow_of("strang")
    y = x
    for f, g in fields_of(flow):
        y = y + 0.15 * f(y)
        y = y + 0.3 * g(y)
        y = y + 0.15 * f(y)
    assert_same(flow, x, y)


def test_a_source_gives_the_parts_in_turns():
    kinds = itertools.cycle([Tanh, lambda: torch.nn.Sequential()])
    flow = odenets.Flow(lambda: _Named(next(kinds)()), solver="strang", depth=2)
    assert [[type(f.inner).__name__ for f in block.fields] for block in flow.blocks] == [["Tanh", "Sequential"]] * 2


class _Named(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, t, x):
        return x


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be 'lie_trotter' or 'strang', got 'yoshida'"):
        Splitting("yoshida")
