"""Inputs of a network by position and by keyword."""

import pytest
import torch

from odenets import Flow, measures, models
from odenets.inputs import arguments, call, plain, rows, samples_in, tensors_in
from odenets.modes import inputs_for
from odenets.outputs import logits_in
from odenets.recording import Recording, record
from tests.odenets.keywords import Encoding, reader, sentences

ACTION = {"action": measures.action}


@pytest.mark.parametrize("kind", [dict, Encoding])
def test_a_mapping_is_recorded_by_keyword(kind):
    network, (inputs, _) = reader(), sentences()
    output, records = record(network, kind(inputs), ACTION)
    _, expected = network.record(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **ACTION)
    assert output["logits"].shape == (8, 3)
    assert torch.equal(records["action"], expected["action"])
    _, whole = network.record(input_ids=inputs["input_ids"], **ACTION)
    assert not torch.equal(records["action"], whole["action"])  # the mask has come through


def test_a_wrapped_recording_takes_keywords():
    network, (inputs, _) = reader(), sentences()
    wrapped = torch.nn.ModuleDict({"module": Recording(network, ACTION)})
    wrapped.forward = wrapped["module"].forward
    _, records = record(wrapped, inputs, ACTION)
    assert torch.equal(records["action"], network.record(**inputs, **ACTION)[1]["action"])
    with pytest.raises(ValueError, match=r"of an input or of a measure, got \['action'\] for both"):
        record(wrapped, {**inputs, "action": torch.zeros(8)}, {})


def test_a_compiled_recording_takes_keywords():
    network, (inputs, _) = reader(), sentences()
    compiled = torch.compile(Recording(network, ACTION), backend="eager")
    _, records = record(compiled, inputs, ACTION)
    torch.testing.assert_close(records["action"], network.record(**inputs, **ACTION)[1]["action"])


def test_a_name_of_an_input_and_of_a_measure_is_refused():
    inputs = {**sentences()[0], "scale": torch.ones(8)}
    with pytest.raises(ValueError, match=r"of an input or of a measure, got \['scale'\] for both: rename the measure"):
        record(reader(), inputs, {"scale": measures.action})


def test_measures_may_have_the_names_of_the_arguments_of_a_call():
    assert set(
        record(Flow(depth=1), torch.rand(3, 2), {"inputs": measures.action, "function": measures.residue})[1]
    ) == {
        "inputs",
        "function",
    }


def test_a_network_that_takes_its_inputs_by_position_refuses_a_mapping():
    message = r"inputs must come by position, x or \(x, \*args\), to a network that takes x so, got a dict with \['x'\]"
    for network in (models.points_network(depth=1), Flow(depth=1), Recording(Flow(depth=1), {})):
        with pytest.raises(TypeError, match=message):
            record(network, {"x": torch.rand(3, 2)}, {})
    with pytest.raises(TypeError, match=message):
        call(models.points_network(depth=1), {"x": torch.rand(3, 2)})


def test_an_input_that_a_network_does_not_take_is_named_by_python():
    with pytest.raises(TypeError, match="measure 'token_type_ids' must be a function"):
        record(reader(), {**sentences()[0], "token_type_ids": torch.zeros(8, 5)}, {})


def test_where_the_order_counts_a_mapping_is_refused():
    with pytest.raises(
        TypeError, match=r"must come by position, .* where their order counts, got a Encoding with \['inp"
    ):
        arguments(sentences()[0])


@pytest.mark.parametrize(
    ("inputs", "samples"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(3, 2), torch.zeros(5)), 3),
        ([torch.zeros(3, 2)], 3),
        ({"input_ids": torch.zeros(4, 7), "position_ids": torch.zeros(1, 7)}, 4),
        ({"use_cache": False, "past": None, "scale": torch.ones(()), "input_ids": torch.zeros(4, 7)}, 4),
        (Encoding(input_ids=torch.zeros(4, 7)), 4),
    ],
)
def test_samples_are_those_of_the_first_tensor(inputs, samples):
    assert samples_in(inputs) == samples


@pytest.mark.parametrize("inputs", [{}, {"use_cache": True}, {"scale": torch.ones(())}, Encoding(text=["a", "b"])])
def test_a_mapping_without_samples_is_named(inputs):
    with pytest.raises(TypeError, match=r"the inputs of a batch must be tensors \(B, ...\), got (dict|Encoding) with"):
        samples_in(inputs)


def test_rows_are_of_what_has_one_a_sample():
    inputs = plain(Encoding(ids=torch.arange(6).view(3, 2), positions=torch.zeros(1, 2), use_cache=False))
    part = rows(inputs, slice(1, 3), 3)
    assert part["ids"].tolist() == [[2, 3], [4, 5]]
    assert part["positions"].shape == (1, 2)
    assert part["use_cache"] is False
    assert len(tensors_in(inputs)) == 2


def test_floating_inputs_take_the_precision_of_a_network_and_whole_numbers_keep_theirs():
    inputs, _ = sentences()
    moved = inputs_for(reader().double(), Encoding(**inputs, scale=torch.ones(8), deep=True))
    assert (moved["input_ids"].dtype, moved["scale"].dtype, moved["deep"]) == (torch.int64, torch.float64, True)
    assert [x.dtype for x in inputs_for(reader().double(), (torch.ones(2), torch.arange(2)))] == [
        torch.float64,
        torch.int64,
    ]


class Several:
    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_logits_are_taken_by_their_name_and_what_has_no_names_is_left():
    logits = torch.rand(3, 4)
    for output in (logits, {"logits": logits}, Encoding(loss=1, logits=logits), Several(logits=logits, loss=1)):
        assert logits_in(output) is logits
    for output in ((logits, 1), {"scores": logits}, Several(logits=None), None, [logits]):
        assert logits_in(output) is output
