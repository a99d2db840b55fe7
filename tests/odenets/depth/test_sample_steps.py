"""Steps of each sample's own size: against the network, against closed forms, counted."""

import copy
import math

import pytest
import torch
from torch import nn

from odenets import (
    Block,
    ConvField,
    Flow,
    MLPField,
    Network,
    NeuralODE,
    load_weights,
    models,
    recalibrate,
    save_weights,
)
from odenets.depth import SampleSteps
from odenets.measures import action, displacement
from solvers import PI, get_tableau

ERRORS = {
    "bs23": ("next", "preceding", "embedded", "midpoint", "euler"),
    "heun": ("next", "preceding", "embedded"),
    "euler": ("next", "preceding"),
    "rk4": ("next", "preceding", "midpoint"),
}
EVERY = [(solver, error) for solver, errors in ERRORS.items() for error in errors]


class Counted(nn.Module):
    """A linear field that counts the samples for which it is evaluated."""

    def __init__(self, rate=1.0):
        super().__init__()
        self.rate, self.samples = nn.Parameter(torch.tensor(float(rate), dtype=torch.float64)), 0

    def forward(self, t, x):
        self.samples += len(x)
        return -self.rate * x.square()  # steep where x is large


def flow_of(*rates, solver="bs23", h=0.25, **options):
    return Flow.of([Block([Counted(rate)], h) for rate in rates], solver=solver, **options).eval()


def samples(flow):
    return sum(block.fields[0].samples for block in flow.blocks)


X = torch.tensor([[0.01], [0.5], [2.0], [6.0]], dtype=torch.float64)


@pytest.mark.parametrize(("solver", "error"), EVERY)
def test_a_tolerance_of_zero_is_the_network(solver, error):
    network = models.points_network(solver=solver, depth=4, total_time=1.0).double().eval()
    x = torch.randn(3, 2, dtype=torch.float64)
    walk = SampleSteps(network, 0.0, error=error).walk(x)
    torch.testing.assert_close(walk.output, network(x), rtol=1e-12, atol=1e-12)
    assert (walk.taken == 1).all()
    if error in ("next", "preceding"):  # which cost nothing
        assert walk.evaluations.tolist() == [network.evaluations] * 3


@pytest.mark.parametrize(("solver", "error"), EVERY)
def test_a_batch_is_what_its_samples_are_alone(solver, error):
    flow = flow_of(*[1.0] * 8, solver=solver)
    steps = SampleSteps(flow, 1e-2, error=error, first=4)
    whole = steps.walk(X)
    assert len(set(whole.evaluations.tolist())) > 1
    for i in range(len(X)):
        alone = steps.walk(X[i : i + 1])
        torch.testing.assert_close(alone.output, whole.output[i : i + 1], rtol=1e-12, atol=0)
        assert alone.evaluations.item() == whole.evaluations[i]
        assert torch.equal(alone.taken[:, 0], whole.taken[:, i])


@pytest.mark.parametrize(("solver", "error"), EVERY)
@pytest.mark.parametrize("shared", [False, True])
def test_evaluations_are_those_that_fields_do(solver, error, shared):
    flow = flow_of(*[1.0] * 8, solver=solver)
    if shared:
        flow = Flow.of([Block([Counted()], 0.25)], h=[0.25] * 8, solver=solver, shared=True).eval()
    steps = SampleSteps(flow, 1e-2, error=error, first=4)
    walk = steps.walk(X)
    assert walk.evaluations.sum().item() == samples(flow)
    assert torch.equal(steps.evaluations, walk.evaluations)
    if error != "preceding":
        assert walk.rejected.sum() > 0


@pytest.mark.parametrize("error", ERRORS["bs23"])
def test_every_sample_keeps_the_total_time_and_the_end_of_each_flow(error):
    first, second = flow_of(*[1.0] * 5), flow_of(*[1.0] * 3)
    network = Network(nn.Identity(), [first, second], nn.Identity(), transitions=[nn.Identity()]).eval()
    for tolerance in (1e-3, math.inf):
        taken = SampleSteps(network, tolerance, error=error).walk(X).taken
        assert (taken[:5].sum(0) == 5).all()
        assert (taken[5:].sum(0) == 3).all()
        for column in taken.T.tolist():
            ends = [m + k for m, k in enumerate(column) if k]
            assert ends == [*[m for m, k in enumerate(column) if k][1:], 8]


def test_steps_are_long_where_the_error_is_small():
    walk = SampleSteps(flow_of(*[1.0] * 16, h=0.1), 1e-3).walk(X)
    assert walk.evaluations[0] < walk.evaluations[2]
    assert walk.taken[:, 0].max() > walk.taken[:, 3].max()


def test_one_step_over_many_blocks_is_one_of_their_summed_time():
    flow, whole = flow_of(*[1.0] * 4), flow_of(1.0, h=1.0)
    walk = SampleSteps(flow, math.inf, first=4, error="embedded").walk(X)
    torch.testing.assert_close(walk.output, whole(X))
    assert walk.taken.tolist() == [[4] * 4, *[[0] * 4] * 3]


def test_the_next_block_is_seen_and_the_block_alone_is_not():
    """A field that is 0 has no embedded error, whatever comes behind it."""
    flow = flow_of(0.0, 0.0, 0.0, 3.0, 3.0, 3.0)
    blind = SampleSteps(flow, 1e-2, error="embedded").walk(X)
    seeing = SampleSteps(flow, 1e-2, error="next").walk(X)
    steep = X[:, 0] >= 2
    assert (blind.taken[1] == 5).all()
    assert (seeing.taken[1, steep] < 5).all()
    distance = [(walk.output - flow(X)).abs()[steep].max() for walk in (seeing, blind)]
    assert distance[0] < 0.2 * distance[1]


def test_closing_stages_pass_on_where_the_block_is_the_same():
    flow = Flow.of([Block([Counted()], 0.25)], h=[0.25] * 4, solver="bs23", shared=True).eval()
    walk = SampleSteps(flow, 0.0, error="embedded").walk(X)
    assert walk.evaluations.tolist() == [12] * 4  # the last closing stage decides nothing
    apart = flow_of(*[1.0] * 4)
    assert SampleSteps(apart, 0.0, error="embedded").walk(X).evaluations.tolist() == [15] * 4


@pytest.mark.parametrize("stage_fields", ["chained", "untied"])
def test_fields_of_the_stages_may_be_others(stage_fields):
    flow = Flow(lambda: MLPField(3), solver="bs23", depth=4, stage_fields=stage_fields).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    for error in ("next", "embedded", "preceding"):
        steps = SampleSteps(flow, 0.0, error=error)
        torch.testing.assert_close(steps(x), flow(x))
        steps.tolerance = math.inf
        assert (steps.walk(x).taken.sum(0) == 4).all()


def test_a_schedule_can_be_followed_and_costs_its_steps():
    flow = flow_of(*[1.0] * 6)
    steps = SampleSteps(flow, 1e-3)
    walk = steps.walk(X)
    again = steps.follow(X, walk.taken)
    torch.testing.assert_close(again.output, walk.output, rtol=1e-12, atol=0)
    assert again.evaluations.tolist() == (3 * (walk.taken > 0).sum(0)).tolist()
    other = steps.follow(X, walk.taken.flip(1))
    assert torch.equal(other.taken, walk.taken.flip(1))
    for wrong, message in ((0, "from 1 to 6 blocks"), (7, "from 1 to 6 blocks for steps from block 0, got 7")):
        with pytest.raises(ValueError, match=message):
            steps.follow(X, torch.full((6, 4), wrong))
    with pytest.raises(ValueError, match="shape \\(6, 4\\)"):
        steps.follow(X, torch.ones(6, 3, dtype=torch.long))


def test_the_tolerance_of_a_mean_number_of_evaluations_is_found():
    flow, x = flow_of(*[1.0] * 16, h=0.1), torch.linspace(0.01, 4, 60, dtype=torch.float64)[:, None]
    steps = SampleSteps(flow, 0.0)
    tolerance = steps.calibrate([x[:30], x[30:]], 24)
    assert steps.tolerance == tolerance
    steps(x)
    assert 21 < steps.evaluations.double().mean() <= 24
    assert steps.calibrate([x], flow.evaluations) == 0.0
    with pytest.raises(ValueError, match="evaluations must be at least"):
        steps.calibrate([x], 1.0)
    with pytest.raises(ValueError, match=r"evaluations must be at most [0-9]+, what all blocks take, got 1000"):
        steps.calibrate([x], 1000)
    with pytest.raises(ValueError, match="at least one batch"):
        steps.calibrate([], 20)
    with pytest.raises(TypeError, match="got one tensor"):
        steps.calibrate(x, 20)
    assert steps.tolerance == 0.0


def test_measures_are_of_the_steps_that_are_taken():
    flow = flow_of(*[1.0] * 6)
    steps = SampleSteps(flow, 0.0)
    _, records = flow.record(X, action=action)
    torch.testing.assert_close(steps.walk(X, action=action).records["action"], records["action"])
    steps.tolerance = 1e-1
    walk = steps.walk(X, length=displacement)
    assert walk.records.blocks == flow.names
    assert torch.equal(walk.records["length"] > 0, walk.taken > 0)


def test_the_change_of_the_prediction_is_a_norm():
    network = models.small_network(features=4, solver="bs23", depth=6, total_time=2.0).eval()
    x = torch.rand(8, 1, 8, 8)
    steps = SampleSteps(network, 0.2, norm="prediction")
    assert (steps.walk(x).evaluations <= network.evaluations).all()
    with torch.no_grad():
        network.head[-1].weight.zero_()  # nothing changes what does not depend on the state
    assert (steps.walk(x).taken[1] == 5).all()
    with pytest.raises(ValueError, match="needs a network with a head"):
        SampleSteps(network.flows[0], 0.1, norm="prediction")
    regression = Network(nn.Identity(), flow_of(1.0, 1.0), nn.Identity()).eval()
    with pytest.raises(ValueError, match="logits"):
        SampleSteps(regression, 0.1, norm="prediction").walk(X)


@pytest.mark.parametrize("norm", ["rms", "raw", "relative"])
def test_norms_are_of_the_embedded_error(norm):
    flow = flow_of(*[1.0] * 2)
    step = next(iter(flow_of(1.0, h=0.5).steps(X)))
    factor = {"rms": 1, "raw": math.sqrt(X.shape[1]), "relative": step.x1.abs()[:, 0]}[norm]
    errors = step.error().abs()[:, 0] / factor
    for tolerance in (0.5 * errors[2].item(), 2 * errors[2].item()):
        walk = SampleSteps(flow, tolerance, norm=norm, error="embedded", first=2).walk(X)
        assert torch.equal(walk.taken[0] == 2, errors <= tolerance)
    own = SampleSteps(flow, 1.0, norm=lambda error, x: error.flatten(1).abs().amax(1) + 2, first=2)
    assert (own.walk(X).taken == 1).all()


def test_what_is_not_finite_is_rejected():
    """Three steps of Euler's method diverge where small ones do not."""
    flow = flow_of(*[1.0] * 8, h=0.125)
    x = torch.tensor([[1e120], [0.5]], dtype=torch.float64)
    walk = SampleSteps(flow, 1e-3, first=8).walk(x)
    assert walk.rejected[0, 0] > 0
    assert walk.taken[0].tolist()[0] == 1
    assert torch.isfinite(walk.output[1]).all()


def test_batch_norms_are_those_of_the_full_depth_and_refused_while_they_train():
    flow = Flow(lambda: ConvField(4, norm="batch"), solver="bs23", depth=4)
    network = Network(nn.Identity(), flow, nn.Flatten())
    x = torch.randn(16, 4, 5, 5)
    recalibrate(network, [x])
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="batch norm in training mode"):
        SampleSteps(network, 0.1)(x)
    network.eval()
    torch.testing.assert_close(SampleSteps(network, 0.0)(x), network(x))
    SampleSteps(network, 1e9)(x)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class StochasticDepth(nn.Identity):
    """Named as torchvision's, whose rate is p."""

    p = 0.2


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.1), nn.RReLU(), StochasticDepth(), nn.MultiheadAttention(2, 1, dropout=0.1)]
)
def test_layers_that_draw_are_refused_while_they_train(layer):
    layer.forward = lambda x: x
    network = Network(nn.Identity(), Flow(MLPField(2), depth=2), nn.Sequential(nn.Identity(), layer)).train()
    with pytest.raises(ValueError, match=f"'head.1' is a {type(layer).__name__} in training mode, which draws"):
        SampleSteps(network, 0.1)(torch.rand(3, 2))
    layer.eval()
    assert SampleSteps(network, 0.1)(torch.rand(3, 2)).shape == (3, 2)


def test_layers_that_would_draw_nothing_may_train():
    layers = nn.Sequential(nn.Dropout(0.0), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0))
    network = Network(nn.Identity(), Flow(MLPField(2), depth=2), layers[0]).train()
    assert SampleSteps(network, 0.1)(torch.rand(3, 2)).shape == (3, 2)


def test_the_tolerance_is_saved_with_the_weights(tmp_path):
    def build():
        return models.points_network(solver="bs23", depth=2).eval()

    steps = SampleSteps(build(), 0.25)
    save_weights(steps, tmp_path / "steps.safetensors")
    assert load_weights(SampleSteps(build(), 0.0), tmp_path / "steps.safetensors").tolerance == 0.25
    other = SampleSteps(build(), 0.0)
    other.load_state_dict(steps.state_dict())
    assert other.tolerance == 0.25
    with pytest.raises(ValueError, match=r"must be those of the saved tolerance 0\.25, got norm=raw, error=next"):
        load_weights(SampleSteps(build(), 0.0, norm="raw"), tmp_path / "steps.safetensors")


@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace])
def test_an_export_is_refused(export):
    with pytest.raises(RuntimeError, match=r"SampleSteps takes a way for each sample.*network.at_depth"):
        export(SampleSteps(models.points_network(depth=2).eval(), 0.1), (torch.rand(4, 2),))


def test_inputs_that_are_labels_are_named():
    steps = SampleSteps(models.small_network(depth=2).eval(), 0.1)
    with pytest.raises(TypeError, match="x must be of the floating dtype of the network"):
        steps.calibrate([torch.arange(4)], 2)


def test_gradients_pass_through_the_steps():
    flow = Flow(MLPField(3), solver="bs23", depth=4).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    gradients = []
    for model in (flow, SampleSteps(flow, 0.0), SampleSteps(flow, 1e-3)):
        flow.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in flow.parameters() if p.grad is not None])
    for one, other in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(one, other)
    with torch.inference_mode():
        SampleSteps(flow, 1e-3)(x)


def test_controllers_choose_the_sizes():
    flow = flow_of(*[1.0] * 16, h=0.1)
    counts = [SampleSteps(flow, 1e-3, controller=one).walk(X).evaluations for one in (None, PI())]
    assert not torch.equal(*counts)


def test_a_lazy_flow_makes_its_field():
    flow = Flow(solver="bs23", depth=3).eval()
    assert SampleSteps(flow, 1e-2)(torch.randn(4, 2)).shape == (4, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SampleSteps(nn.Linear(2, 2), 0.1), TypeError, "must be an odenets.Network or a Flow"),
        (lambda: SampleSteps(Network(nn.Identity(), NeuralODE(MLPField(2)), nn.Identity()), 0.1), TypeError, "sample"),
        (lambda: SampleSteps(flow_of(1.0), -0.1), ValueError, "tolerance must not be negative"),
        (lambda: SampleSteps(flow_of(1.0), math.nan), ValueError, "tolerance must not be negative"),
        (lambda: SampleSteps(flow_of(1.0), "0.1"), TypeError, "tolerance must be a number"),
        (lambda: SampleSteps(flow_of(1.0), 0.1, norm="l1"), ValueError, "norm must be one of 'rms'"),
        (lambda: SampleSteps(flow_of(1.0), 0.1, error="order3"), ValueError, "error must be one of 'next'"),
        (lambda: SampleSteps(flow_of(1.0), 0.1, first=0), ValueError, "first must be at least 1"),
        (lambda: SampleSteps(flow_of(1.0), 0.1, controller=lambda s, e, q: s), TypeError, "method each"),
        (
            lambda: SampleSteps(flow_of(1.0, solver="euler"), 0.1, error="embedded"),
            ValueError,
            "carries no embedded error",
        ),
        (
            lambda: SampleSteps(Network(nn.Identity(), flow_of(1.0), nn.Identity(), readout="ensemble"), 0.1),
            ValueError,
            "read out 'solution'",
        ),
        (lambda: SampleSteps(flow_of(1.0), 0.1)(torch.ones(3)), ValueError, "shape \\(B, \\*S\\)"),
        (lambda: SampleSteps(flow_of(1.0, 1.0), 0.1, norm=lambda e, x: e.sum())(X), ValueError, "number per sample"),
    ],
)
def test_refusals_name_the_argument(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_any_tableau_of_the_method_is_taken():
    flow = flow_of(*[1.0] * 4, solver=get_tableau("bs23").forwarding("order2"))
    torch.testing.assert_close(SampleSteps(flow, 0.0)(X), flow(X))


class Forced(nn.Module):
    """A field with a force for each sample, and one number for all."""

    def forward(self, t, x, force, scale):
        return scale * force * t - x.square()


@pytest.mark.parametrize("error", ["next", "preceding", "embedded"])
def test_fields_take_what_belongs_to_each_sample(error):
    flow = Flow.of([Block([Forced()], 0.25) for _ in range(8)], solver="bs23").eval()
    force, scale = torch.tensor([[0.0], [1.0], [5.0], [2.0]], dtype=torch.float64), torch.tensor(2.0)
    steps = SampleSteps(flow, 0.0, error=error)
    torch.testing.assert_close(steps(X, force, scale), flow(X, force, scale))
    steps.tolerance = 1e-2
    whole = steps.walk(X, force, scale)
    assert len(set(whole.evaluations.tolist())) > 1
    for i in range(4):
        torch.testing.assert_close(steps(X[i : i + 1], force[i : i + 1], scale)[0], whole.output[i])
    torch.testing.assert_close(steps.follow(X, whole.taken, force, scale).output, whole.output)
    with pytest.raises(TypeError, match="field must take"):
        steps(X)


@pytest.mark.parametrize("error", ["next", "preceding", "embedded"])
def test_aligned_steps_are_those_of_halvings(error):
    flow = flow_of(*[1.0] * 12, h=0.1)
    steps = SampleSteps(flow, 3e-3, error=error, first=4, aligned=True)
    taken = steps.walk(X).taken
    assert set(taken.unique().tolist()) <= {0, 1, 2, 4, 8}
    assert len(taken.unique()) > 2, taken
    for m, row in enumerate(taken.tolist()):
        assert all(k == 0 or m % k == 0 for k in row)
    steps.tolerance = math.inf
    assert steps.walk(X).taken[:, 0].tolist() == [4, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0]
    steps.tolerance = 0.0
    torch.testing.assert_close(steps(X), flow(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 9}, "first must be at most 8, the blocks of the longest flow, got 9"),
        ({"first": 3, "aligned": True}, r"first must be 1, 2, 4, \.\.\. blocks for aligned steps, got 3"),
    ],
)
def test_first_steps_that_no_flow_takes(options, message):
    with pytest.raises(ValueError, match=message):
        SampleSteps(models.small_network(solver="bs23", depth=8), 0.1, **options)
