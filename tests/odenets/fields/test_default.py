import pytest
import torch

from odenets.fields import field_for


@pytest.mark.parametrize("shape", [(4, 7), (4, 6, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_field_fits_the_state(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    v = field_for(x)(0.0, x)
    assert (v.shape, v.dtype) == (x.shape, dtype)


def test_states_without_a_default_field_are_named():
    with pytest.raises(ValueError, match=r"no default field for x of shape \(2, 3, 4\)"):
        field_for(torch.randn(2, 3, 4))
