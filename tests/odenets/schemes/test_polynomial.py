"""PolyNet's blocks are the polynomials of their paper."""

import pytest
import torch

import odenets
from odenets.schemes import Polynomial
from tests.odenets.schemes.fields import assert_same, fields_of, flow_of


@pytest.mark.parametrize("form", ["poly2", "mpoly2", "two_way"])
def test_blocks_are_the_polynomials(form):
    flow, x = flow_of(form)
    y, h = x, 0.3
    for own in fields_of(flow):
        f, g = own[0], own[-1]
        y = y + h * f(y) + (h * g(y) if form == "two_way" else h * h * g(f(y)))
    assert_same(flow, x, y)


def test_poly2_ties_its_field_and_agrees_with_implicit_euler_to_third_order():
    matrix = torch.randn(3, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    gaps = []
    for h in (0.02, 0.01):
        flow = odenets.Flow(_Linear(matrix), solver=Polynomial("poly2"), h=h)
        assert len(flow.blocks[0].fields) == 1
        implicit = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - h * matrix, x.T).T
        gaps.append((flow(x) - implicit).norm().item())
    assert 7.0 < gaps[0] / gaps[1] < 9.0


class _Linear(torch.nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, t, x):
        return x @ self.matrix.T


def test_batch_norms_have_statistics_for_both_evaluations():
    flow = odenets.Flow(odenets.ConvField(4, norm="batch"), solver="poly2", depth=2)
    assert {m.stages for m in flow.modules() if isinstance(m, odenets.normalization.StageBatchNorm)} == {2}
    flow(torch.randn(8, 4, 6, 6))
    flow.eval()
    assert flow(torch.randn(8, 4, 6, 6)).isfinite().all()


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be one of poly2, mpoly2, two_way, got 'poly3'"):
        Polynomial("poly3")
