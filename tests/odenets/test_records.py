"""What records are beside their numbers: the names of the blocks, and the tables that are made of them."""

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn

from odenets import Flow, MLPField, Network, NeuralODE, Records, adapt, measures, models
from odenets.module_wise import split_into_modules
from odenets.recording import Recording, record
from tests.odenets.adapting.models import small_resnet, small_vit

X = torch.randn(3, 2)
IMAGES = torch.rand(2, 1, 8, 8)


def flow(depth=2, **settings):
    return Flow(lambda: MLPField(2), depth=depth, **settings)


def blocks(network, x, *args):
    return network.record(x, *args, action=measures.action)[1].blocks


def two_flows():
    return Network(nn.Identity(), [flow(), flow(1)], nn.Identity(), transitions=[nn.Identity()])


def test_blocks_of_a_flow_are_its_modules():
    network = flow(3)
    assert blocks(network, X) == network.names == ("blocks.0", "blocks.1", "blocks.2")
    assert [network.get_submodule(name) for name in network.names] == [*network.blocks]


def test_a_shared_block_counts_its_calls():
    network = Flow(MLPField(2), depth=3, shared=True)
    assert blocks(network, X) == ("blocks.0 call 0", "blocks.0 call 1", "blocks.0 call 2")


def test_a_network_names_the_flow_where_it_has_several():
    assert blocks(two_flows(), X) == ("flows.0 blocks.0", "flows.0 blocks.1", "flows.1 blocks.0")
    assert blocks(Network(nn.Identity(), flow(), nn.Identity()), X) == ("blocks.0", "blocks.1")


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_neural_ode_names_its_steps(control):
    _, records = NeuralODE(MLPField(2), control=control).record(5 * X, action=measures.action)
    assert records.blocks == tuple(f"step {m}" for m in range(len(records["action"])))
    assert len(records.blocks) > 1


def test_a_neural_ode_without_steps_has_one_row_for_all_of_them():
    assert blocks(NeuralODE(MLPField(2), gradient="backsolve"), X) == ("all steps",)
    network = Network(nn.Identity(), [flow(), NeuralODE(MLPField(2), steps=2)], nn.Identity(), transitions=[nn.ReLU()])
    assert blocks(network, X) == ("flows.0 blocks.0", "flows.0 blocks.1", "flows.1 step 0", "flows.1 step 1")


def test_blocks_of_an_adapted_resnet_are_its_modules():
    network = adapt(small_resnet())
    names = blocks(network, torch.rand(2, 3, 64, 64))
    assert names == network.names
    assert names[:2] == ("layer1.0", "layer2.0")
    assert all(type(network.model.get_submodule(name)).__name__ == "BasicBlock" for name in names)


def test_blocks_of_an_adapted_transformer_are_attention_and_mlp():
    x = torch.rand(2, 3, 32, 32)
    network = adapt(small_vit().eval(), x)
    before = network.names  # as the blocks are found
    first = "encoder.layers.encoder_layer_0"
    assert blocks(network, x)[:2] == (f"{first} attention", f"{first} mlp")
    assert before == network.names == network.record(x)[1].blocks


@pytest.mark.parametrize("checkpointed", [False, True])
def test_modules_stand_before_the_names_of_their_blocks(checkpointed):
    """In training end to end too, where the modules may be computed twice."""
    from odenets.module_wise.steps import end_to_end_step
    from odenets.training import Objective

    class Looking(Objective):
        measures = {"action": measures.action}  # noqa: RUF012
        seen = ()

        def loss(self, network, batch, output, records):
            Looking.seen = records.blocks
            return output.square().mean()

    network = split_into_modules(models.small_network(solver="euler", depth=3), 2, IMAGES)
    names = ("module 1 blocks.0", "module 1 blocks.1", "module 2 blocks.0")
    assert blocks(network, IMAGES) == names
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    end_to_end_step(network, Looking(), optimizer, IMAGES, torch.tensor([0, 1]), checkpointed=checkpointed)
    assert Looking.seen == names


def test_parts_are_joined_under_names():
    one, other = Records({"a": torch.zeros(2, 3)}), Records({"a": torch.ones(1, 3)}, blocks=["b"])
    assert Records.join([one, other]).blocks == ("part 0 step 0", "part 0 step 1", "part 1 b")
    assert Records.join([one, other], ["", "last"]).blocks == ("step 0", "step 1", "last b")
    assert Records.join([one]).blocks == one.blocks
    assert Records.join([Records({}, blocks=one.blocks), Records({}, blocks=["b"])]).starts == (0, 2)
    with pytest.raises(ValueError, match="zip"):
        Records.join([one], ["a", "b"])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_have_the_names(copied):
    records = two_flows().record(X, action=measures.action)[1].map(Tensor.detach)
    other = copied(records)
    assert other.layout == records.layout == ((0, 2), records.blocks, None)
    torch.testing.assert_close(dict(other), dict(records))
    assert type(other) is Records


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_names_outlive_the_dictionary_that_a_wrapper_makes_anew(precision):
    """Fabric converts outputs to another dtype, and rebuilds dictionaries as plain ones (pytorch#67831)."""
    network = two_flows()
    module = Fabric(accelerator="cpu", precision=precision).setup(Recording(network, {"action": measures.action}))
    _, records = record(module, X.to(next(network.parameters()).dtype), {"action": measures.action})
    assert records.layout == ((0, 2), ("flows.0 blocks.0", "flows.0 blocks.1", "flows.1 blocks.0"), None)
    moved = move_data_to_device((records.layout, dict(records)), torch.device("cpu"))
    assert Records(moved[1], *moved[0]).layout == records.layout


@pytest.mark.parametrize(
    "make", [two_flows, lambda: adapt(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), displacement=True)]
)
def test_a_compiled_record_has_the_names(make):
    network = make().eval()
    expected = blocks(network, X)
    compiled = torch.compile(network.record, backend="eager", fullgraph=True)
    assert compiled(X, action=measures.action)[1].blocks == expected


def test_a_table_has_a_row_for_each_block_and_sample():
    values = {"action": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True), "n": torch.arange(6)}
    values["n"] = values["n"].reshape(3, 2)
    frame = Records(values, (0, 2), ["a", "b", "c"]).to_dataframe()
    expected = pd.DataFrame(
        {
            "block": [0, 0, 1, 1, 2, 2],
            "name": pd.Series(["a", "a", "b", "b", "c", "c"]),
            "flow": [0, 0, 0, 0, 1, 1],
            "sample": [0, 1, 0, 1, 0, 1],
            "action": np.array([1, 2, 3, 4, 5, 6], np.float32),
            "n": [0, 1, 2, 3, 4, 5],
        }
    )
    pd.testing.assert_frame_equal(frame, expected)


def test_a_table_of_tokens_has_the_position_of_each():
    tokens = torch.tensor([[0, 0], [0, 1], [1, 4]])
    records = Records({"a": torch.arange(6.0).reshape(2, 3)}, blocks=["one", "two"], tokens=tokens)
    frame = records.to_dataframe()
    assert list(frame) == ["block", "name", "flow", "sample", "token", "a"]
    assert frame["sample"].tolist() == [0, 0, 1] * 2
    assert frame["token"].tolist() == [0, 1, 4] * 2
    assert frame["a"].tolist() == [*range(6)]
    assert repr(records).startswith("Records of 2 blocks x 3 tokens, means over the tokens:")
    with pytest.raises(ValueError, match=r"must not have the names of columns, .*, token, got \['token'\]"):
        Records({"token": torch.zeros(1, 3)}, tokens=tokens).to_dataframe()
    assert list(Records({}, tokens=tokens).to_dataframe()) == ["block", "name", "flow", "sample", "token"]


def test_records_of_the_same_tokens_are_joined():
    tokens = torch.tensor([[0, 0], [0, 1], [1, 4]])
    one, other = (Records({"a": torch.zeros(rows, 3)}, tokens=tokens.clone()) for rows in (2, 1))
    joined = Records.join([one, other])
    assert torch.equal(joined.tokens, tokens)
    assert torch.equal(pickle.loads(pickle.dumps(joined)).tokens, tokens)
    assert joined.map(torch.abs).tokens is joined.tokens
    for others in (None, tokens + 1, tokens[:2]):
        with pytest.raises(ValueError, match="parts must be measured on the same tokens, or all of them per sample"):
            Records.join([one, Records({"a": torch.zeros(1, 3)}, tokens=others)])


def test_tokens_are_samples_and_positions():
    with pytest.raises(ValueError, match=r"tokens must be samples and positions, shape \(N, 2\), got \(3,\)"):
        Records({"a": torch.zeros(2, 3)}, tokens=torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tables_hold_narrow_numbers_in_float32(dtype):
    """NumPy has no bfloat16 (pytorch#110285), and means of float16 overflow."""
    records = Records({"a": torch.full((2, 3), 60000.0, dtype=dtype, requires_grad=True)})
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.from_numpy(records.to_numpy()["a"]).dtype == wide
    assert records.to_dataframe()["a"].sum() == pytest.approx(6 * torch.tensor(60000.0, dtype=dtype).item())


@pytest.mark.parametrize("values", [{}, {"a": torch.zeros(0, 4)}, {"a": torch.zeros(2, 0)}])
def test_tables_of_nothing_have_the_columns(values):
    frame = Records(values).to_dataframe()
    assert len(frame) == 0
    assert list(frame) == ["block", "name", "flow", "sample", *values]


def test_blocks_keep_their_order_in_groups():
    _, records = flow(11).record(X, action=measures.action)
    means = records.to_dataframe().groupby("block")["action"].mean()
    np.testing.assert_allclose(means, records["action"].detach().mean(1), rtol=1e-6)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (Records({"sample": torch.zeros(2, 3)}), r"must not have the names of columns, block, .*got \['sample'\]"),
        (Records({"a": torch.zeros(2, 3), "b": torch.zeros(2)}), r"'b' must have shape \(blocks, B\) .*got \(2,\)"),
        (Records({"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}), r"'b' must have shape .*beside \{'a': \(2, 3\)\}"),
        (Records({"a": torch.zeros(2, 3)}, blocks=["one"]), r"'a' must have .*with the 1 blocks that are named"),
    ],
)
def test_what_is_no_table_is_refused(records, message):
    with pytest.raises(ValueError, match=message):
        records.to_dataframe()


def test_records_print_the_means_of_their_blocks():
    values = {"action": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "moved": torch.tensor([[True, False], [True, True]])}
    assert repr(Records(values, blocks=["layer1.0", "mlp"])).splitlines() == [
        "Records of 2 blocks x 2 samples, means over the samples:",
        "          action  moved",
        "layer1.0     1.5    0.5",
        "mlp          3.5      1",
    ]


def test_what_is_printed_is_short():
    lines = str(Records({"a": torch.rand(50, 1000)})).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["a", *["step"] * 6, "...", *["step"] * 6]
    assert lines[-1].startswith("step 49")


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (Records({}, blocks=["a", "b"]), "Records of 2 blocks: no measure"),
        (Records({"a": torch.zeros(2, 3), "b": torch.zeros(2)}), "Records of 2 blocks: a (2, 3), b (2,)"),
    ],
)
def test_what_has_no_means_is_printed_too(records, text):
    assert repr(records) == text


def test_records_without_numbers_are_printed():
    """On the meta device, and under a transform, where a debugger shows them."""
    assert repr(Records({"a": torch.zeros(1, 3, device="meta")})) == "Records of 1 blocks: a (1, 3)"
    shown = []
    torch.vmap(lambda x: shown.append(repr(Records({"a": x}))) or x)(torch.zeros(2, 1, 3))
    assert shown == ["Records of 1 blocks: a (1, 3)"]
