import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from odenets import Flow, MLPField, Network, NeuralODE, adapt, load_weights, models, save_weights
from odenets.checkpoints import fingerprint
from solvers import PI, Reversible, Tolerance, get_tableau
from tests.odenets.networks import Velocity

CAPTURED = {"check": True, "capture_output": True, "text": True}


def network(depth=2, **options):
    return Network(nn.Identity(), Flow(lambda: MLPField(3), depth=depth, **options), nn.Linear(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_lazy_flow_comes_back_in_its_precision_whatever_its_depth(tmp_path, dtype):
    one, other = (Network(nn.Flatten(), Flow(solver="bs23", depth=depth), nn.Identity()) for depth in (2, 1))
    x = torch.randn(4, 5, dtype=dtype)
    expected = one(x)
    path = save_weights(one, tmp_path / "deep" / "net.safetensors")
    with pytest.warns(UserWarning, match=r"depth=1, h=1, and gets depth=2, h=0.5, as saved") as seen:
        assert torch.equal(load_weights(other, path)(x), expected)
    assert [warning.filename for warning in seen] == [__file__]
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert [*path.parent.iterdir()] == [path]


def test_states_that_are_no_tensors_are_named(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    with pytest.raises(TypeError, match=r"0\._extra_state must be a tensor to be saved or hashed, got dict"):
        save_weights(nn.Sequential(Odd(2, 2)), tmp_path / "net.safetensors")
    with pytest.raises(TypeError, match=r"0\._extra_state must be a tensor"):
        fingerprint(nn.Sequential(Odd(2, 2)))


def test_statistics_of_stages_come_back_and_missing_ones_are_known(tmp_path):
    nets = [models.resnet9(features=4, size=8, depth=2, solver="bs23") for _ in range(2)]
    x = torch.rand(8, 1, 8, 8)
    nets[0].train()(x)
    save_weights(nets[0], tmp_path / "net.safetensors")
    load_weights(nets[1].eval(), tmp_path / "net.safetensors")
    assert torch.equal(nets[1](x), nets[0].eval()(x))
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        nets[1].ensemble(x)


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
    with pytest.warns(UserWarning, match="gets depth=2"), pytest.raises(ValueError, match="keeps its depth 3, got 2"):
        load_weights(network(3, shared=True), tmp_path / "net.safetensors")


def test_weights_of_another_solver_are_refused(tmp_path):
    path = save_weights(network(solver="bs23"), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"the solver that it was saved with, bs23, got euler"):
        load_weights(network(solver="euler"), path)
    with pytest.raises(ValueError, match=r"the solver that it was saved with, bs23, got bs23 with other coeff"):
        load_weights(network(solver=replace(get_tableau("bs23").forwarding("order2"), name="bs23")), path)
    with pytest.raises(ValueError, match=r"the stage_fields that it was saved with, 'tied', got 'chained'"):
        load_weights(network(solver="bs23", stage_fields="chained"), path)


def test_weights_of_a_neural_ode_that_is_solved_otherwise_are_told(tmp_path):
    def node(**settings):
        return NeuralODE(MLPField(2), **{"solver": "bs23", "t1": 1.0} | settings)

    path = save_weights(node(), tmp_path / "node.safetensors")
    load_weights(node(tolerance=Tolerance()), path)  # the default
    with pytest.raises(ValueError, match=r"the neural ODE must have the t1 that it was saved with, 1\.0, got 2\.0"):
        load_weights(node(t1=2.0), path)
    for settings, said in (
        ({"solver": "dopri5"}, r"has the solver dopri5 .*, saved with bs23 .*: outputs are not those"),
        ({"tolerance": Tolerance(1e-6, 1e-6)}, r"has the tolerance Tolerance\(.*1e-06.*, saved with Tolerance"),
        ({"steps": 3}, r"has steps 3, saved with None"),
        ({"gradient": Reversible(0.5)}, r"has gradient='reversible' with the coupling 0\.5, saved with None"),
    ):
        with pytest.warns(UserWarning, match=said) as seen:
            load_weights(node(**settings), path)
        assert [one.filename for one in seen] == [__file__]


def test_weights_with_a_byte_changed_are_refused(tmp_path):
    path = save_weights(network(depth=1), tmp_path / "net.safetensors")
    whole, expected = path.read_bytes(), fingerprint(load_weights(network(depth=1), path))
    for i in [*range(8, len(whole), 7)]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        net = network(depth=1)
        try:
            load_weights(net, path)
        except ValueError:
            continue
        assert fingerprint(net) == expected  # of a byte that says nothing
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"net.safetensors is damaged, its checksum is another: delete it, and save"):
        load_weights(network(depth=1), path)


def test_weights_of_an_earlier_version_have_no_checksum(tmp_path):
    one, other = network(), network()
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    about = {"1": {"h": [0.5, 0.5], "input_shape": None, "dtype": "float32"}}
    save_file(state, tmp_path / "net.safetensors", {"structure": json.dumps({"_flows.0": about["1"]})})
    assert fingerprint(load_weights(other, tmp_path / "net.safetensors")) == fingerprint(one)


def test_the_fingerprint_tells_what_a_network_computes_with():
    one = models.small_network(solver="euler", h=1.0, depth=2, normalize=models.Normalize([0.1], [0.3]))
    twin = copy.deepcopy(one).eval()
    assert fingerprint(one) == fingerprint(twin)
    twin.encoder[0] = models.Normalize([0.2], [0.3])
    assert fingerprint(one) != fingerprint(twin)
    twin = copy.deepcopy(one)
    twin.flows[0].resize([1.0, 0.5])
    assert fingerprint(one) != fingerprint(twin)
    with pytest.raises(ValueError, match=r"call network\(x\) once before it is hashed"):
        fingerprint(nn.LazyLinear(2))


@pytest.mark.filterwarnings("ignore:the branches of .* end in a batch norm")
def test_the_fingerprint_tells_what_no_weight_does():
    """A readout, a step size in its last digits, the blocks that are recorded."""
    torch.manual_seed(0)
    network = models.small_network(solver="bs23", depth=2)
    other = copy.deepcopy(network)
    other.readout = "ensemble"
    assert fingerprint(network) != fingerprint(other)
    close = copy.deepcopy(network)
    close.flows[0].resize([0.5, 0.5 + 1e-8])
    assert fingerprint(network) != fingerprint(close)
    model = resnet18(num_classes=4)
    adapted = [adapt(model), adapt(model, residue="branch"), adapt(model, blocks=["layer1.0", "layer1.1"])]
    assert len({fingerprint(network) for network in adapted}) == 3


def scaled_norm(scale):
    return lambda error: scale * error.norm()


ODES = {
    "default": {},
    "tolerance": {"tolerance": Tolerance(1e-6)},
    "tolerance per feature": {"tolerance": Tolerance(atol=torch.tensor([1e-6, 1e-3]))},
    "norm": {"tolerance": Tolerance(norm=scaled_norm(1.0))},
    "another norm": {"tolerance": Tolerance(norm=scaled_norm(2.0))},
    "norm of torch": {"tolerance": Tolerance(norm=torch.linalg.vector_norm)},
    "norm of a tensor": {"tolerance": Tolerance(norm=torch.Tensor.norm)},
    "controller": {"controller": PI()},
    "solver": {"solver": "bs23"},
    "steps": {"steps": 2},
    "end": {"t1": 1.0 + 1e-15},
    "ends": {"t1": torch.tensor([1.0, 2.0]), "control": "sample"},
    "other ends": {"t1": torch.tensor([1.0, 3.0]), "control": "sample"},
    "event": {"event": lambda t, x: x[0, 0] - 5},
    "another event": {"event": lambda t, x: x[0, 0] - 0.1},
    "field": {"field": lambda t, x: x.sin()},
    "another field": {"field": lambda t, x: x.cos()},
    "method": {"field": Velocity(lambda m, t, x: -x).forward},
}


def odes():
    torch.manual_seed(0)
    return {name: NeuralODE(**({"field": MLPField(2, 3)} | settings)) for name, settings in ODES.items()}


def test_the_fingerprint_tells_all_settings_of_a_neural_ode():
    prints = {name: fingerprint(ode) for name, ode in odes().items()}
    assert len({*prints.values()}) == len(ODES)
    assert prints["norm"] == fingerprint(copy.deepcopy(odes()["norm"]))
    assert prints["norm"] == fingerprint(NeuralODE(odes()["norm"].field, tolerance=Tolerance(norm=scaled_norm(1.0))))
    with pytest.raises(TypeError, match=r"tolerance\.norm\.scale must be a number, .*a fingerprint, got Generator"):
        fingerprint(NeuralODE(MLPField(2), tolerance=Tolerance(norm=scaled_norm(torch.Generator()))))


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process():
    code = "from tests.odenets.test_checkpoints import *; print(*map(fingerprint, odes().values()))"
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, **CAPTURED).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len({*runs[0].split()}) == len(ODES)


@pytest.mark.parametrize("settings", [{}, {"blocks": ["layer1.0"]}])
def test_a_pass_does_not_change_the_fingerprint_of_an_adapted_network(settings):
    network = adapt(resnet18(num_classes=4).eval(), **settings)
    before = fingerprint(network)
    network(torch.rand(1, 3, 32, 32))
    assert fingerprint(network) == before


def test_folders_in_the_place_of_files(tmp_path):
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"path must name a file, such as .*weights.safetensors, got a folder"):
        save_weights(layer, tmp_path)
    with pytest.raises(ValueError, match=r"is a folder, .*: in it is none"):
        load_weights(layer, tmp_path)
    save_weights(layer, tmp_path / "layer.safetensors")
    with pytest.raises(ValueError, match=r"in it are layer.safetensors"):
        load_weights(layer, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"from_pretrained loads what save_pretrained wrote"):
        load_weights(layer, tmp_path)
