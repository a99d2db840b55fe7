import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from odenets import Flow, MLPField, Network, load_weights, save_weights


def network(depth=2, **options):
    return Network(nn.Identity(), Flow(lambda: MLPField(3), depth=depth, **options), nn.Linear(3, 2))


def test_a_lazy_flow_comes_back(tmp_path):
    flow = Flow(solver="bs23", depth=2)
    x = torch.randn(4, 5)
    expected = flow(x)
    save_weights(flow, tmp_path / "deep" / "flow.safetensors")
    assert torch.equal(load_weights(Flow(solver="bs23"), tmp_path / "deep" / "flow.safetensors")(x), expected)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["flow.safetensors"]


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"call network\(x\) once before saving"):
        save_weights(Flow(), tmp_path / "flow.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(network(), tmp_path / "flow.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"not written by odenets\.save_weights"):
        load_weights(network(), tmp_path / "other.safetensors")
    save_weights(network(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="network has flows"):
        load_weights(nn.Linear(3, 2), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="keeps its depth 3, got 2"):
        load_weights(network(3, shared=True), tmp_path / "net.safetensors")
