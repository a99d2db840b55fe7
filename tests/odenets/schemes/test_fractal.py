"""FractalNet's blocks are the fractals of their paper, written as its recursion."""

import itertools

import pytest
import torch

import odenets
from odenets import measures
from odenets.schemes import Fractal
from tests.odenets.schemes.fields import Tanh, assert_same, fields_of, flow_of


def columns_of(fields, columns):
    """The cells of each column, in order."""
    return [fields[2**c - 1 : 2 ** (c + 1) - 1] for c in range(columns)]


def expand(cells, z, h, cell):
    """The outputs of all columns of a fractal, of which the last join takes the mean; ``cells`` are those of each.

    The paper's f_{C+1} = (f_C of f_C) joined with a cell: two fractals of half the time, one after the other, beside
    the shallowest column.
    """
    shallow, *deeper = cells
    out = [cell(shallow[0], z, h)]
    if deeper:
        halves = [[own[: len(own) // 2] for own in deeper], [own[len(own) // 2 :] for own in deeper]]
        middle = torch.stack(expand(halves[0], z, h / 2, cell)).mean(0)
        out += expand(halves[1], middle, h / 2, cell)
    return out


CELLS = {"euler": lambda f, z, h: z + h * f(z), "plain": lambda f, z, h: f(z)}


@pytest.mark.parametrize(("columns", "cells"), [*itertools.product([1, 2, 4], CELLS)])
def test_blocks_are_the_recursion(columns, cells):
    flow, x = flow_of(Fractal(columns, cells=cells), depth=2)
    y = x
    for own in fields_of(flow):
        assert len(own) == 2**columns - 1
        y = torch.stack(expand(columns_of(own, columns), y, 0.3, CELLS[cells])).mean(0)
    assert_same(flow, x, y)


@pytest.mark.parametrize("column", [1, 2, 3])
def test_a_column_is_a_network_of_its_own(column):
    flow, x = flow_of(Fractal(3), depth=2)
    alone = odenets.Flow.of([*flow.blocks], solver=flow.tableau.column(column))
    y, h = x, 0.3 / 2 ** (column - 1)
    for own in fields_of(flow):
        for f in columns_of(own, 3)[column - 1]:
            y = y + h * f(y)
    torch.testing.assert_close(alone(x), y, rtol=1e-12, atol=1e-12)
    assert alone.evaluations == 2 * 2 ** (column - 1)


def test_outputs_are_those_of_the_columns_at_the_last_join():
    flow, x = flow_of(Fractal(3), depth=2)
    outputs, before = flow.outputs(x), flow.part(0, 1)(x)
    wanted = expand(columns_of(fields_of(flow)[1], 3), before, 0.3, CELLS["euler"])
    for c, state in enumerate(wanted, 1):
        torch.testing.assert_close(outputs[f"column{c}"], state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.ensemble(x), (sum(wanted) + flow(x)) / 4)


def test_the_error_is_against_the_shallowest_column():
    flow, x = flow_of(Fractal(3), depth=1)
    (step,) = flow.steps(x)
    torch.testing.assert_close(step.error(), step.x1 - step.output("column1"))
    assert flow.record(x, error=measures.error)[1]["error"].shape == (1, 5)


def test_all_columns_follow_one_equation():
    """With one field for all cells a block is consistent, and its columns are as many integrators."""
    ends = []
    for depth in (20, 40):
        flow = odenets.Flow(lambda: Tanh(), solver=Fractal(3), depth=1, h=1.0)
        field = flow.blocks[0].fields[0]
        blocks = [odenets.Block([field] * 7 + [flow.blocks[0].fields[7]], 1 / depth) for _ in range(depth)]
        torch.nn.init.eye_(field.layer.weight)
        torch.nn.init.zeros_(field.layer.bias)
        x = torch.full((1, 3), 0.5, dtype=torch.float64)
        ends.append(odenets.Flow.of(blocks, solver=Fractal(3))(x)[0, 0].item())
    exact = torch.asinh(torch.sinh(torch.tensor(0.5, dtype=torch.float64)) * torch.e).item()
    gaps = [abs(end - exact) for end in ends]
    assert 1.8 < gaps[0] / gaps[1] < 2.2


def test_drop_path_keeps_a_way_through_every_join():
    flow, x = flow_of(Fractal(3, drop=0.9), depth=2)
    outputs = {tuple(flow(x)[0].tolist()) for _ in range(20)}
    assert len(outputs) > 1
    assert flow.eval()(x).equal(flow(x))
    assert all(torch.tensor(one).isfinite().all() for one in outputs)


def test_one_column_alone_is_taken_in_training():
    flow, x = flow_of(Fractal(2, single=0.999), depth=1)
    ends = {tuple(flow(x)[0].tolist()) for _ in range(30)}
    alone = {tuple(odenets.Flow.of([*flow.blocks], solver=flow.tableau.column(c))(x)[0].tolist()) for c in (1, 2)}
    assert ends == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop": 1.0}, r"drop must be a probability in \[0, 1\), for at 1 nothing is left, got 1.0"),
        ({"columns": 9}, "columns must be at most 8"),
        ({"cells": "conv"}, "cells must be 'euler' or 'plain'"),
        ({"columns": 2, "only": 3}, "only must be one of the columns 1 to 2, got 3"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Fractal(**settings)
