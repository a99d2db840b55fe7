"""What holds for every scheme by name, whatever it is: all methods read its steps without knowing it."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn

import odenets
import solvers
from odenets import measures
from odenets.analysis import iterative_refinement
from odenets.depth import DepthRule, adapt_depth
from odenets.detection import Pipeline, QuantileTest, Trajectory
from odenets.least_action import LeastAction
from odenets.module_wise import split_into_modules
from odenets.recording import Recording
from odenets.schemes.names import SCHEMES
from solvers import integrate
from tests.counting import Operations

IMAGES = torch.randn(4, 4, 6, 6)
MEMORIES = [name for name, scheme in SCHEMES.items() if scheme.memory]


@pytest.fixture(params=SCHEMES)
def name(request):
    return request.param


def flow_of(name, norm="group", **settings):
    if SCHEMES[name].implicit or getattr(SCHEMES[name], "iterates", False):  # in few iterations
        settings = {"total_time": 0.1} | settings
    flow = odenets.Flow(lambda: odenets.ConvField(fields_channels(name), norm=norm), solver=name, depth=3, **settings)
    return flow.eval()


def fields_channels(name):
    return SCHEMES[name].fields_see(IMAGES).shape[1]


def same(function):
    """The value of a function of no arguments, always with the same random numbers."""
    torch.manual_seed(0)
    return function()


def test_one_function_through_forward_steps_and_record(name):
    flow, x = flow_of(name), IMAGES
    end = same(lambda: flow(x))
    *_, last = same(lambda: list(flow.steps(x)))
    state, records = same(lambda: flow.record(x, action=measures.action, plain=lambda step: measures.action(step)))
    torch.testing.assert_close(last.x1, end)
    torch.testing.assert_close(state, end)
    torch.testing.assert_close(records["action"], records["plain"])


def test_a_step_moves_by_its_residue(name):
    flow = flow_of(name).double()
    steps = same(lambda: list(flow.steps(IMAGES.double())))
    assert [step.h for step in steps] == [*flow.h]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        torch.testing.assert_close(step.x0 + step.h * step.residue, step.x1, rtol=1e-10, atol=1e-10)
        assert following is None or torch.equal(step.x1, following.x0)
        assert (measures.residue(step) > 0).all()
        assert (measures.displacement(step) > 0).all()


def test_training_steps_leave_nothing_in_memory(name):
    """Not even with activations in place, which save their own outputs."""
    flow = flow_of(name)

    def tensors():
        flow(IMAGES.clone().requires_grad_()).sum().backward()
        gc.collect()
        return sum(type(one) is torch.Tensor for one in gc.get_objects())

    tensors()
    gc.freeze()  # what there is by now is not looked at again
    assert tensors() >= tensors()


def test_it_trains_with_least_action(name):
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow_of(name), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    x, y = torch.randn(4, 3, 6, 6), torch.arange(4)
    LeastAction()(network, x, y).backward()
    assert not [key for key, p in network.named_parameters() if p.grad is None]


@pytest.mark.slow
def test_it_compiles_to_the_same_function(name):
    if name in ("noisy",):
        pytest.skip("draws other numbers in a graph")
    if SCHEMES[name].iterates:
        pytest.skip("no graph holds an iteration")
    flow, x = flow_of(name), IMAGES
    compiled = torch.compile(lambda x: flow.record(x, action=measures.action)[1]["action"], backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), flow.record(x, action=measures.action)[1]["action"])
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_without_gradients(name, mode):
    flow = flow_of(name)
    with mode():
        end = same(lambda: flow(IMAGES))
    torch.testing.assert_close(end, same(lambda: flow(IMAGES)))


def test_it_runs_under_autocast_and_in_half_precision(name):
    flow, x = flow_of(name), IMAGES.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        end = same(lambda: flow(x))
    end.float().square().mean().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(end.float(), same(lambda: flow(IMAGES)), rtol=0.1, atol=0.1)


def test_weights_travel(name, tmp_path):
    flow = flow_of(name)
    same(lambda: flow(IMAGES))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    odenets.save_weights(flow, tmp_path / "weights.safetensors")
    other = flow_of(name)
    odenets.load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(same(lambda: other(IMAGES)), same(lambda: flow(IMAGES)))
    for again in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(same(lambda: again(IMAGES)), same(lambda: flow(IMAGES)))  # noqa: B023 - called here
    euler = odenets.Flow(lambda: odenets.ConvField(4), solver="euler", depth=3, total_time=flow.total_time)
    with pytest.raises(ValueError, match="must have the solver that it was saved with"):
        odenets.load_weights(euler, tmp_path / "weights.safetensors")


def test_a_scheme_is_a_value(name):
    scheme = SCHEMES[name]
    assert copy.deepcopy(scheme) == scheme == pickle.loads(pickle.dumps(scheme))
    assert hash(scheme) == hash(copy.deepcopy(scheme))
    assert eval(repr(scheme), {**vars(solvers), **vars(odenets.schemes)}) == scheme


def test_its_modules_are_the_network(name):
    """Module-wise training: parts in turns are the whole, also where a step reads the one before."""
    flow = flow_of(name)
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow, nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    modules = split_into_modules(network, 3, torch.randn(4, 3, 6, 6)).eval()
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(same(lambda: [*modules.outputs(x)][-1]), same(lambda: network(x)))


def test_it_resumes_and_refines(name):
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow_of(name), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    refinement = iterative_refinement(network, [(torch.randn(4, 3, 6, 6), torch.arange(4))])
    assert refinement.ratio.shape == (3,)
    assert refinement.cosine.isfinite().all()


def test_depth_edits_work_or_are_refused(name):
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow_of(name), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    run = lambda: adapt_depth(network, lambda: [torch.randn(4, 3, 6, 6)], DepthRule(tolerance=1.0))  # noqa: E731
    if SCHEMES[name].low is None:
        with pytest.raises(ValueError, match="carries no embedded error"):
            run()
    else:
        run()


def test_another_depth_keeps_the_total_time(name):
    flow = flow_of(name, total_time=0.1)
    deeper, coarser = flow.at_depth(6), flow.at_depth(2)
    assert deeper.total_time == pytest.approx(0.1)
    assert coarser.depth == 2
    x = IMAGES
    near = same(lambda: deeper(x)) - same(lambda: flow(x))
    # one draws, one forgets by blocks and not by time, and one reads every other block of a few that differ
    if name not in ("noisy", "momentum", "two_step_midpoint"):
        assert near.norm() < 0.5 * (flow(x) - x).norm()


@pytest.mark.parametrize("name", MEMORIES)
def test_what_takes_steps_one_by_one_refuses_a_memory(name):
    flow = flow_of(name)
    with pytest.raises(ValueError, match="whose steps read more than the state before them"):
        flow.at_depth(2, inputs=[IMAGES])


def test_it_is_evaluated_as_often_as_it_says(name):
    counted = []

    class Field(nn.Module):
        def forward(self, t, x):
            counted.append(t)
            return torch.tanh(x)

    flow = odenets.Flow(Field, solver=name, depth=3)
    flow.eval()(IMAGES)
    assert len(counted) == flow.evaluations or (SCHEMES[name].iterates and len(counted) > flow.evaluations)


def test_fields_take_what_conditions_them(name):
    class Field(nn.Module):
        def forward(self, t, x, c):
            return torch.tanh(x + c)

    flow = odenets.Flow(Field, solver=name, depth=2).eval()
    one, other = (same(lambda: flow(IMAGES, c)) for c in (0.0, 0.5))  # noqa: B023 - called here
    assert not torch.equal(one, other)
    with pytest.raises(TypeError, match=r"missing|takes"):
        flow(IMAGES)


def test_a_field_of_another_shape_is_refused(name):
    class Narrow(nn.Module):
        def forward(self, t, x):
            return x[:1]

    with pytest.raises(ValueError, match="field must keep the shape of x"):
        odenets.Flow(Narrow, solver=name, depth=2).eval()(IMAGES)


def test_one_input_makes_the_fields(name):
    """An optimizer may be built before."""
    flow = odenets.Flow(solver=name, depth=2)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    flow(IMAGES).square().mean().backward()
    before = [p.clone() for p in flow.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))


@pytest.mark.parametrize("stage_fields", ["untied", "chained"])
def test_stage_fields_are_its_own(name, stage_fields):
    with pytest.raises(ValueError, match="stage_fields must be 'tied' with"):
        odenets.Flow(odenets.MLPField(4), solver=name, stage_fields=stage_fields)


def test_a_neural_ode_takes_no_scheme(name):
    with pytest.raises(TypeError, match=r"a scheme for the blocks of an odenets\.Flow"):
        odenets.NeuralODE(odenets.MLPField(4), solver=name, steps=3)
    with pytest.raises(TypeError, match=r"a scheme for the blocks of an odenets\.Flow"):
        integrate(odenets.MLPField(4), torch.ones(1, 4), 0.0, 1.0, solver=SCHEMES[name], steps=3)


OPERATIONS = {
    "lm": (2, "v - k r, x + h r"),
    "ab2": (2, "x + 1.5 h v - 0.5 h v"),
    "poly2": (2, "v + h v, x + h r"),
    "mpoly2": (2, "v + h w, x + h r"),
    "two_way": (2, "v + w, x + h r"),
    "lie_trotter": (3, "y = x + h v, r = v + w, x + h r"),
    "strang": (6, "of three steps, two of half h, and their sum"),
    "stochastic_depth": (2, "p v, x + h r"),
    "noisy": (3, "n, v + s n, x + h r"),
}
"""Tensor operations of a block outside its fields."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_block_costs_what_its_formula_needs(name):
    class Field(nn.Module):
        def forward(self, t, x):
            return x

    totals = []
    for depth in (2, 3):
        flow = odenets.Flow(Field, solver=name, depth=depth, h=0.5).eval()
        with torch.no_grad(), Operations() as operations:
            flow(IMAGES)
        totals.append(operations.total)
    assert totals[1] - totals[0] == OPERATIONS[name][0], OPERATIONS[name][1]


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_it_trains_in_data_parallel_as_alone(process_group, name):
    """Which waits for the gradients of all parameters."""
    x, y = torch.randn(4, 3, 6, 6), torch.arange(4)
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow_of(name), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
    network(x)  # makes the parameters that come with the first state
    alone = copy.deepcopy(network)
    wrapped = nn.parallel.DistributedDataParallel(Recording(network, LeastAction().measures))
    for one in (wrapped, alone):
        objective, optimizer = LeastAction(), torch.optim.SGD(one.parameters(), lr=0.01)
        for seed in range(2):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            objective(one, x, y).backward()
            optimizer.step()
    for own, other in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_its_trajectories_are_features_of_a_detector(name):
    flow, head = flow_of(name, total_time=0.3), nn.Sequential(nn.Flatten(), nn.Linear(144, 5))
    network = odenets.Network(nn.Conv2d(3, 4, 1), flow, head).eval()
    images = torch.rand(40, 3, 6, 6)
    pipeline = Pipeline(network, Trajectory("action"), QuantileTest(0.1)).fit(images)
    assert pipeline.predict(images).mean() < 0.3
