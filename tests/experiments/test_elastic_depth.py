import pytest
import torch
from elastic_depth import EXPERIMENT, summarize
from elastic_depth_setup import (
    RULES,
    SHAPES,
    Config,
    DroppedField,
    Job,
    WeightChange,
    build,
    noisy_images,
    parts_of,
    rounded,
)

from lab.experiment import run
from odenets import Flow, MLPField, Network
from odenets.training import CrossEntropy
from odenets.training.runs import read_summary

TINY = {
    "seeds": (0,), "epochs": 1, "train_size": 100, "test_size": 60, "validation_size": 50, "measured": 10,
    "arms": ("plain", "action"), "weights": (0.1, 1.0), "batch_size": 50, "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "digits", {4: (4,), 2: (2,), 1: (1,)})
        run(EXPERIMENT, Config(**TINY, output=folder))
    return folder


def test_the_table_holds_every_depth_the_controls_and_what_is_retained(folder):
    rows = read_summary(folder)["results"]["rows"]
    assert {row["blocks"] for row in rows if row["arm"] == "trained at each depth"} == {4, 2, 1}
    for arm in TINY["arms"]:
        assert [row["blocks"] for row in rows if row["arm"] == arm] == [4, 2, 1, 0]
    plain = read_summary(folder / "seed0" / "plain-0-depth4")["results"]
    row = next(row for row in rows if (row["arm"], row["blocks"]) == ("plain", 2))
    coarse = plain["coarse"][row["rule"]]["2"]["test"]
    zero, full = plain["removed"]["test"], plain["whole"]["test"]
    assert row["accuracy"]["values"][0] == pytest.approx(100 * coarse)
    if full != zero:
        assert row["retained"]["values"][0] == pytest.approx(100 * (coarse - zero) / (full - zero))
    assert (folder / "seed0" / "trained-0-depth1" / "weights.safetensors").exists()
    assert "test" not in read_summary(folder / "tuning" / "action-0.1-depth4")["results"]["whole"]


def test_retained_is_a_share_of_the_contribution():
    def result(arm, seed, whole, coarse, removed):
        accuracy = {"validation": coarse, "test": coarse}
        return {
            "arm": arm, "depth": 16, "seed": seed, "tuning": False, "setting": 0.0, "action": 1.0,
            "noisy": accuracy, "rounded": accuracy,
            "whole": {"validation": whole, "test": whole}, "removed": {"validation": removed, "test": removed},
            "coarse": {rule: {str(d): accuracy for d in (8, 4, 2, 1)} for rule in RULES},
        }  # fmt: skip

    results = [result("plain", seed, 0.9, 0.7, 0.5) for seed in (0, 1)]
    results += [result("action", seed, 0.8, 0.78 + 0.01 * seed, 0.7) for seed in (0, 1)]
    rows = {(row["arm"], row["blocks"]): row for row in summarize(Config(arms=("plain", "action")), results)}
    assert rows["plain", 4]["retained"].mean == pytest.approx(50)
    assert rows["action", 4]["retained"].mean == pytest.approx(85)
    assert rows["action", 4]["difference"].values == pytest.approx((30, 40))
    assert rows["action", 0]["retained"].mean == 0


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_every_depth_is_that_of_its_flows(dataset):
    data = parts_of(Config(train_size=50, test_size=20))[0]
    if dataset == "cifar10":
        data = type(data)(torch.rand(4, 3, 32, 32), data.y[:4], classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
    for depth, shape in SHAPES[dataset].items():
        network = build(Config(dataset=dataset), Job("plain", 0.0, depth, 0), data)
        assert [flow.depth for flow in network.flows] == [blocks for blocks in shape if blocks]
        assert sum(shape) == depth
        assert network(data.x[:4]).shape == (4, 10)


def test_stochastic_depth_keeps_the_mean_velocity():
    field = DroppedField(MLPField(2), 0.5)
    x = torch.randn(3, 2)
    drawn = torch.stack([field(0.0, x) for _ in range(400)]).detach()
    torch.testing.assert_close(drawn.mean(0), field.eval()(0.0, x).detach(), rtol=0.2, atol=0.02)
    assert {bool(one.any()) for one in drawn} == {True, False}


def test_the_change_of_weights_is_penalized_from_block_to_block():
    flow = Flow(lambda: MLPField(2), solver="euler", depth=3)
    network = Network(torch.nn.Identity(), flow, torch.nn.Identity())
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    weights = [torch.nn.utils.parameters_to_vector(block.parameters()) for block in flow.blocks]
    change = (weights[1] - weights[0]).square().sum() + (weights[2] - weights[1]).square().sum()
    torch.testing.assert_close(WeightChange(0.1)(network, x, y), CrossEntropy()(network, x, y) + 0.1 * change)


def test_rounded_weights_have_so_many_levels():
    data = parts_of(Config(train_size=50, test_size=20))[0]
    network = build(Config(), Job("plain", 0.0, 2, 0), data)
    before = {name: p.clone() for name, p in network.named_parameters()}
    weights = [p for p in rounded(network, 3, [data.x]).parameters() if p.ndim > 1]
    assert max(len(row.unique()) for weight in weights for row in weight.flatten(1)) <= 7
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    exact = rounded(network, 20, [data.x])
    torch.testing.assert_close(dict(exact.named_parameters()), before, rtol=0, atol=1e-4)
    noisy = noisy_images(data, 0.1, 0)
    assert 0.03 < (noisy.x - data.x).std() < 0.1  # less than the noise, for pixels stay in [0, 1]


def test_arms_must_hold_the_plain_network():
    with pytest.raises(ValueError, match="arms must hold 'plain'"):
        Config(arms=("action",))
    with pytest.raises(ValueError, match="arms must be among"):
        Config(arms=("plain", "magic"))
