"""Weights of a file are those of the network that is recorded."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import odenets
from odenets.command import networks
from odenets.command.mistakes import Mistake
from odenets.command.weights import load_file
from odenets.depth import compress

OPTIONS = ["solver=bs23", "depth=2"]


@pytest.fixture
def resnet():
    torch.manual_seed(7)
    return torchvision.models.resnet18(num_classes=3)


def assert_same(network, expected):
    state = network.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())


def saved(kind, model, tmp_path):
    """A file of a model's weights, as people have them."""
    state = model.state_dict()
    if kind == "safetensors":
        save_file(state, tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"
    content = {"state dict": state, "checkpoint": {"state_dict": state, "epoch": 3}, "of fit": {"network": state},
               "of several processes": {f"module.{key}": value for key, value in state.items()}}  # fmt: skip
    torch.save(content[kind], tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "checkpoint", "of fit", "of several processes"])
def test_a_state_in_a_file_becomes_the_network_s(kind, resnet, tmp_path):
    file = saved(kind, resnet, tmp_path)
    model = networks.build("resnet18", str(file), ["num_classes=3"])
    assert_same(model.network, resnet)
    assert model.weights == f"weights of {file}"


def test_what_save_weights_wrote_is_a_network_of_ours_with_its_blocks(tmp_path):
    network = odenets.models.small_network(solver="bs23", depth=2)
    network(torch.rand(2, 1, 8, 8))
    network.flows[0].resize([0.25, 0.75, 1.0], network)
    odenets.save_weights(network, tmp_path / "net.safetensors")
    with pytest.warns(UserWarning, match=r"gets depth=3, h=\(0.25, 0.75, 1\)"):
        loaded = networks.build("small_network", str(tmp_path / "net.safetensors"), OPTIONS).network
    assert loaded.h == network.h
    assert_same(loaded, network)


def test_a_file_is_read_by_what_it_holds_whatever_its_name(resnet, tmp_path):
    network = odenets.models.small_network(solver="bs23", depth=2)
    network(torch.rand(2, 1, 8, 8))
    odenets.save_weights(network, tmp_path / "net.st")
    assert_same(networks.build("small_network", str(tmp_path / "net.st"), OPTIONS).network, network)
    torch.save(resnet.state_dict(), tmp_path / "net.safetensors")
    assert_same(networks.build("resnet18", str(tmp_path / "net.safetensors"), ["num_classes=3"]).network, resnet)


def test_what_save_weights_wrote_of_an_adapted_network_is_one(resnet, tmp_path):
    odenets.save_weights(odenets.adapt(resnet), tmp_path / "net.safetensors")
    model = networks.build("resnet18", str(tmp_path / "net.safetensors"), ["num_classes=3"])
    network = networks.recorder(model, None, torch.rand(2, 3, 32, 32))
    assert_same(network.model, resnet)


def test_a_compressed_network_is_made_of_the_whole_one(tmp_path):
    build = ["solver=euler", "depth=4"]
    network = networks.build("small_network", None, build).network
    small = compress(network, [torch.rand(60, 1, 8, 8)], remove=2, choices=["seam"]).model
    file = str(odenets.save_weights(small, tmp_path / "net.safetensors"))
    assert_same(networks.build("small_network", file, build).network, small)
    with pytest.raises(Mistake, match=r"does not fit small_network: .* must have the solver .* --option NAME=VALUE"):
        networks.build("small_network", file, ["solver=heun", "depth=4"])


def test_default_weights_are_those_that_torchvision_offers(monkeypatch):
    offered = torchvision.models.resnet18()
    load = lambda url, **_: offered.state_dict() if url.endswith("resnet18-f37072fd.pth") else None  # noqa: E731
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    for weights in (None, "DEFAULT", "IMAGENET1K_V1"):
        model = networks.build("resnet18", weights, [])
        assert_same(model.network, offered)
        assert model.weights == "weights IMAGENET1K_V1 of torchvision"


def test_weights_that_do_not_fit_say_what_does_not(run, resnet, images, tmp_path):
    file = saved("state dict", resnet, tmp_path)
    result = run("record", "resnet18", images, "--weights", file)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: --weights {file} does not fit resnet18: fc.weight is (3, 512) in the file and (1000, 512) in the "
        "network, fc.bias is (3,) in the file and (1000,) in the network. --option NAME=VALUE builds it as the saved "
        "one was\n"
    )
    result = run("record", "resnet34", images, "--weights", file, "-o", "num_classes=3")
    assert "the file lacks layer1.2.conv1.weight, layer1.2.bn1.weight and" in result.stderr


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights", Evil(), [1, 2], {"epoch": 3}],
    ids=["nothing", "text", "code", "numbers", "no tensors"],
)
def test_a_file_that_holds_no_weights_is_refused_and_nothing_of_it_runs(content, tmp_path, capsys):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(Mistake, match=r"--weights .* (holds no|must hold a) state dict"):
        load_file(nn.Linear(1, 1), file, "linear")
    assert capsys.readouterr().out == ""


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_text("no")
    with pytest.raises(Mistake, match="is no file of safetensors"):
        load_file(nn.Linear(1, 1), tmp_path / "a.safetensors", "linear")
