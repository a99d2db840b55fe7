"""One tester for every measure: what each must be, whoever wrote it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from odenets.measures import StepFunction, needs_closing, reductions_of
from solvers import Step, get_tableau, rk_step

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LARGE = (4, 6000)  # what the operators of solvers.reductions take
SHAPES = [(5, 6), (1, 6), (4, 1), (0, 6), (3, 2, 4, 4), LARGE]


@dataclass
class Exact:
    """A step in float64, whose features are one dimension, to write a definition with."""

    x0: Tensor
    x1: Tensor
    stages: Tensor  # (stages, B, D)
    h: Tensor  # (B,)
    b: Tensor  # (stages,)
    weights: Tensor  # of the embedded error, (stages,)

    @classmethod
    def of(cls, step: Step) -> "Exact":
        rows = [x.double().flatten(1) for x in (step.x0, step.x1, *step.stages)]
        h = torch.as_tensor(step.h, dtype=torch.float64, device=rows[0].device)
        h = h.reshape(-1).expand(len(rows[0]))
        b, weights = (h.new_tensor(w)[: len(step.stages)] for w in (step.tableau.b, step.tableau.error_weights))
        return cls(rows[0], rows[1], torch.stack(rows[2:]), h, b, weights)

    @property
    def residue(self) -> Tensor:
        return torch.einsum("s,sbd->bd", self.b, self.stages)

    @property
    def error(self) -> Tensor:
        return self.h[:, None] * torch.einsum("s,sbd->bd", self.weights, self.stages)

    def integral(self, values: Tensor) -> Tensor:
        """Of the mean over the features of what is there at each stage, ``(stages, B, D)``."""
        return self.h * torch.einsum("s,sb->b", self.b, values.mean(2))

    def action(self, p: float = 2.0) -> Tensor:
        return self.integral(self.stages.abs().pow(p))


def root_mean_square(r: Tensor) -> Tensor:
    return r.square().mean(1).sqrt()


def cosine(r: Tensor, way: Tensor | None = None) -> Tensor:
    """With a vector, that of the ones if not given."""
    way = torch.ones_like(r) if way is None else way.expand_as(r)
    return torch.nn.functional.cosine_similarity(r, way, dim=1, eps=0)


class Case(NamedTuple):
    """A measure, and its definition, of a step in float64."""

    measure: StepFunction
    definition: Callable[[Exact], Tensor]


def tensors(shape, dtype=torch.float64, device="cpu", scale=1.0, number=5):
    """States and stages: x0 and those of a method of four stages."""
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype) for _ in range(number)]


def step_of(x0, *stages, h=0.25, solver="bs23", closing=True):
    """The step with these stages."""
    tableau = get_tableau(solver)
    stages = stages[: tableau.stages if closing else tableau.interior]
    weighted = sum(b * p.double() for b, p in zip(tableau.b, stages, strict=False))
    return Step(0.0, h, x0, (x0.double() + h * weighted).to(x0.dtype), stages, tableau)


def sizes(shape, dtype=torch.float64):
    """A step size for each sample."""
    return torch.linspace(0.1, 0.7, shape[0], dtype=dtype).reshape(-1, *(1 for _ in shape[1:]))


def layouts(shape):
    """Four-dimensional states that do not lie in memory one number after the other."""
    b, c, height, width = shape
    return {
        "channels last": [x.to(memory_format=torch.channels_last) for x in tensors(shape)],
        "transposed": [x.transpose(1, 3) for x in tensors((b, width, height, c))],
        "every second": [x[::2, :, ::2] for x in tensors((2 * b, c, 2 * height, width))],
        "expanded": [x.expand(shape) for x in tensors((1, c, 1, width))],
    }


def close(value, expected, dtype=torch.float64, **more):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(value.double(), expected, check_device=False, **(tolerance | more))


class MeasureTester:
    """``@pytest.mark.parametrize("case", ...)`` over a subclass runs each :class:`Case` through all of these."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_value_is_the_definition_in_float32_or_wider(self, case, dtype):
        """Squares of these states are beyond float16."""
        wide = torch.promote_types(dtype, torch.float32)
        for shape, own in product(SHAPES, [False, True]):
            step = step_of(*tensors(shape, dtype, scale=300.0), h=sizes(shape, wide) if own else 0.25)
            value = case.measure(step)
            assert value.dtype == wide
            assert value.shape == shape[:1]
            close(value, case.definition(Exact.of(step)), dtype)

    @pytest.mark.parametrize("layout", ["channels last", "transposed", "every second", "expanded"])
    def test_value_does_not_hang_on_the_layout(self, case, layout):
        for shape in ((3, 2, 4, 4), (3, 8, 32, 32)):
            step = step_of(*layouts(shape)[layout])
            close(case.measure(step), case.definition(Exact.of(step)))

    def test_gradient_is_that_of_the_definition(self, case):
        """By x0, the stages and the step sizes."""
        for shape in ((5, 6), (4, 1), (3, 2, 4, 4), LARGE):
            given = [*tensors(shape), sizes(shape)]
            gradients = []
            for function in (case.measure, lambda step: case.definition(Exact.of(step))):
                leaves = [x.clone().requires_grad_() for x in given]
                value = function(step_of(*leaves[:-1], h=leaves[-1]))
                weights = torch.arange(1.0, 1 + len(value), dtype=torch.float64)
                gradients.append(torch.autograd.grad(value, leaves, weights, materialize_grads=True))
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)

    def test_gradient_is_that_of_differences(self, case):
        """The first and second, and the first in forward mode."""
        leaves = [x.requires_grad_() for x in (*tensors((2, 3)), sizes((2, 3)))]

        def measured(*leaves):
            return case.measure(step_of(*leaves[:-1], h=leaves[-1]))

        assert torch.autograd.gradcheck(measured, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(measured, leaves)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
    def test_at_rest_it_has_finite_gradients(self, case, dtype):
        """A norm has none at zero (pytorch#2421)."""
        for shape in ((5, 6), LARGE):
            leaves = [torch.zeros(shape, dtype=dtype, requires_grad=True) for _ in range(5)]
            value = case.measure(step_of(*leaves))
            assert value.isfinite().all()
            (gradients,) = gradients_of([value], leaves)
            assert all(gradient.isfinite().all() for gradient in gradients)

    def test_a_sample_has_its_own_measure(self, case):
        for shape in ((5, 6), LARGE):
            step = step_of(*tensors(shape), h=sizes(shape))
            value = case.measure(step)
            for i in range(len(value)):
                close(case.measure(step.select(torch.tensor([i]))), value[i : i + 1])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_sample_that_diverges_is_seen_and_leaves_the_others_alone(self, case, bad):
        for shape in ((5, 6), LARGE):
            given = tensors(shape)
            before = case.measure(step_of(*given))
            for x in given:
                x[1, 0] = bad
            value = case.measure(step_of(*given))
            assert not value[1].isfinite()
            others = torch.arange(len(value)) != 1
            close(value[others], before[others])

    @pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "bs23"])
    def test_what_a_step_computes_with_its_state_is_what_is_measured_after(self, case, solver):
        tableau = get_tableau(solver)
        if solver in ("euler", "rk4") and not _is_measured(case, solver):
            pytest.skip(f"{solver} has no such numbers")
        for shape, own in product([(5, 6), LARGE], [False, True]):
            leaves, h = [x.requires_grad_() for x in tensors(shape)], sizes(shape) if own else 0.25
            fields = [lambda t, x, p=p: p for p in leaves[1 : 1 + tableau.stages]]
            step = rk_step(fields, 0.0, leaves[0], h, tableau, reductions=reductions_of([case.measure]))
            value, after = case.measure(step), case.measure(step._replace(reductions=None))
            close(value, after)
            torch.testing.assert_close(*gradients_of([value, after], leaves), rtol=1e-8, atol=1e-10)

    def test_a_closing_stage_that_is_said_not_to_be_read_is_not_read(self, case):
        given = tensors((5, 6))
        if needs_closing(case.measure):
            with pytest.raises(ValueError, match="closing stage"):
                case.measure(step_of(*given, closing=False))
        else:
            close(case.measure(step_of(*given, closing=False)), case.measure(step_of(*given)))

    def test_an_integrand_is_what_is_integrated(self, case):
        integrand = getattr(case.measure, "integrand", None)
        if integrand is None:
            pytest.skip("it is no integral over time")
        x0, v, *_ = tensors((5, 6))
        value = integrand(v, **dict(case.measure.options))
        close(case.measure(step_of(x0, v, v, v, v, h=0.25)), 0.25 * value)

    def test_it_can_be_vectorized(self, case):
        """Values and gradients of several steps at once, and a jacobian."""
        steps = [tensors((5, 6)) for _ in range(3)]
        given = [torch.stack(each) for each in zip(*steps, strict=True)]

        def measured(*tensors):
            return case.measure(step_of(*tensors))

        close(torch.vmap(measured)(*given), torch.stack([measured(*one) for one in steps]))
        gradient = torch.func.grad(lambda *one: measured(*one).sum(), argnums=tuple(range(5)))
        alone = zip(*(gradient(*one) for one in steps), strict=True)
        for ours, theirs in zip(torch.vmap(gradient)(*given), alone, strict=True):
            close(ours, torch.stack(theirs))
        x0, p, *others = steps[0]
        jacobian = torch.func.jacrev(lambda p: measured(x0, p, *others))(p)
        close(jacobian, torch.autograd.functional.jacobian(lambda p: measured(x0, p, *others), p))

    def test_it_is_measured_on_the_meta_device(self, case):
        for shape in ((5, 6), LARGE):
            value = case.measure(step_of(*tensors(shape, torch.bfloat16, "meta")))
            assert (value.device.type, value.shape, value.dtype) == ("meta", shape[:1], torch.float32)

    def test_autocast_does_not_narrow_it(self, case):
        step = step_of(*tensors((5, 6), torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            value = case.measure(step)
        assert value.dtype == torch.float32
        close(value, case.definition(Exact.of(step)), torch.float32)

    @pytest.mark.gpu
    def test_value_and_gradient_on_a_gpu(self, case):
        for dtype, shape in product(DTYPES, [(5, 6), (0, 6), (3, 8, 32, 32), LARGE]):
            leaves = [x.requires_grad_() for x in tensors(shape, dtype, "cuda")]
            step = step_of(*leaves)
            value, expected = case.measure(step), case.definition(Exact.of(step))
            assert value.device.type == "cuda"
            close(value, expected, dtype)
            rtol = max(1e-4, 4 * torch.finfo(dtype).eps)
            torch.testing.assert_close(*gradients_of([value, expected], leaves), rtol=rtol, atol=rtol)


def gradients_of(values, leaves):
    """By each leaf of the sum of each value."""
    return [torch.autograd.grad(one.sum(), leaves, retain_graph=True, materialize_grads=True) for one in values]


def _is_measured(case, solver):
    try:
        case.measure(step_of(*tensors((2, 3)), solver=solver))
    except (ValueError, IndexError):
        return False
    return True
