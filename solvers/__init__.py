"""Explicit Runge-Kutta methods on tensors: tableau, step, controllers, integrate."""

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
from solvers.errors import MaxStepsError, NonFiniteError, SolverError, Status, StepUnderflowError
from solvers.integrate import integrate
from solvers.interpolation import Interpolant, SampleInterpolant
from solvers.methods import get_tableau
from solvers.reductions import combine, finish_step
from solvers.solution import SampleSolution, SampleStatistics, Solution, Statistics
from solvers.step import Field, Step, rk_step
from solvers.tableaus import ButcherTableau, Embedded, Row
from solvers.tolerance import Tolerance
from solvers.torchdiffeq.adjoint import odeint_adjoint
from solvers.torchdiffeq.odeint import odeint, odeint_event

__all__ = [
    "PI", "PID", "ButcherTableau", "Controller", "ControllerState", "Embedded", "Field", "Fixed", "HalveDouble", "I",
    "Interpolant", "MaxStepsError", "NonFiniteError", "Row", "SampleController", "SampleInterpolant", "SampleSolution",
    "SampleStates", "SampleStatistics", "Solution", "SolverError", "Statistics", "Status", "Step", "StepUnderflowError",
    "Tolerance", "combine", "finish_step", "get_tableau", "integrate", "odeint", "odeint_adjoint", "odeint_event",
    "rk_step",
]  # fmt: skip
