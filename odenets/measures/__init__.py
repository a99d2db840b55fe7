"""Measures on a solver step: values that map a :class:`~solvers.Step` to one number per sample, ``(B,)``.

``record`` of a network takes them by name, and returns each of every block and sample, ``(blocks, B)``:

>>> import torch, odenets
>>> from odenets.measures import action, cosine, displacement, error, measure, residue, square_norm
>>> flow = odenets.Flow(solver="bs23", depth=2)
>>> x1, records = flow.record(torch.randn(4, 3), action=action, error=error, length=displacement)
>>> records["action"].shape
torch.Size([2, 4])

Any function ``Step -> (B,)`` is a measure. One that :func:`measure` marks says besides what it reads, so that a step
evaluates no stage and makes no pass over memory that nobody needs; it is frozen, it can be compared, pickled and
composed, and options are bound to it:

>>> @measure(closing=False)
... def peak(step):
...     return step.x1.abs().amax(1)
>>> x1, records = flow.record(torch.randn(4, 3), cubic=action.bind(p=3), both=action + 0.1 * error, peak=peak)
>>> records["cubic"].shape, records["peak"].shape
(torch.Size([2, 4]), torch.Size([2, 4]))
>>> peak.closing, (action + error).closing, action.bind(p=3) == action.bind(p=3)
(False, True, True)

A measure is called on a step as well, where one has steps:

>>> step = next(iter(flow.steps(torch.randn(4, 3))))
>>> torch.allclose(square_norm(step), 3 * residue(step)), bool((cosine(step).abs() <= 1).all())
(True, True)
"""

from odenets.measures.marking import (
    Measure,
    StepFunction,
    integrand_of,
    measure,
    needs_closing,
    reductions_of,
)
from odenets.measures.quantities import (
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
    "action",
    "cosine",
    "displacement",
    "error",
    "integrand_of",
    "measure",
    "needs_closing",
    "reductions_of",
    "residue",
    "square_norm",
    "step_size",
    "wide_residue",
]
