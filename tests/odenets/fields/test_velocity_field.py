import torch

from odenets import MLPField


def test_reset_draws_anew():
    field = MLPField(3)
    before = field.first.weight.clone()
    field.reset_parameters()
    assert not torch.equal(before, field.first.weight)
