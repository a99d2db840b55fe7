"""Networks of torchvision, timm, transformers and others: all their additions are found, and nothing changes."""

import importlib
from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch

from odenets import measures
from odenets.adapting import adapt
from tests.odenets.adapting.zoo import enliven, tensors_of

TABLES = ("torchvision_models", "timm_models", "hugging_face", "others")
QUICK = {
    "torchvision_models": ("mobilenet_v3_small", "alexnet", "densenet121"),
    "timm_models": ("regnetx_002", "rexnet_100", "xcit_nano_12_p16_224", "mobilevit_xxs", "repvgg_a0"),
    "hugging_face": ("BERT", "GPT-2"),
    "others": ("encoder, norm first", "U-Net", "DiT", "quantizable MobileNet V2"),
}
GRADIENTS = 8  # of how many parameters, where there are many


def cases():
    """Every network of every table whose library is there; all but a few are slow."""
    for table in TABLES:
        try:
            networks = importlib.import_module(f"tests.odenets.adapting.zoo.{table}").CASES
        except pytest.skip.Exception as missing:
            yield pytest.param(None, marks=pytest.mark.skip(reason=str(missing)), id=table)
            continue
        for name, case in networks.items():
            marks = () if name in QUICK[table] else (pytest.mark.slow,)
            yield pytest.param(case, marks=marks, id=f"{table}-{name}")


def test_every_classifier_of_torchvision_is_listed():
    tv = pytest.importorskip("torchvision.models")
    table = importlib.import_module("tests.odenets.adapting.zoo.torchvision_models")
    names = table.ADDING.keys() | table.CHAINS.keys() | set(table.CONCATENATING)
    assert names == set(tv.list_models(module=tv))
    assert [len(part) for part in (table.ADDING, table.CHAINS, table.CONCATENATING)] == [59, 9, 12]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(function, example, **options):
    if isinstance(example, Mapping):
        return function(**example, **options)
    return function(*example, **options) if isinstance(example, tuple) else function(example, **options)


def some_of(parameters):
    """All of them, or some evenly spread where there is much to differentiate."""
    if len(parameters) <= GRADIENTS or sum(p.numel() for p in parameters) < 3e7:
        return parameters
    return [parameters[round(i * (len(parameters) - 1) / (GRADIENTS - 1))] for i in range(GRADIENTS)]


def gradients(model, outputs):
    """Those of the outputs' sum of squares."""
    parameters = some_of([p for p in model.parameters() if p.requires_grad])
    return torch.autograd.grad(sum(output.square().sum() for output in outputs), parameters, allow_unused=True)


def in_training(model, function, example):
    """What a function gives that runs the model in training mode; statistics stay as they were."""
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    torch.manual_seed(1)
    outputs = tensors_of(call(function, example))
    for buffer, before in statistics:
        buffer.copy_(before)
    return outputs


@pytest.mark.filterwarnings("ignore:the branches of .* end in a batch norm")
@pytest.mark.parametrize("case", list(cases()))
def test_the_additions_of_a_network_are_found_and_recording_them_changes_nothing(case):
    model = enliven(case.build()).eval()
    if isinstance(case.depth, str):
        with pytest.raises(ValueError, match=case.depth):
            adapt(model, case.example, **case.options)
        return
    expected = tensors_of(call(model, case.example))
    if case.differentiable:
        expected_gradients = gradients(model, expected)
    expected_in_training = in_training(model, model, case.example)

    with pytest.warns(UserWarning, match=case.warning) if case.warning else nullcontext():
        adapted = adapt(model.eval(), case.example, **case.options)
    assert adapted.depth == len(adapted.names) == case.depth
    output, records = call(adapted.record, case.example, action=measures.action)
    outputs = tensors_of(output)
    assert len(records["action"]) == case.depth
    assert records["action"].isfinite().all()
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    if case.differentiable:
        torch.testing.assert_close(gradients(model, outputs), expected_gradients, rtol=0, atol=0)
    outputs = in_training(
        model, lambda *args, **inputs: adapted.record(*args, action=measures.action, **inputs)[0], case.example
    )
    torch.testing.assert_close(outputs, expected_in_training)
