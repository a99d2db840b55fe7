import pytest
import torch
from torch import nn
from torch.nn import functional

from odenets import Flow, MLPField
from odenets.analysis import count_macs


def test_convolutions_and_matrix_products_count_and_nothing_else():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    assert count_macs(model, torch.zeros(2, 3, 8, 8)) == 2 * (3 * 8 * 9 * 16 + 8 * 16 * 5)


def test_groups_divide_the_count():
    x = torch.zeros(1, 8, 4, 4)
    whole, depthwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count_macs(whole, x) == 8 * count_macs(depthwise, x)


def test_a_block_that_is_shared_counts_each_call():
    block = nn.Linear(4, 4)
    model = nn.Sequential(block, nn.ReLU(), block, nn.Linear(4, 2))
    x = torch.zeros(3, 4)
    assert count_macs(model, x, within=block) == 2 * 3 * 16
    assert count_macs(model, x) == 2 * 3 * 16 + 3 * 8


def test_a_module_within_another_counts_once():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    inner = [model[0], model[0][1]]
    assert count_macs(model, torch.zeros(1, 4), within=inner) == 32


class Attention(nn.Module):
    def forward(self, x):
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_attention_counts_as_its_two_products():
    assert count_macs(Attention(), torch.zeros(2, 3, 10, 8)) == 2 * 2 * 3 * 10 * 10 * 8


def test_a_layer_of_torchs_transformer_counts_without_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    projections, attention, mlp = 4 * 16 * 16, 2 * 5 * 16, 2 * 16 * 32
    assert count_macs(layer, torch.zeros(1, 5, 16)) == 5 * (projections + attention + mlp)
    assert torch.backends.mha.get_fastpath_enabled()


def test_evaluations_of_a_flow_count_each():
    x = torch.zeros(1, 4)
    once = count_macs(Flow(MLPField(4, 8), depth=1, solver="euler"), x)
    assert count_macs(Flow(MLPField(4, 8), depth=3, solver="rk4"), x) == 3 * 4 * once > 0


def test_inputs_by_keyword_reach_the_model():
    bilinear = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 3, 8)
    assert count_macs(bilinear, {"query": x, "key": x, "value": x}) == count_macs(bilinear, (x, x, x)) > 0


def test_a_count_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, torch.randn(8, 4), within=model[0])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_a_module_that_is_not_called_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        ValueError, match=r"within holds 1 of 2 modules that a pass of the model does not call, .* Tanh"
    ):
        count_macs(model, torch.zeros(1, 4), within=[model[0], nn.Tanh()])


def test_recurrent_layers_and_products_with_a_vector_count():
    assert count_macs(nn.LSTM(5, 7, num_layers=2), torch.zeros(3, 2, 5)) == 6 * (28 * (5 + 7) + 28 * (7 + 7))

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight @ x

    assert count_macs(Product(), torch.zeros(3)) == 12
