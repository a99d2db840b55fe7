"""Runge-Kutta methods on tensors: one call, :func:`integrate`, and the parts that it is made of.

A solve takes a velocity field ``v(t, x)``, the state of a batch ``(B, *S)``, and the times between which it goes:

>>> import torch
>>> from solvers import PID, Tolerance, integrate
>>> field, x0 = lambda t, x: -x, torch.ones(4, 2)
>>> round(integrate(field, x0, 0.0, 1.0, solver="rk4", steps=10).x1[0, 0].item(), 4)
0.3679

Without ``steps`` their sizes are chosen by the error. Method, tolerance and step-size rule are arguments, and each may
be one's own: a :class:`ButcherTableau`, a :class:`Tolerance`, a :class:`Controller`.

>>> tight = Tolerance(rtol=1e-6)
>>> solution = integrate(field, x0, 0.0, 1.0, solver="dopri5", tolerance=tight, controller=PID())
>>> solution.status, solution.stats.evaluations < 50
('finished', True)

Nothing here knows of networks. :func:`odeint` and its kin take the arguments of torchdiffeq.
"""

from solvers.controllers import (
    PI,
    PID,
    Controller,
    ControllerState,
    Fixed,
    HalveDouble,
    I,
    SampleController,
    SampleStates,
)  # fmt: skip
from solvers.errors import MaxStepsError, NewtonError, NonFiniteError, SolverError, Status, StepUnderflowError
from solvers.field_calls import Field
from solvers.gradients.reversible import Reversible
from solvers.integrate import integrate
from solvers.interpolation import Interpolant, SampleInterpolant
from solvers.learned import LearnedTableau
from solvers.methods import get_tableau
from solvers.methods.rosenbrock import RosenbrockTableau
from solvers.reductions import combine, finish_step
from solvers.roots import RootFinder
from solvers.runge_kutta import rk_step
from solvers.semilinear import SemiLinear
from solvers.separable import Separable
from solvers.solution import SampleSolution, SampleStatistics, Solution, Statistics
from solvers.step import Step
from solvers.tableaus import ButcherTableau, Embedded, Row
from solvers.tolerance import Tolerance
from solvers.torchdiffeq.adjoint import odeint_adjoint
from solvers.torchdiffeq.odeint import odeint, odeint_event

__all__ = [
    "PI", "PID", "ButcherTableau", "Controller", "ControllerState", "Embedded", "Field", "Fixed", "HalveDouble", "I",
    "Interpolant", "LearnedTableau", "MaxStepsError", "NewtonError", "NonFiniteError", "Reversible", "RootFinder",
    "RosenbrockTableau", "Row", "SampleController", "SampleInterpolant", "SampleSolution", "SampleStates",
    "SampleStatistics", "SemiLinear", "Separable", "Solution", "SolverError", "Statistics", "Status", "Step",
    "StepUnderflowError", "Tolerance", "combine", "finish_step", "get_tableau", "integrate", "odeint",
    "odeint_adjoint", "odeint_event", "rk_step",
]  # fmt: skip
