"""The layer itself: statistics of each stage, in states, inference mode, compiled and under vmap."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint

from odenets import Block, ConvField, Flow, MLPField, NeuralODE, measures, recalibrate
from odenets.normalization import StageBatchNorm
from tests.odenets.normalization.networks import X, network, trained

IMAGES = torch.randn(4, 8, 6, 6)


def test_batch_norm_keeps_statistics_per_stage():
    flow = Flow(ConvField(8, norm="batch"), solver="bs23", depth=1, total_time=4.0)
    for _ in range(20):
        flow.record(torch.randn(16, 8, 6, 6), error=measures.error)
    field = flow.blocks[0].fields[0]
    assert field.norm1.running_var.shape == (4, 8)
    assert field.norm1.batches.tolist() == [20] * 4
    *_, step = flow.train().steps(IMAGES)
    stage_inputs = [step.x0, step.x0 + 2.0 * step.stages[0], step.x0 + 3.0 * step.stages[1], step.x1]
    for i, x in enumerate(stage_inputs):
        torch.testing.assert_close(field.norm1(x, i), nn.functional.batch_norm(x, None, None, training=True))


def test_what_is_measured_changes_no_state_of_a_shared_flow_with_batch_norm():
    """Every stage has statistics of its own, so that a closing stage is not the first of the next step."""
    torch.manual_seed(0)
    flow = Flow(ConvField(4, norm="batch"), solver="bs23", depth=3, shared=True)
    x = torch.rand(8, 4, 5, 5)
    for _ in range(3):
        flow.train().record(x, error=measures.error)
    state, records = flow.eval().record(x, error=measures.error)
    assert torch.equal(state, flow(x))
    assert records["error"].shape == (3, 8)
    assert flow.evaluations_per_pass(closing=True) == 12


def test_batch_norm_takes_the_precision_of_its_weights():
    flow = Flow(ConvField(4, norm="batch").double(), solver="bs23", depth=2)
    assert flow(torch.rand(3, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_states_from_before_recalibrations_were_counted_are_taken():
    net, other = trained(), network()
    state = {name: value for name, value in net.state_dict().items() if not name.endswith("recalibrated")}
    recalibrate(other, [X])
    assert not any(other.load_state_dict(state))
    assert torch.equal(other.eval()(X), net(X))
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        other.record(X, error=measures.error)


@pytest.mark.slow
@torch.no_grad()
def test_statistics_are_known_to_a_compiled_flow():
    flow = network().flows[0].part(0, 1).train()
    run = torch.compile(lambda x, readout: flow(x, readout=readout), backend="eager")
    run(X, "solution")
    assert flow.blocks[0].fields[0].norm1._known == [2, 2, 2, 0]
    flow.eval()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        run(X, "ensemble")
    recalibrate(flow, [X])
    torch.testing.assert_close(run(X, "ensemble"), flow(X, readout="ensemble"))
    flow.train()
    run(X, "solution")
    flow.eval()
    with pytest.raises(ValueError, match="statistics that are behind further training of stage 4"):
        run(X, "ensemble")


def test_statistics_are_known_under_vmap():
    flows = [network().flows[0] for _ in range(2)]
    parameters, buffers = stack_module_state(flows)
    one = copy.deepcopy(flows[0]).train()

    def call(readout, p, b):
        return functional_call(one, (p, b), (X,), {"readout": readout})

    torch.vmap(partial(call, "solution"))(parameters, buffers)
    one.eval()
    with pytest.raises(ValueError, match="no statistics of stage 4"):
        torch.vmap(partial(call, "ensemble"))(parameters, buffers)


def test_the_counts_of_batches_are_read_once(monkeypatch):
    """A device is waited for when they have changed, not at every call."""
    net = trained()
    norm = net.flows[0].blocks[0].fields[0].norm1
    norm.known()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the count was read"))
    for _ in range(3):
        norm(X, 1)


def test_a_state_of_another_method_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"norm1: the state holds batch norm statistics of 4 stage\(s\).*has 1"):
        network("euler").load_state_dict(trained("bs23").state_dict())


class Own(nn.Module):
    """A field of one's own, of torch's Sequential."""

    def __init__(self, norm=StageBatchNorm):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), norm(8), nn.SiLU(), nn.Linear(8, 3))

    def forward(self, t, x):
        return self.layers(x)


def as_field_of_the_library(own):
    """The same weights, in a field that is told its stages."""
    field = MLPField(3, 8, norm="batch")
    field.expand_stages(own.layers[1].stages)
    for one, other in ((field.first, 0), (field.norm, 1), (field.second, 3)):
        one.load_state_dict(own.layers[other].state_dict())
    return field


COMPILED = partial(torch.compile, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("call", ["eager", "checkpoint", "compiled"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_field_of_ones_own_learns_the_stage_from_its_block(call, shared):
    own = Own()
    options = {"solver": "bs23", "depth": 2, "shared": shared, "total_time": 6.0}
    first = Flow(own, **options)
    fields = [as_field_of_the_library(block.fields[0]) for block in first.blocks]
    second = Flow.of(
        [Block([f], b.h) for f, b in zip(fields, first.blocks, strict=True)], first.h, solver="bs23", shared=shared
    )
    x = torch.randn(16, 3)
    run = {"eager": first, "checkpoint": partial(checkpoint, first, use_reentrant=False), "compiled": COMPILED(first)}[
        call
    ]
    for _ in range(2):
        torch.testing.assert_close(run(x), second(x))
    for norm, other in zip(norms_of(first), norms_of(second), strict=True):
        assert norm.batches.tolist() == other.batches.tolist()
        torch.testing.assert_close(norm.running_mean, other.running_mean)
    for flow in (first, second):
        recalibrate(flow, [x])
    run = COMPILED(first.eval()) if call == "compiled" else first.eval()
    torch.testing.assert_close(run(x), second.eval()(x))


def norms_of(flow):
    return [module for module in flow.modules() if isinstance(module, StageBatchNorm)]


def test_stages_of_threads_are_apart():
    flow, x = Flow(Own(), solver="rk4"), torch.randn(16, 3)
    recalibrate(flow, [x, x + 1])
    flow.eval()
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        alone = flow(x)
        for _ in range(20):
            assert all(torch.equal(alone, one) for one in pool.map(flow, [x] * 4))


def test_in_training_mode_the_stage_must_be_known():
    norm = StageBatchNorm(3, stages=2)
    with pytest.raises(ValueError, match=r"stage must be known .* 2 stages trains: call norm\(x, stage\)"):
        norm(torch.randn(4, 3))
    norm.eval()(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"stage must be below 2.*got 2: StageBatchNorm\(3, stages=n\)"):
        norm(torch.randn(4, 3), 2)


def test_batch_norm_whose_statistics_the_stages_share_is_named_once():
    x = torch.randn(8, 3)
    flow = Flow(Own(nn.BatchNorm1d), solver="bs23")
    with pytest.warns(
        UserWarning, match=r"blocks.0.fields.0.layers.1 is BatchNorm1d .* all 4 stages of bs23.*StageBatch"
    ):
        flow(x)
    flow(x)
    ode = NeuralODE(Own(), solver="euler", steps=2)
    with pytest.warns(UserWarning, match=r"layers.1 is StageBatchNorm in a field that is evaluated many.*GroupNorm"):
        ode(x)
    ode(x)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: Flow(Own(nn.BatchNorm1d), solver="euler", depth=2),
        lambda: Flow(lambda: Own(nn.BatchNorm1d), solver="bs23", stage_fields="untied"),
        lambda: Flow(Own(nn.BatchNorm1d), solver="bs23").eval(),
        lambda: Flow(Own(partial(nn.BatchNorm1d, track_running_stats=False)), solver="bs23"),
        lambda: Flow(Own(partial(nn.GroupNorm, 2)), solver="bs23"),
        lambda: Flow(Own(), solver="bs23"),
        lambda: NeuralODE(Own(partial(nn.GroupNorm, 2)), steps=2),
    ],
)  # fmt: skip
def test_norms_whose_statistics_are_right_are_not_named(flow):
    flow()(torch.randn(8, 3))
