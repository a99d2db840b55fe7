"""States at chosen times: ``integrate(at=...)``."""

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

from solvers import MaxStepsError, Tolerance, integrate
from tests.counting import Counted
from tests.solvers.problems import CONTROLS, EACH, TIMES, X0, D, Net, close, growth, lotka, rounding

FINE = {"tolerance": Tolerance(1e-9, 1e-10)}


def scipy_states(field, start, span, times):
    numpy_field = lambda t, y: field(t, torch.from_numpy(y)[None])[0].numpy()  # noqa: E731
    solution = solve_ivp(numpy_field, span, start.numpy(), t_eval=times, rtol=1e-11, atol=1e-12)
    return torch.from_numpy(solution.y.T)


@cache
def lotka_by_scipy(t0, t1):
    at = sorted(set(TIMES), reverse=t1 < t0)
    return torch.stack([scipy_states(lotka, x, (t0, t1), at) for x in X0], 1)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["bs23", "dopri5", "tsit5", "dopri8"])
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.9), (2.9, 0.0)])
def test_states_are_those_of_scipy_at_its_t_eval(control, solver, t0, t1):
    at = sorted(set(TIMES), reverse=t1 < t0)
    tolerance = Tolerance(1e-6, 1e-8)
    solution = integrate(lotka, X0, t0, t1, solver=solver, at=at, tolerance=tolerance, **control)
    assert solution.times.tolist() == at
    torch.testing.assert_close(solution.states, lotka_by_scipy(t0, t1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("solver", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4")])
def test_states_at_the_ends_of_fixed_steps_equal_torchdiffeq(solver, theirs):
    at = torch.linspace(0, 2, 9, dtype=D)
    expected = torchdiffeq.odeint(lambda t, x: growth(t, x), X0, at, method=theirs)
    solution = integrate(growth, X0, 0.0, 2.0, solver=solver, steps=8, at=at)
    rounding(solution.states, expected)
    assert solution.stats.evaluations == 8 * len({"euler": "1", "midpoint": "12", "rk4_38": "1234"}[solver])


@pytest.mark.parametrize(("solver", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4")])
def test_states_inside_fixed_steps_equal_the_cubic_ones_of_torchdiffeq(solver, theirs):
    at = torch.tensor([0.0, 0.1, 0.3, 1.9, 2.0], dtype=D)
    options = {"step_size": 0.25, "interp": "cubic"}
    expected = torchdiffeq.odeint(lambda t, x: growth(t, x), X0, at, method=theirs, options=options)
    rounding(integrate(growth, X0, 0.0, 2.0, solver=solver, steps=8, at=at).states, expected)


@pytest.mark.parametrize("options", [{"steps": 7}, *CONTROLS])
@pytest.mark.parametrize("solver", ["heun", "bs23", "dopri5"])
def test_states_are_those_of_the_interpolant(options, solver):
    whole = integrate(growth, X0, 0.0, 2.9, solver=solver, keep="steps", **options)
    solution = integrate(growth, X0, 0.0, 2.9, solver=solver, at=TIMES, **options)
    rounding(solution.states, whole(torch.tensor(TIMES, dtype=D)))
    assert torch.equal(solution.x1, whole.x1)
    assert torch.as_tensor(solution.t1).eq(2.9).all()


@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_each_sample_has_its_own_times(solver):
    solution = integrate(growth, X0, 0.0, 3.0, solver=solver, at=EACH, control="sample", **FINE)
    assert solution.times.tolist() == EACH
    assert solution.states.shape == (3, 3, 2)
    close(solution.states, X0[:, None] * (solution.times**2 / 2).exp()[..., None])


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_each_sample_is_solved_as_if_it_were_alone(gradient):
    x0 = X0.clone().requires_grad_()
    ends = [2.9, 0.4, 3.0]
    solve = partial(integrate, lotka, t0=0.0, control="sample", gradient=gradient)
    together = solve(x0=x0, t1=ends, at=EACH)
    alone = [solve(x0=x0[i : i + 1], t1=ends[i], at=[EACH[i]]) for i in range(3)]
    rounding(together.states, torch.cat([one.states for one in alone]))
    (expected,) = torch.autograd.grad(sum(one.states.sin().sum() for one in alone), x0)
    rounding(torch.autograd.grad(together.states.sin().sum(), x0)[0], expected)


@pytest.mark.parametrize("control", CONTROLS)
def test_the_steps_are_those_taken_without_output_times(control):
    with_outputs = integrate(lotka, X0, 0.0, 2.9, at=TIMES, **control)
    without = integrate(lotka, X0, 0.0, 2.9, **control)
    assert with_outputs.stats == without.stats
    assert torch.equal(with_outputs.x1, without.x1)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("solver", ["heun", "bs23"])
def test_every_field_call_is_counted(control, solver):
    field = Counted(growth)
    solution = integrate(field, X0, 0.0, 2.9, solver=solver, at=TIMES, **control)
    assert solution.stats.evaluations == field.calls


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("solver", ["rk4", "bs23", "dopri5"])
def test_every_field_call_of_fixed_steps_is_counted(gradient, solver):
    field = Counted(Net())
    solution = integrate(field, X0, 0.0, 2.9, solver=solver, steps=5, at=TIMES, gradient=gradient)
    assert solution.stats.evaluations == field.calls


@pytest.mark.parametrize("control", CONTROLS)
def test_steps_are_kept_beside_the_outputs(control):
    solution = integrate(lotka, X0, 0.0, 2.9, at=TIMES, keep="steps", **control)
    assert len(solution.steps) == len(solution.step_times) - 1
    rounding(solution(torch.tensor(TIMES, dtype=D)), solution.states)


@pytest.mark.parametrize("options", [{"steps": 3}, *CONTROLS])
def test_trees_give_trees_of_tensors(options):
    tree = {"a": X0, "b": X0[:, 0]}
    field = lambda t, x: {"a": -x["a"], "b": x["b"]}  # noqa: E731
    packed = integrate(field, tree, 0.0, 1.0, at=[0.2, 1.0], **options)
    assert packed.states["a"].shape == (2, 3, 2)
    assert packed.states["b"].shape == (2, 3)
    torch.testing.assert_close(packed.states["b"][1], packed.x1["b"], rtol=0, atol=0)
    close(packed.states["b"][1], X0[:, 0] * math.e, rtol=1e-2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_states_without_batch_get_a_first_dimension(shape):
    x0 = torch.ones(shape, dtype=D)
    solution = integrate(growth, x0, 0.0, 1.0, at=[0.5, 0.6], **FINE)
    assert solution.states.shape == (2, *shape)
    close(solution.states, x0 * (solution.times.reshape(2, *[1] * len(shape)) ** 2 / 2).exp())


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_states_keep_their_dtype(control, dtype):
    states = integrate(lambda t, x: -x, X0.to(dtype), 0.0, 1.0, at=[0.5, 1.0], **control).states
    assert states.dtype == dtype
    torch.testing.assert_close(states[0].to(torch.complex128).real, X0 * math.exp(-0.5), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("at", "dtype"),
    [
        (np.linspace(0, 1, 3), D), ([0, 1], D), ((0.5,), D), (torch.tensor([0, 1]), D),
        (torch.tensor([0.3]), torch.float32),
        (np.array([0.3], dtype=np.float32), D), ([np.float32(0.5), torch.tensor(1.0)], D),
    ],
)  # fmt: skip
@pytest.mark.parametrize("control", CONTROLS)
def test_times_are_numbers_of_any_kind(at, dtype, control):
    times = integrate(growth, X0, 0.0, 1.0, at=at, **control).times
    assert times.dtype == dtype
    assert times.tolist() == [float(t) for t in at]


@pytest.mark.parametrize("control", CONTROLS)
def test_times_outside_by_their_rounding_are_the_ends(control):
    at = torch.tensor([0.1, 0.3], dtype=torch.float32)  # beyond, in float64
    solution = integrate(growth, X0, 0.1 + 2e-9, 0.3, at=at, **control)
    assert torch.equal(solution.states[0], X0)
    assert torch.equal(solution.states[1], solution.x1)


def falling(t, x):
    return -torch.ones_like(x)


def below_zero(t, x):
    return x.amin()


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "backsolve"])
@pytest.mark.parametrize("options", [{"steps": 3}, {}])
def test_states_behind_an_event_are_nan(gradient, options):
    x0 = torch.tensor([[1.0], [0.5]], dtype=D, requires_grad=True)
    more = {"parameters": ()} if gradient == "backsolve" else {}
    solution = integrate(
        falling, x0, 0.0, 3.0, at=[0.0, 0.25, 0.5 - 1e-9, 0.5 + 1e-9, 2.0], event=below_zero, gradient=gradient, **more,
        **options,
    )  # fmt: skip
    assert solution.status == "event"
    close(solution.event_time, torch.tensor(0.5, dtype=D))
    assert solution.states.isnan().flatten(1).all(1).tolist() == [False, False, False, True, True]
    close(solution.states[:3], x0 - solution.times[:3, None, None])
    reached = solution.states[~solution.states.isnan()].sum() + solution.event_time
    close(torch.autograd.grad(reached, x0)[0], torch.tensor([[3.0], [4.0]], dtype=D))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_each_sample_has_states_up_to_its_own_event(gradient):
    x0 = torch.tensor([[1.0], [0.5], [9.0]], dtype=D, requires_grad=True)
    at = torch.tensor([0.0, 0.4, 0.75, 1.5], dtype=D)
    each = {"event": lambda t, x: x[:, 0], "control": "sample", "gradient": gradient}
    solution = integrate(falling, x0, 0.0, 2.0, at=at, **each)
    assert solution.status == ("event", "event", "finished")
    expected = x0 - at
    reached = expected > 0
    assert torch.equal(solution.states[..., 0].T.isnan(), ~reached)
    close(solution.states[..., 0].T[reached], expected[reached])
    (slope,) = torch.autograd.grad(solution.states.nan_to_num(0).sum(), x0)
    close(slope[:, 0], reached.sum(1).to(D))


@pytest.mark.parametrize("control", CONTROLS)
def test_an_event_at_the_start_leaves_the_states_there(control):
    event = (lambda t, x: x[:, 0]) if control else below_zero
    solution = integrate(falling, torch.zeros(2, 1, dtype=D), 0.0, 1.0, at=[0.0, 0.5], event=event, **control)
    assert solution.states[0].eq(0).all()
    assert solution.states[1].isnan().all()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_states_that_a_solve_does_not_reach_are_nan(control, gradient):
    options = {"at": [0.0, 0.001, 2.9], "gradient": gradient, **control}
    options["tolerance"] = Tolerance(1e-9, 1e-9, max_steps=30)
    x0 = X0.clone().requires_grad_()
    with pytest.raises(MaxStepsError) as raised:
        integrate(lotka, x0, 0.0, 2.9, **options)
    returned = integrate(lotka, x0, 0.0, 2.9, on_limit="return", **options)
    for solution in (raised.value.solution, returned):
        assert solution.states.isnan().flatten(1).all(1).tolist() == [False, False, True]
        assert torch.as_tensor(solution.t1).lt(2.9).all()
        assert solution.x1.isfinite().all()


@pytest.mark.parametrize(("solver", "gradient"), [("bs23", "direct"), ("rk4", "checkpoint")])
def test_output_times_of_fixed_steps_compile_to_one_graph(solver, gradient):
    net = Net()

    def solve(x):
        solution = integrate(net, x, 0.0, 1.0, solver=solver, steps=4, at=[0.0, 0.3, 0.5, 1.0], gradient=gradient)
        return solution.states, solution.times, solution.x1

    compiled = torch.compile(solve, fullgraph=True, backend="aot_eager")
    x, y = X0.clone().requires_grad_(), X0.clone().requires_grad_()
    torch.testing.assert_close(compiled(x), solve(y))
    compiled(x)[0].sum().backward()
    solve(y)[0].sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 does not pass on what an error says")
@pytest.mark.parametrize("at", [torch.tensor([0.5]), [1]])
def test_a_graph_takes_floats_alone(at):
    solve = lambda x: integrate(growth, x, 0.0, 1.0, steps=2, at=at).states  # noqa: E731
    with pytest.raises(Exception, match=r"at must be a list of floats under torch\.compile"):  # dynamo wraps it
        torch.compile(solve, fullgraph=True, backend="eager")(X0)


def test_output_times_under_transforms_of_torch_func():
    solve = lambda x: integrate(growth, x, 0.0, 1.0, solver="bs23", steps=3, at=[0.2, 1.0]).states  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(solve, out_dims=1)(X0), solve(X0))
    slope = torch.func.jacrev(solve)(X0[0])
    torch.testing.assert_close(slope, torch.func.jacfwd(solve)(X0[0]))


def test_gradients_of_times_under_torch_func():
    at = torch.tensor([0.2, 0.9], dtype=D)
    solve = lambda at: integrate(growth, X0, 0.0, 1.0, solver="bs23", steps=3, at=at).states  # noqa: E731
    slope = torch.func.jacrev(solve)(at).diagonal(dim1=0, dim2=3)
    torch.testing.assert_close(slope.movedim(-1, 0), at[:, None, None] * solve(at), rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match=r"at must not be mapped by torch\.vmap"):
        torch.func.vmap(solve)(at[None])


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_states_in_float32_per_sample_are_exact_to_rounding(solver):
    at = torch.linspace(0, 1, 64).expand(3, 64)
    options = {"solver": solver, "control": "sample", "tolerance": Tolerance(1e-2, 1e-2, first_step=0.5)}
    single, double = (integrate(growth, x, 0.0, 1.0, at=at, **options).states for x in (X0.float(), X0))
    torch.testing.assert_close(single.double(), double, rtol=5e-7, atol=5e-7)
