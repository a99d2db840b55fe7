"""Measures on a solver step: values that map a :class:`~solvers.Step` to one number per sample, ``(B,)``.

``record`` of a network takes them by name, and returns each of every block and sample, ``(blocks, B)``:

>>> import torch, odenets
>>> from odenets.measures import action, cosine, displacement, error, measure
>>> from odenets.measures import residue, square_norm
>>> flow, x = odenets.Flow(solver="bs23", depth=2), torch.randn(4, 3)
>>> x1, records = flow.record(x, action=action, error=error, length=displacement)
>>> records["action"].shape
torch.Size([2, 4])

Any function ``Step -> (B,)`` is a measure. One that :func:`measure` marks says besides what it reads, so that a step
evaluates no stage and makes no pass over memory that nobody needs; it is frozen, it can be compared, pickled and
composed, and options are bound to it:

>>> @measure(closing=False)
... def peak(step):
...     return step.x1.abs().amax(1)
>>> both = action + 0.1 * error
>>> x1, records = flow.record(x, peak=peak, both=both, cubic=action.bind(p=3))
>>> records["cubic"].shape, records["peak"].shape
(torch.Size([2, 4]), torch.Size([2, 4]))
>>> peak.closing, both.closing, action.bind(p=3) == action.bind(p=3)
(False, True, True)

A measure is called on a step as well, where one has steps:

>>> step = next(iter(flow.steps(x)))
>>> torch.allclose(square_norm(step), 3 * residue(step)), cosine(step).shape
(True, torch.Size([4]))
"""

from odenets.measures.derivatives import jacobian
from odenets.measures.marking import (
    Measure,
    StepFunction,
    integrand_of,
    measure,
    needs_closing,
    needs_gradient,
    reductions_of,
)
from odenets.measures.quantities import (
    acceleration,
    action,
    cosine,
    displacement,
    error,
    residue,
    square_norm,
    step_size,
    wide_residue,
)

__all__ = [
    "Measure",
    "StepFunction",
    "acceleration",
    "action",
    "cosine",
    "displacement",
    "error",
    "integrand_of",
    "jacobian",
    "measure",
    "needs_closing",
    "needs_gradient",
    "reductions_of",
    "residue",
    "square_norm",
    "step_size",
    "wide_residue",
]
