"""What implicit methods refuse, and where they cannot go on."""

import math

import pytest
import torch

from odenets import Flow, MLPField, NeuralODE
from solvers import NewtonError, RootFinder, RosenbrockTableau, Tolerance, get_tableau, integrate
from solvers.implicit.linear import conjugate_residuals, jacobian
from tests.solvers.problems import X0, D, decay, lotka


def test_a_singular_matrix_says_so_and_keeps_what_stands():
    with pytest.raises(NewtonError, match="matrix is singular") as caught:  # I - h J = 0
        integrate(lambda t, x: torch.where(x > 2, 4.0 * x, 1.0), torch.full((2, 1), 1.9), 0.0, 1.0,
                  solver="implicit_euler", steps=4)  # fmt: skip
    assert caught.value.status == "newton"
    assert caught.value.sample == 0
    assert caught.value.solution.t1 == caught.value.t


def test_steps_whose_stages_are_not_found_are_rejected_and_then_named():
    def wild(t, x):  # no iteration converges beyond t = 1
        return -x if t < 1 else torch.where(torch.frac(x * 1e9) > 0.5, 1e12, -1e12).to(x)

    tolerance = Tolerance(1e-6, 1e-9, max_steps=400)
    with pytest.raises(NewtonError, match="does not converge"):
        integrate(wild, torch.ones(1, 1, dtype=D), 0.0, 2.0, solver="kvaerno5", tolerance=tolerance)
    solution = integrate(
        wild, torch.ones(1, 1, dtype=D), 0.0, 2.0, solver="kvaerno5", tolerance=tolerance, on_limit="return"
    )
    assert solution.status == "newton"
    assert 0.9 < solution.t1 <= 1
    assert solution.stats.rejected > 0


def test_one_sample_that_fails_lets_the_others_go_on():
    rates = torch.tensor([[1.0], [2.0]], dtype=D)

    def wild(t, x):
        return torch.where((rates > 1) & (t > 0.5), torch.where(torch.frac(x * 1e9) > 0.5, 1e12, -1e12), -x)

    solution = integrate(
        wild, torch.ones(2, 1, dtype=D), 0.0, 1.0, solver="kvaerno5", control="sample", on_limit="return",
        tolerance=Tolerance(1e-7, 1e-10),
    )  # fmt: skip
    assert solution.status[0] == "finished"
    assert solution.status[1] in ("newton", "underflow")
    assert solution.x1[0].item() == pytest.approx(torch.exp(torch.tensor(-1.0)).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_narrow_and_complex_states_are_refused(dtype):
    with pytest.raises(TypeError, match="finds its stages in float32 or float64, got torch"):
        integrate(decay, torch.ones(1, 1).to(dtype), 0.0, 1.0, solver="trapezoid", steps=2)


@pytest.mark.parametrize("name", ["implicit_euler", "trapezoid", "implicit_midpoint"])
def test_error_control_needs_an_embedded_error(name):
    with pytest.raises(ValueError, match=f"{name} carries no embedded error.*take steps=n.*kvaerno5"):
        integrate(decay, X0, 0.0, 1.0, solver=name)


def test_graphs_and_transforms_are_refused():
    with pytest.raises(ValueError, match="graph=True takes explicit methods, got kvaerno5"):
        integrate(decay, X0, 0.0, 1.0, solver="kvaerno5", graph=True, keep="last")
    auto = integrate(decay, X0, 0.0, 1.0, solver="kvaerno5", graph="auto", keep="last")
    torch.testing.assert_close(auto.x1, integrate(decay, X0, 0.0, 1.0, solver="kvaerno5").x1)
    with pytest.raises(RuntimeError, match=r"torch\.func do not see"):
        torch.func.jacrev(lambda x: integrate(decay, x, 0.0, 1.0, solver="trapezoid", steps=2).x1)(X0)


@pytest.mark.parametrize("arguments", [{"method": "broyden"}, {"tolerance": 2.0}, {"max_iterations": 0}])
def test_root_finders_check_their_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RootFinder(**arguments)
    with pytest.raises(ValueError, match="explicit"):
        get_tableau("rk4").solved_by(RootFinder())
    with pytest.raises(TypeError, match="RootFinder"):
        get_tableau("trapezoid").solved_by("newton")


@pytest.mark.parametrize("name", ["bs23", "dopri5"])
def test_errors_of_explicit_methods_name_the_implicit_one(name):
    with pytest.raises(RuntimeError, match="stiff, solver='rodas4' or 'kvaerno5'"):
        integrate(lambda t, x: -1e6 * x, X0, 0.0, 10.0, solver=name, tolerance=Tolerance(max_steps=50))


@pytest.mark.parametrize("name", ["Radau", "BDF", "LSODA", "crank_nicolson", "KenCarp4"])
def test_names_of_other_libraries_lead_here(name):
    with pytest.raises(ValueError, match=r"unknown solver.*take '(rodas4' or 'kvaerno5|trapezoid)'"):
        integrate(decay, X0, 0.0, 1.0, solver=name)


def test_inference_mode_and_no_grad_agree():
    with torch.inference_mode():
        inside = integrate(lotka, X0, 0.0, 1.0, solver="kvaerno5").x1
    with torch.no_grad():
        torch.testing.assert_close(inside.clone(), integrate(lotka, X0, 0.0, 1.0, solver="kvaerno5").x1)


def test_a_vector_is_one_sample():
    x0 = torch.tensor([1.0, 0.5], dtype=D)
    alone = integrate(lotka, x0, 0.0, 1.0, solver="kvaerno5").x1
    torch.testing.assert_close(alone, integrate(lotka, x0[None], 0.0, 1.0, solver="kvaerno5").x1[0])


def test_jacobians_are_those_of_autograd():
    matrices = jacobian(lotka, 0.0, X0)
    for i, x in enumerate(X0):
        torch.testing.assert_close(matrices[i], torch.autograd.functional.jacobian(lambda x: lotka(0.0, x), x))
    assert not jacobian(lambda t, x: torch.ones_like(x), 0.0, X0).any()


def test_conjugate_residuals_solve_every_sample():
    matrices = torch.eye(5, dtype=D) * 3 + torch.randn(4, 5, 5, dtype=D) / 3
    right = torch.randn(4, 5, dtype=D)
    found, residual = conjugate_residuals(
        lambda d: torch.einsum("bij,bj->bi", matrices, d), right, lambda r: r, tolerance=1e-12, iterations=20
    )
    torch.testing.assert_close(found, torch.linalg.solve(matrices, right), rtol=1e-10, atol=1e-10)
    assert residual <= 1e-12


def test_batch_norm_in_training_mode_is_refused():
    x = torch.randn(4, 3)
    flow = Flow(MLPField(3, norm="batch"), solver="implicit_euler", depth=2)
    with pytest.raises(ValueError, match="training mode, and implicit_euler calls its field until a stage is found"):
        flow(x)
    assert flow.eval()(x).shape == x.shape
    assert Flow(MLPField(3, norm="group"), solver="implicit_euler", depth=2)(x).shape == x.shape


def test_a_field_that_depends_on_time_is_called_behind_the_end_per_sample_too():
    """A stage of kvaerno5 lies at 1.23 h: held at t1, the last step would lose its order."""
    x0, steps = (
        torch.tensor([[1.0], [0.5]], dtype=D),
        Tolerance(1e-9, 1e-9, first_step=0.25, min_step=0.25, max_step=0.25),
    )
    latest = []

    def field(t, x):
        latest.append(t.max().item())
        return -x + torch.cos(3 * t)

    one = integrate(field, x0, 0.0, 1.0, solver="kvaerno5", control="sample", tolerance=steps)
    assert max(latest) == pytest.approx(1 + 0.2303 * 0.25, abs=1e-3)
    other = integrate(decay, x0, 0.0, 1.0, solver="kvaerno5", steps=4)
    torch.testing.assert_close(one.x1, other.x1, rtol=1e-9, atol=1e-9)


def test_the_sample_whose_iteration_fails_is_named():
    rates = torch.tensor([[1.0], [1.0], [1.0], [4.0]])  # of which 1 - h J is singular
    with pytest.raises(NewtonError) as raised:
        integrate(lambda t, x: rates * x, torch.ones(4, 1), 0.0, 1.0, solver="implicit_euler", steps=4)
    assert raised.value.sample == 3


@pytest.mark.parametrize(("band", "method"), [(-1, "auto"), (1.5, "auto"), (True, "auto"), (1, "newton_krylov")])
def test_bands_that_cannot_be(band, method):
    with pytest.raises(ValueError, match=r"^band "):
        RootFinder(method, band=band)


def test_what_rodas4_refuses():
    wide = torch.ones(2, 300, dtype=D)
    with pytest.raises(ValueError, match=r"states of up to 200 features, got 300: take kvaerno5.*RootFinder\(band=n\)"):
        integrate(decay, wide, 0.0, 1.0, solver="rodas4")
    whole = get_tableau("rodas4").solved_by(RootFinder("newton"))
    x1 = integrate(lambda t, x: -x, wide, 0.0, 1.0, solver=whole, steps=4).x1
    torch.testing.assert_close(x1, torch.full_like(wide, math.exp(-1)), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"solves with its Jacobian, got RootFinder\('newton_krylov'\): take kvaerno5"):
        integrate(decay, X0, 0.0, 1.0, solver=get_tableau("rodas4").solved_by(RootFinder("newton_krylov")))
    for gradient in ("backsolve", "checkpoint"):
        with pytest.raises(
            ValueError, match=r"differentiate the Jacobian of rodas4.*take 'direct', or solver='kvaerno5'"
        ):
            NeuralODE(MLPField(2), solver="rodas4", gradient=gradient)
    with pytest.raises(ValueError, match=r"rodas4 takes one field for all its stages, as with stage_fields='tied'"):
        Flow(lambda: MLPField(2), depth=1, h=1.0, solver="rodas4", stage_fields="untied")(torch.ones(1, 2))


def test_a_singular_matrix_of_rodas4_says_so():
    with pytest.raises(NewtonError, match="matrix is singular") as caught:  # I - h J / 4 = 0
        integrate(lambda t, x: 4.0 * x, torch.ones(2, 1), 0.0, 1.0, solver="rodas4", steps=1)
    assert caught.value.sample == 0


@pytest.mark.parametrize(
    ("gamma", "message"),
    [(((0.5,), (0.1, 0.25)), "same in all rows"), (((0.5,),), "must have i"), (((0.3,), (0.0, 0.3)), "at most 1")],
)
def test_rosenbrock_tables_that_cannot_be(gamma, message):
    with pytest.raises(ValueError, match=message):
        RosenbrockTableau("mine", order=2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), gamma=gamma)


def test_a_rosenbrock_table_of_ones_own():
    g = 1 - 1 / math.sqrt(2)
    ros2 = RosenbrockTableau("ros2", 2, c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5), gamma=((g,), (-2 * g, g)))
    exact = integrate(lotka, X0, 0.0, 1.0, solver="dopri8", steps=20).x1
    errors = [(integrate(lotka, X0, 0.0, 1.0, solver=ros2, steps=n).x1 - exact).abs().max() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)
