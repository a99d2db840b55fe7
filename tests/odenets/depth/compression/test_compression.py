"""Compression of trained networks: what is exact is found to be, networks stay as they are, bad input is refused."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import odenets
from odenets import models
from odenets.depth import compress, heal
from odenets.depth.compression.calibration import batches_of
from odenets.depth.compression.divergence import Outputs
from tests.odenets.depth.compression.networks import Half, Residual, images, linear_flow


def test_half_steps_of_a_linear_flow_compress_without_error():
    network, x = linear_flow(6), torch.randn(80, 5, dtype=torch.float64)
    for choice in ("seam", "fit"):
        small = compress(network, [x], remove=4, choices=[choice])
        assert small.divergence < 1e-12
        assert small.gone == 4
        torch.testing.assert_close(small.model(x), network(x), rtol=0, atol=1e-6)


def test_a_seam_is_the_known_map_between_two_states():
    network, x = linear_flow(4), torch.randn(100, 5, dtype=torch.float64)
    small = compress(network, [x], remove=4, choices=["seam"])
    (seam,) = [one for one in small.model[:-1] if isinstance(one, nn.Linear)]
    known = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) + network[0].linear.weight, 4)
    torch.testing.assert_close(seam.weight.data, known.detach(), rtol=0, atol=1e-6)
    assert [run.choice for run in small.runs] == ["seam 1x1"]


def test_time_is_conserved_where_blocks_of_a_flow_merge():
    torch.manual_seed(0)
    network = models.small_network(solver="bs23", depth=6, total_time=1.5)
    small = compress(network, [torch.rand(60, 1, 8, 8)], remove=3, choices=["merge"], refit=False)
    assert isinstance(small.model, odenets.Network)
    assert small.model.depth == 3
    assert sum(small.model.h) == pytest.approx(1.5)
    assert network.depth == 6


def test_a_constant_field_loses_nothing_when_its_steps_merge():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.velocity = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

        def forward(self, t: float, x: Tensor) -> Tensor:
            return self.velocity.expand_as(x)

    flow = odenets.Flow(odenets.Block([Constant()], 0.25).fields[0], solver="euler", depth=1, h=0.25)
    field = flow.blocks[0].fields[0]
    flow = odenets.Flow.of([odenets.Block([field], 0.25) for _ in range(4)], solver="euler")
    network = odenets.Network(nn.Linear(2, 3), flow, nn.Linear(3, 4))
    x = torch.randn(40, 2)
    small = compress(network, [x], remove=2, choices=["merge"])
    torch.testing.assert_close(small.model(x), network(x))


@pytest.mark.parametrize("relu", [True, False])
def test_a_fitted_block_is_nearer_than_one_that_is_removed(relu: bool):
    network, x = images(relu=relu), torch.rand(120, 1, 8, 8)
    removed = compress(network, [x], remove=2, choices=["remove"], refit=False, statistics=False)
    fitted = compress(network, [x], remove=2)
    assert fitted.divergence < removed.divergence
    assert fitted.gone == removed.gone == 2
    assert fitted.macs_kept <= 4 / 5 + 1e-9


def test_the_network_is_left_as_it_is():
    network, x = images(), torch.rand(60, 1, 8, 8)
    network[1].conv1.weight.requires_grad_(False)
    before, state = network(x), copy.deepcopy(network.state_dict())
    network.train()
    small = compress(network, [x], remove=1)
    assert network.training
    assert small.model.training
    network.eval()
    assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.model.modules())
    assert not small.model.get_submodule("1.conv1").weight.requires_grad


def test_a_compressed_model_of_torch_saves_loads_and_exports():
    network, x = images(), torch.rand(60, 1, 8, 8)
    small = compress(network, [x], remove=3, choices=["fit", "seam", "remove"]).model
    assert not any(type(module).__module__.startswith("odenets") for module in small.modules())
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(small)
    for parameter in twin.parameters():
        parameter.data.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), small(x))
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x[:7]), small(x[:7]))


@pytest.mark.parametrize("by", ["divergence", "error", "influence", "residue", "replaceme"])
def test_every_score_removes_as_many_blocks_as_are_asked_for(by):
    network, x = images(), torch.rand(60, 1, 8, 8)
    small = compress(network, [(x, torch.zeros(60))], remove=2, by=by)
    assert small.gone == 2
    assert small.model(x).shape == (60, 4)
    assert 0 <= small.divergence < 100
    assert "2 of 5 blocks gone" in repr(small)


def test_a_share_of_the_multiplications_is_kept():
    network, x = images(), torch.rand(60, 1, 8, 8)
    small = compress(network, [x], keep=0.55)
    assert small.macs_kept <= 0.55
    other = small.at(remove=1)
    assert other.gone == 1
    assert other.macs_kept > small.macs_kept
    curve = small.curve
    assert [row["gone"] for row in curve] == [*range(1, len(curve) + 1)]
    assert curve[0]["macs kept"] > curve[-1]["macs kept"]


def test_multiplications_are_those_of_the_blocks_by_hand():
    small = compress(images(4), [torch.rand(60, 1, 8, 8)], remove=1, choices=["remove"])
    assert {unit.macs for unit in small.units} == {2 * 6 * 6 * 9 * 64}
    assert small.macs_kept == pytest.approx(3 / 4)


def test_bad_input_is_refused():
    network, x = images(), torch.rand(20, 1, 8, 8)
    for arguments, message in (
        ((network, x), "must hold batches of inputs, got one tensor"),
        ((network, [x[:1]]), "at least two samples"),
        ((network, [x], {"remove": 6}), "remove must be at most 5"),
        ((network, [x], {"remove": 0}), "remove must be"),
        ((network, [x], {"keep": 7.0}), "keep must be a share"),
        ((network, [x], {"keep": 0.5, "remove": 2}), "give one of keep and remove"),
        ((network, [x], {"remove": 1, "by": "magnitude"}), "by must be one of"),
        ((network, [x], {"remove": 1, "choices": ["drop"]}), "choices must be some of"),
        ((network, [x], {"remove": 1, "kernels": (2,)}), "kernels must be odd"),
        ((network, [(x, x, x)], {"remove": 1}), "pairs"),
        ((nn.Sequential(nn.Linear(3, 3)), [torch.rand(4, 3)], {"remove": 1}), "residual"),
    ):
        model, data, *options = arguments
        with pytest.raises((TypeError, ValueError), match=message):
            compress(model, data, **(options[0] if options else {"remove": 1}))


def test_a_block_that_is_called_twice_cannot_go_once():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Half(torch.eye(4) * 1.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    with pytest.raises(ValueError, match="called 2 times"):
        compress(Shared(), [torch.randn(20, 4)], remove=1)


def test_blocks_that_change_the_dtype_cannot_go():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.linear(x.float())).double()

    network = nn.Sequential(Cast(), nn.Linear(4, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="dtype"):
        compress(network, [torch.randn(20, 4)], remove=1)


def test_blocks_that_write_into_their_input_are_fitted_to_what_they_read():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x += 0.3 * self.linear(x).relu()
            return x

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), InPlace(), InPlace(), InPlace(), nn.Linear(4, 3))
    x = torch.randn(60, 4)
    with torch.no_grad():
        small = compress(network, [x], remove=1)
        assert small.gone == 1
        assert small.divergence < 0.05


class Functional(nn.Module):
    """Branches that are added in the model's own forward pass."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 6)) for _ in range(depth)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def test_branches_that_are_added_outside_of_them_go_and_add_nothing():
    torch.manual_seed(0)
    network, x = Functional(4), torch.randn(60, 6)
    with torch.no_grad():
        network.branches[2][2].weight.mul_(1e-3)
        network.branches[2][2].bias.zero_()
    small = compress(network, [x], remove=1)
    assert [row["blocks"] for row in small.table] == ["branches.2"]
    assert small.divergence < 1e-5
    assert small.gone == 1


@pytest.mark.filterwarnings("ignore:save_pretrained")
def test_a_transformer_of_hugging_face_keeps_its_cache_in_order():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, 40, (24, 12))
    for choice in ("remove", "fit", "seam"):
        small = compress(network, [{"input_ids": tokens}], remove=2, choices=[choice])
        assert small.gone == 2
        layers = small.model.model.layers
        assert len(layers) == small.model.config.num_hidden_layers
        kept = [layer.self_attn.layer_idx for layer in layers if hasattr(layer, "self_attn")]
        assert kept == [*range(len(kept))]
        prompt = tokens[:2, :5]
        torch.manual_seed(0)
        cached = small.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = small.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)


def test_networks_of_torchvision_lose_blocks_of_every_stage_that_keep_the_shape():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5).eval()
    small = compress(network, [torch.rand(16, 3, 32, 32)], remove=3, choices=["remove", "seam"], kernels=(1,))
    assert small.gone == 3
    assert len(small.units) == 8
    assert {unit.name: unit.keeps for unit in small.units}["layer2.0"] is False


def test_healing_brings_the_outputs_nearer():
    network, x = images(), torch.rand(120, 1, 8, 8)
    small = compress(network, [x], remove=3, choices=["remove"], refit=False, statistics=False).model
    outputs = Outputs.of(network, [x])
    before = outputs.divergence(small)
    healed = heal(small, network, [(x[:60], 0), (x[60:], 0)], images=1200, lr=3e-3)
    assert healed is small
    assert outputs.divergence(small) < before / 2


def test_bad_input_of_healing_is_refused():
    network, x = images(), torch.rand(20, 1, 8, 8)
    small = compress(network, [x], remove=1).model
    for arguments, options, message in (
        ((network, network, [x]), {}, "must not be the teacher"),
        ((small, network, []), {}, "at least one batch"),
        ((small, network, [x]), {"images": 0}, "images"),
        ((small, network, [x]), {"lr": -1.0}, "lr and temperature"),
        ((small, "whole", [x]), {}, "teacher must be a torch module"),
        ((nn.Sequential(*network), network, [x]), {}, "shares parameters"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            heal(*arguments, **options)


@pytest.mark.slow
def test_a_compressed_model_runs_in_a_process_that_lacks_the_library(tmp_path):
    network, x = images(), torch.rand(60, 1, 8, 8)
    small = compress(network, [x], remove=3, choices=["fit", "seam", "remove"]).model
    torch.export.save(torch.export.export(small, (x,)), tmp_path / "small.pt2")
    torch.save({"x": x, "output": small(x).detach()}, tmp_path / "tensors.pt")
    program = """
import sys, torch
sys.modules["odenets"] = None
tensors = torch.load("tensors.pt")
assert torch.allclose(torch.export.load("small.pt2").module()(tensors["x"]), tensors["output"], atol=1e-6)
assert not [name for name in sys.modules if name.startswith("odenets.")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)


def test_an_adapted_model_is_compressed_as_the_model_that_it_is():
    network, x = images(), torch.rand(40, 1, 8, 8)
    small = compress(odenets.adapt(network, x[:4]), [x], remove=1)
    assert type(small.model) is type(network)


def test_a_neural_ode_has_no_blocks_that_could_go():
    ode = odenets.NeuralODE(odenets.MLPField(8))
    with pytest.raises(ValueError, match="no blocks that could go"):
        compress(odenets.Network(nn.Linear(2, 8), ode, nn.Linear(8, 2)), [torch.rand(40, 2)], remove=1)


def test_a_map_whose_positions_are_permuted_in_the_state_is_not_fitted():
    class Windows(nn.Module):
        """The hidden layer reads the tokens in another order."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.hidden(x.flip(1)).relu()).flip(1)

    torch.manual_seed(0)
    network = nn.Sequential(Windows(), Windows(), Windows(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(50, 6, 4)
    with pytest.raises(ValueError, match="nothing may take the place"):
        compress(network, [x], remove=1, choices=["fit"])
    assert compress(network, [x], remove=1).gone == 1


def test_a_layer_that_reads_attributes_of_its_blocks_keeps_those_that_it_reads():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Flatten(), nn.Linear(16 * 6, 3)).eval()
    small = compress(network, [torch.rand(30, 6, 16)], remove=2)
    assert small.gone == 2
    assert small.runs[0].start > 0


def test_maps_of_gpt2_which_keep_their_weights_transposed_are_fitted():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=5, n_head=2, bos_token_id=1, eos_token_id=2
    )
    network = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(3, 40, (60, 12))
    removed = compress(network, [tokens], remove=2, choices=["remove"], refit=False)
    fitted = compress(network, [tokens], remove=2, choices=["fit"])
    assert {run.choice for run in fitted.runs} == {"fit"}
    assert fitted.divergence < removed.divergence / 2
    assert fitted.model.config.use_cache


def test_a_compressed_model_of_hugging_face_is_saved_and_loaded_by_its_own_means(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, sliding_window=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    network = transformers.Gemma3ForCausalLM(config).eval()
    tokens = torch.randint(3, 40, (24, 12))
    small = compress(network, [{"input_ids": tokens}], remove=2, choices=["remove"]).model
    assert small.config.num_hidden_layers == len(small.config.layer_types) == 4
    assert network.config.num_hidden_layers == 6
    small.save_pretrained(tmp_path)
    again = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, small(tokens).logits)


def test_layers_whose_weights_are_computed_are_not_fitted():
    def block() -> nn.Module:
        return Wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))

    class Wrapped(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    torch.manual_seed(0)
    network = nn.Sequential(block(), block(), block(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="nothing may take the place"):
        compress(network, [torch.randn(40, 4)], remove=1, choices=["fit"])


def test_states_that_are_not_finite_are_refused():
    network = linear_flow(4)
    with torch.no_grad():
        network[1].linear.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite"):
        compress(network, [torch.randn(40, 5, dtype=torch.float64)], remove=1)


def test_a_network_with_a_forward_pass_of_its_own_is_refused():
    class Scaled(odenets.Network):
        def forward(self, x: Tensor, /, *args: object) -> Tensor:
            return super().forward(x / 10, *args)

    torch.manual_seed(0)
    network = Scaled(
        nn.Linear(5, 3), odenets.Flow(odenets.MLPField(3), solver="euler", depth=4), nn.Linear(3, 4)
    ).eval()
    x = 10 * torch.randn(60, 5)
    with pytest.raises(ValueError, match="a forward pass or hooks of its own"):
        compress(network, [x], remove=1)


def test_steps_of_other_lengths_keep_their_total_time():
    torch.manual_seed(0)
    flow = odenets.Flow(odenets.MLPField(3), solver="bs23", h=(0.1, 0.2, 0.7), depth=3)
    network = odenets.Network(nn.Linear(5, 3), flow, nn.Linear(3, 4))
    for number, sizes in ((1, {(0.3, 0.7), (0.1, 0.9)}), (2, {(1.0,)})):
        small = compress(network, [torch.randn(60, 5)], remove=number, choices=["merge"], refit=False).model
        assert isinstance(small, odenets.Network)
        assert tuple(round(h, 9) for h in small.h) in sizes


def test_modes_random_state_and_frozen_parameters_are_left():
    network, x = images(), torch.rand(60, 1, 8, 8)
    network.train().requires_grad_(False)
    network[2].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    small = compress(network, [x], remove=2, choices=["seam", "remove"]).model
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training
    assert not small[2].training
    assert small[1].training
    assert not any(p.requires_grad for p in small.parameters())


def test_a_fifth_of_the_samples_is_held_out_whatever_the_batches():
    for sizes in ([66, 66, 66, 2], [100, 100], [200], [1] * 40, [7, 1, 30]):
        batches = batches_of([torch.zeros(n, 2) for n in sizes], nn.Linear(2, 2))
        held = sum(n for n, out in zip(batches.samples, batches.held_out, strict=True) if out)
        assert abs(held - 0.2 * sum(sizes)) <= 1
        few = batches.first(20)
        assert sum(few.samples) <= 20
        assert {*few.held_out} == {True, False}


def test_other_points_are_checked_as_the_first_is():
    small = compress(images(), [torch.rand(40, 1, 8, 8)], remove=1, choices=["remove"])
    for options, message in (({}, "give one"), ({"remove": 1, "keep": 0.5}, "give one"), ({"remove": 0}, "remove must"),
                             ({"keep": 1.5}, "keep must")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            small.at(**options)


class Skips(nn.Module):
    """A state in the middle that is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(6, relu=False) for _ in range(4))
        self.stem, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = early = self.stem(x)
        for m, block in enumerate(self.blocks):
            x = block(x)
            early = x if m == 1 else early
        return self.head(torch.cat([x, early], 1).mean((2, 3)))


def test_candidates_are_judged_rightly_where_a_state_is_read_besides():
    torch.manual_seed(0)
    network, x = Skips(), torch.rand(60, 1, 8, 8)
    network(x)
    network.eval()
    with torch.no_grad():
        network.blocks[3].norm2.weight.zero_()
        network.blocks[3].norm2.bias.zero_()
    small = compress(network, [x], remove=1, choices=["remove"], refit=False, statistics=False)
    assert [row["blocks"] for row in small.table] == ["blocks.3"]
    assert small.runs[0].divergence < 1e-9


def test_outputs_that_are_no_logits_are_compared_as_values():
    class Shift(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.full((2,), by))
            self.gate = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.by + 0 * self.gate(x))

    network, x = nn.Sequential(nn.Linear(5, 2), Shift(50.0), Shift(0.001)), torch.randn(40, 5)
    options = {"remove": 1, "choices": ["remove"], "refit": False}
    small = compress(network, [x], outputs="values", **options)
    assert [row["blocks"] for row in small.table] == ["2"]
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        student.weight.copy_(teacher.weight)
        student.bias.copy_(teacher.bias + 1)
    heal(student, teacher, [torch.randn(50, 3)], images=5000, lr=0.1, outputs="values")
    torch.testing.assert_close(student.bias, teacher.bias, rtol=0, atol=1e-2)


def test_a_network_in_half_precision_is_fitted_and_stays_in_it():
    network, x = images().bfloat16(), torch.rand(60, 1, 8, 8)
    small = compress(network, [x], remove=2, choices=["fit"])
    assert {run.choice for run in small.runs} == {"fit"}
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert small.model(x.bfloat16()).dtype == torch.bfloat16
    assert small.divergence < 1e-3


def test_maps_that_are_scaled_by_what_comes_beside_the_state_are_not_fitted():
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Scale() for _ in range(3))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, t)
            return self.head(x)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + t[:, None] * self.last(self.hidden(x).tanh())

    torch.manual_seed(0)
    network = Times()
    batches = [((torch.randn(20, 4), torch.full((20,), 0.1 + b)), torch.zeros(20)) for b in range(4)]
    small = compress(network, batches, remove=1)
    assert not [run for run in small.runs if run.choice == "fit"]
    plain = compress(network, batches, remove=1, refit=False)
    assert small.divergence <= plain.divergence * 1.001


def test_statistics_that_lag_behind_their_network_are_kept_where_new_ones_harm():
    torch.manual_seed(0)
    blocks = [Residual(6, relu=True) for _ in range(4)]
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    network(torch.rand(64, 3, 8, 8))  # one pass: a tenth of the way
    x = torch.rand(60, 3, 8, 8)
    wanted = {"remove": 1, "choices": ["remove"], "refit": False}
    kept = compress(network.eval(), [x], statistics=False, **wanted).divergence
    assert compress(network, [x], **wanted).divergence == kept
    assert compress(network, [x], by="influence", statistics=True, remove=1).divergence > 2 * kept


def test_what_blocks_share_stays_shared():
    torch.manual_seed(0)
    network = nn.Sequential(*(Residual(6, relu=False) for _ in range(4)), nn.Flatten(), nn.Linear(6 * 64, 3)).eval()
    for block in network[1:4]:
        block.conv1 = network[0].conv1
    small = compress(network, [torch.rand(60, 6, 8, 8)], remove=1, choices=["fit"]).model
    assert len({id(block.conv1) for block in small if isinstance(block, Residual)}) == 1
    assert all(block.conv1 is not network[0].conv1 for block in small if isinstance(block, Residual))


def test_classes_that_are_masked_cost_nothing():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = images()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).masked_fill(torch.tensor([False, False, True, False]), -torch.inf)

    small = compress(Masked().eval(), [torch.rand(60, 1, 8, 8)], remove=2)
    assert 0 < small.divergence < 0.1


def test_the_curve_of_replaceme_is_its_own():
    network, x = images(), torch.rand(60, 1, 8, 8)
    ours, theirs = (compress(network, [x], remove=1, by=by) for by in ("influence", "replaceme"))
    assert len(theirs.curve) >= 3
    assert all(a["divergence"] != b["divergence"] for a, b in zip(ours.curve, theirs.curve, strict=False))


def test_bad_calibration_is_refused_by_its_name():
    network, x = images(), torch.rand(20, 1, 8, 8)
    with pytest.raises(TypeError, match="calibration must hold batches"):
        compress(network, 5, remove=1)
    assert compress(network, [x, x[:0]], remove=1, choices=["remove"]).gone == 1
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside of autocast"):
        compress(network, [x], remove=1)
    flow = odenets.Flow(odenets.MLPField(3), solver="euler", depth=3)
    conditioned = odenets.Network(nn.Linear(5, 3), flow, nn.Linear(3, 4))
    with pytest.raises(ValueError, match="states alone"):
        compress(conditioned, [((torch.randn(20, 5), torch.randn(20, 2)), torch.zeros(20))], remove=1)


def test_healing_leaves_no_gradients_and_works_where_they_are_off():
    network, x = images(), torch.rand(40, 1, 8, 8)
    small = compress(network, [x], remove=2).model
    with torch.no_grad():
        heal(small, network, [x[:0], x], images=400)
    assert all(p.grad is None for p in small.parameters())


class Decoder(nn.Module):
    """A second line whose blocks read the end of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Tokens() for _ in range(3))
        self.second = nn.ModuleList(Tokens() for _ in range(3))
        self.start, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory = x
        for block in self.first:
            memory = block(memory, x)
        y = self.start(x)
        for block in self.second:
            y = block(y, memory)
        return self.head(y.mean(1))


class Tokens(nn.Module):
    """A block that reads something besides its state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.last(self.hidden(torch.cat([x, other], -1)).tanh())


def test_a_second_line_is_refitted_with_what_it_reads_of_the_compressed_first():
    torch.manual_seed(0)
    network, x = Decoder(), torch.randn(60, 5, 4)
    small = compress(network, [x], remove=2, choices=["fit", "remove"])
    plain = compress(network, [x], remove=2, choices=["fit", "remove"], refit=False)
    assert small.divergence < plain.divergence


class Twice(nn.Module):
    """Blocks that the forward pass reaches by a second name, or from a plain list."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(6, relu=False) for _ in range(4))
        stem, head = nn.Conv2d(1, 6, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 3))
        self.all = nn.Sequential(stem, nn.Identity() if plain else nn.Sequential(*self.blocks), head)
        self.order = [*self.blocks] if plain else []

    def forward(self, x: Tensor) -> Tensor:
        x = self.all[1](self.all[0](x))
        for block in self.order:
            x = block(x)
        return self.all[2](x)


def test_blocks_that_have_two_names_go_from_both():
    torch.manual_seed(0)
    network, x = Twice(plain=False).eval(), torch.rand(40, 1, 8, 8)
    small = compress(network, [x], remove=3, choices=["remove"], refit=False, statistics=False)
    assert small.divergence > 0
    assert not torch.equal(small.model(x), network(x))


def test_blocks_that_are_run_from_a_plain_list_cannot_go():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="another way than its name"):
        compress(Twice(plain=True).eval(), [torch.rand(40, 1, 8, 8)], remove=2, choices=["remove"])


def test_a_network_with_batch_norms_of_stages_is_compressed_after_training():
    torch.manual_seed(0)
    field = odenets.ConvField(4, norm="batch")
    flow = odenets.Flow(field, solver="bs23", depth=4)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 3))
    network = odenets.Network(nn.Conv2d(1, 4, 1), flow, head)
    x = torch.rand(40, 1, 6, 6)
    network(x)
    assert compress(network, [x], remove=1).gone == 1


def test_a_model_that_is_compressed_in_inference_mode_can_be_healed():
    network, x = images(), torch.rand(40, 1, 8, 8)
    with torch.inference_mode():
        small = compress(network, [x], remove=2).model
    heal(small, network, [x], images=400)


def test_what_a_candidate_costs_is_told_of_samples_to_which_it_is_not_fitted():
    torch.manual_seed(0)
    network = nn.Sequential(*(odenets.Flow(odenets.MLPField(40), solver="euler", depth=1) for _ in range(4))).eval()
    small = compress(network, [torch.randn(70, 40)], remove=1, choices=["seam"], refit=False)
    assert small.table[0]["divergence"] == pytest.approx(small.divergence, rel=1e-6)


def test_the_samples_that_are_held_out_are_spread_over_a_batch():
    batches = batches_of([torch.arange(100.0)[:, None]], nn.Linear(1, 1))
    (held,) = [one for one, out in zip(batches.inputs, batches.held_out, strict=True) if out]
    assert held.flatten().tolist() == [5.0 * k + 2 for k in range(20)]


def test_the_divergence_of_values_is_relative_with_one_sample_in_a_batch_too():
    network = nn.Linear(3, 2)
    x = [torch.randn(1, 3) for _ in range(30)]
    outputs = Outputs.of(network, x, "values")
    assert 0.5 < outputs.divergence(nn.Sequential(network, nn.Flatten(), _Zeros())) < 50


class _Zeros(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_healing_that_does_not_help_is_taken_back_and_says_so():
    network, x = images(), torch.rand(40, 1, 8, 8)
    small = compress(network, [x], remove=1).model
    before = copy.deepcopy(small.state_dict())
    with pytest.warns(UserWarning, match="healing has not helped"):
        heal(small, network, [x], images=80, lr=1.0)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("choices", "longest", "removable"), [(["remove"], 4, (1, 2, 3, 4, 5)), (["merge"], 2, (1, 2)), (["fit"], 3, None)]
)
def test_there_is_a_network_for_every_number_of_blocks_that_may_go(choices, longest, removable):
    small = compress(images(), [torch.rand(60, 1, 8, 8)], remove=2, choices=choices, longest=longest, refit=False)
    assert removable is None or small.removable == removable
    assert [row["gone"] for row in small.curve] == [*small.removable]
    with pytest.raises(ValueError, match="remove must be at most"):
        small.at(remove=max(small.removable) + 1)


def test_more_blocks_than_there_are_is_told_before_the_search(monkeypatch):
    from odenets.depth.compression import selection

    monkeypatch.setattr(selection.Search, "_candidates", lambda self: pytest.fail("searched"))
    with pytest.raises(ValueError, match="remove must be at most 4, all blocks there are, got 5"):
        compress(models.small_network(solver="euler", depth=4), [torch.rand(60, 1, 8, 8)], remove=5)


def test_the_share_that_an_error_offers_is_taken():
    network, x = models.small_network(solver="euler", depth=7), torch.rand(60, 1, 8, 8)
    with pytest.raises(ValueError, match="keep must be at least") as raised:
        compress(network, [x], keep=1e-9, choices=["merge"], longest=2, refit=False)
    offered = float(str(raised.value).partition("at least ")[2].partition(" ")[0])
    assert compress(network, [x], keep=offered, choices=["merge"], longest=2, refit=False).macs_kept <= offered
