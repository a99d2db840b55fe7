"""One line makes a network of any scheme over any field."""

import itertools

import pytest
import torch

import odenets
from odenets import measures, models
from odenets.models.listing import entries
from odenets.schemes import LinearMultistep

IMAGES = torch.rand(2, 3, 32, 32)


@pytest.mark.parametrize("name", odenets.schemes.names())
def test_a_name_alone_classifies_images(name):
    network = models.network(name, channels=(4, 8), blocks=2)
    logits, records = network.record(IMAGES, action=measures.action)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert records["action"].shape == (4, 2)
    logits.square().mean().backward()


@pytest.mark.parametrize("field", odenets.fields.names())
def test_every_field_goes_with_a_scheme(field):
    network = models.network("lm", field, channels=(8,), blocks=2)
    assert network(IMAGES[:, :, :16, :16]).shape == (2, 10)


def test_fields_come_in_turns():
    network = models.network("lie_trotter", ["conv", "bottleneck"], channels=(8,), blocks=2, norm="group")
    kinds = [[type(field).__name__ for field in block.fields] for block in network.flows[0].blocks]
    assert kinds == [["ConvField", "BottleneckField"]] * 2


def test_the_default_is_a_preactivation_resnet():
    network = models.network(channels=(16, 32), blocks=2, norm="batch")
    euler = models.resnet110(channels=(16, 32), blocks=2)
    own, other = ({name: p.shape for name, p in one.flows[1].named_parameters()} for one in (network, euler))
    assert own == other
    assert network.flows[0].h == (1.0, 1.0)


def test_what_a_flow_takes_goes_to_every_flow():
    network = models.network(LinearMultistep(0.1), channels=(4, 4), blocks=2, h=0.25, shared=True)
    assert [flow.h for flow in network.flows] == [(0.25, 0.25)] * 2
    assert all(flow.shared for flow in network.flows)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "lmm"}, ValueError, "unknown solver 'lmm'"),
        ({"field": "convs"}, ValueError, "name must be one of"),
        ({"channels": ()}, ValueError, "channels must hold"),
        ({"channels": (4, 0)}, ValueError, "channels must be at least 1"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1"),
        ({"depth": 3}, TypeError, "blocks, of each flow"),
        ({"solver": "lm"}, TypeError, "takes no 'solver': that is scheme"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        models.network(**arguments)


def test_the_list_has_every_network_with_what_it_costs(capsys):
    models.list()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["network", "source", "parameters", "steps", "evaluations"]
    rows = entries()
    assert len(lines) == len(rows) + 1
    calls = {row.call.partition("(")[0] for row in rows}
    functions = {name for name in models.__all__ if name not in ("Normalize", "list")}
    assert calls == functions
    lm = next(row for row in rows if row.call == "network('lm')")
    own = models.network("lm")
    assert (lm.parameters, lm.depth) == (sum(p.numel() for p in own.parameters()), own.depth)


def test_every_line_of_the_list_is_a_call():
    for row in itertools.islice(entries(), 9, None):
        assert eval(row.call, vars(models)).depth == row.depth
