"""
Your own measure, method, field, solver and controller
======================================================

You learn where your own ideas go: a measure is a function of a step, a method is an objective that
reads a measure, and a velocity field, a Runge-Kutta method and a step-size rule are each a small
class or a table of numbers. Everything else, from gradients to ``fit``, works with yours as with
those of the package.

It takes about fifteen seconds to run and twenty minutes to read. You know PyTorch; what is needed
of ODEs is explained on the way.
"""

# %%
# A measure
# ---------
#
# A network is made of steps, and a measure maps a step to one number for each sample. A step knows
# where it starts and ends (``t``, ``h``, ``x0``, ``x1``), and its *stages*: the velocities that the
# solver evaluated on the way. Any function of these will do:

import math
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import odenets
from odenets import measures
from odenets.training import Batches, Objective, Task, evaluate, fit, load
from solvers import ButcherTableau, ControllerState, Embedded, Tolerance, integrate

# %%
# The first measure below is how far a sample is from the origin after the step. The second asks how
# much its velocity changes within the step, from the first stage to the third: ``h`` times the mean
# square of the acceleration, zero where the path is a straight line. ``@measure(closing=False)``
# says that it does not read the velocity at the end of the step, which is otherwise evaluated for
# it. ``step_size`` is ``h`` as a number, or one for each sample.


def distance(step):
    return step.x1.norm(dim=1)


@measures.measure(closing=False)
def bending(step):
    change = (step.stages[2] - step.stages[0]) / step.tableau.c[2]
    return change.square().mean(1) / measures.step_size(step)


torch.manual_seed(0)
flow = odenets.Flow(odenets.MLPField(2), solver="bs23", depth=4)
points = torch.randn(100, 2)
x1, records = flow.record(points, distance=distance, bending=bending, twice=2 * bending)
print(records)

# %%
# What the mark saves: without it the closing stage of every block is evaluated, in case the measure
# reads it. Marked measures can also be added, scaled and given options, as ``2 * bending`` above.


class Counted(odenets.MLPField):
    calls = 0

    def forward(self, t, x, stage=0):
        Counted.calls += 1
        return super().forward(t, x, stage)


flow = odenets.Flow(Counted(2), solver="bs23", depth=4)
for name, measure in {"bending": bending, "distance": distance}.items():
    Counted.calls = 0
    flow.record(torch.randn(100, 2), **{name: measure})
    print(f"{name}: {Counted.calls} field calls in {flow.depth} blocks")

# %%
# A method
# --------
#
# A method is an objective: it names the measures that the network is to record, and adds what it
# makes of them to the loss. This one asks for paths that bend little. ``records`` holds each
# measure for every block and sample.


class StraightPaths(Objective):
    def __init__(self, weight):
        super().__init__({"bending": bending})
        self.weight = weight

    def loss(self, network, batch, output, records):
        _, labels = batch
        cost = records["bending"].sum(0).mean()  # over the steps; over the samples
        return F.cross_entropy(output, labels) + self.weight * cost


# %%
# Two neural ODEs classify points of two circles, one by cross-entropy alone, one by the method
# above. ``fit`` takes the objective like those of the package, and so does a loop of your own:
# ``objective(network, x, y).backward()``.

train, test = load("circles")
batches, adam = Batches(train, 100, seed=0), partial(torch.optim.Adam, lr=1e-2)
networks, fields = {}, {}
for name, weight in (("cross-entropy", 0.0), ("straight paths", 0.01)):
    torch.manual_seed(0)
    fields[name] = odenets.MLPField(2, 32, time=True)
    ode = odenets.NeuralODE(fields[name], solver="bs23", steps=6)
    networks[name] = odenets.Network(nn.Identity(), ode, nn.Linear(2, 2))
    fit(networks[name], batches, epochs=40, optimizer=adam, objective=StraightPaths(weight))
    networks[name].eval()
    accuracy = evaluate(networks[name], Batches(test, 500)).accuracy
    print(f"{name}: test accuracy {accuracy:.1%}")

# %%
# The paths of some points, from the dot to the end. Each velocity field is solved again, now with
# steps chosen by error control: a path that bends less needs fewer evaluations for the same
# accuracy. The axes differ: what cross-entropy alone leaves open, it may drive far.

figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for axis, (name, field) in zip(axes, fields.items(), strict=True):
    ode = odenets.NeuralODE(field, solver="bs23", tolerance=Tolerance(1e-4, 1e-6))
    with torch.no_grad():
        paths = ode(test.x[:60], at=torch.linspace(0, 1, 30))
    for path, label in zip(paths.unbind(1), test.y, strict=False):
        axis.plot(*path.T, color=f"C{label}", alpha=0.6)
        axis.plot(*path[0], "o", color=f"C{label}", markersize=3)
    axis.set(title=name, xlabel="x1", ylabel="x2")
    print(f"{name}: {ode.evaluations} evaluations at a tolerance of 1e-4")

# %%
# A velocity field that reads an input
# ------------------------------------
#
# A field is any module with ``forward(t, x)`` that returns the shape of ``x``. What follows x goes
# to it too: here ``c``, one number for each sample, says by which angle the flow is to turn its
# points. One with batch norm takes ``odenets.normalization.StageBatchNorm``, which has statistics
# for each stage of a step; ``nn.BatchNorm1d`` would mix them.


class Turning(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, t, x, c):
        return self.layers(torch.cat([x, c], 1))


# %%
# ``fit`` takes any list of batches, a regression is a ``Task``, and a ``shared`` flow has one field
# in all of its blocks.


def turned(x, c):
    first, second = x.split(1, dim=1)
    return torch.cat([first * c.cos() - second * c.sin(), first * c.sin() + second * c.cos()], 1)


torch.manual_seed(0)
x, c = torch.rand(2000, 2) * 2 - 1, torch.rand(2000, 1) * math.pi
pairs = [((a, b), turned(a, b)) for a, b in zip(x.split(100), c.split(100), strict=True)]
flow = odenets.Flow(Turning(), solver="bs23", depth=3, shared=True)
cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=60)
options = {"epochs": 60, "optimizer": adam, "lr_scheduler": cosine}
training = fit(flow, pairs, objective=Task(F.mse_loss), **options)
for row in (training.rows[0], training.rows[-1]):
    print(f"epoch {row['epoch']}: mean squared error {row['train_loss']:.5f}")

# %%
# Inputs are then a tuple, ``(x, c)``, in ``fit`` and everywhere, and the flow is called with both.
# One flow, five angles:

letter = [[0.0, 0.2], [0.8, 0.2], [0.8, 0.4], [0.2, 0.4], [0.2, 0.8], [0.0, 0.8], [0.0, 0.2]]
letter = torch.tensor(letter)
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for angle in np.linspace(0, math.pi, 5):
    with torch.no_grad():
        moved = flow(letter, torch.full((7, 1), angle, dtype=torch.float32))
    axis.plot(*moved.T, label=f"c = {angle:.2f}")
axis.set(title="a shape, moved by the flow", xlabel="x1", ylabel="x2", aspect="equal")
axis.legend(loc="lower right")

# %%
# A solver
# --------
#
# An explicit Runge-Kutta method is a table of numbers, its Butcher tableau: at which times ``c``
# the velocity is evaluated, from which earlier stages ``a`` these states are made, and with which
# weights ``b`` the stages are added up. This is Ralston's method of third order. Its second stage
# alone is the midpoint rule, of second order, so that it has an embedded error.

weights = (2 / 9, 1 / 3, 4 / 9)
ralston3 = ButcherTableau(
    name="ralston3",
    order=3,
    c=(0.0, 1 / 2, 3 / 4),
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=weights,
    embedded=(("third", Embedded(3, weights)), ("second", Embedded(2, (0.0, 1.0, 0.0)))),
    low="second",
)

# %%
# Sums that do not fit are refused, and so is an order that the coefficients do not have, up to
# order 4; above it nobody checks the rest for you. See it converge: over half the step a method of
# order k has an error ``2**k`` times smaller, a line of slope k in logarithmic scales. Take a
# problem whose velocity depends on the time, or mistakes in ``c`` go unnoticed, and float64.


def problem(t, x):
    return math.cos(3 * t) - x


start = torch.ones(1, 1, dtype=torch.float64)
exact = integrate(problem, start, 0.0, 2.0, solver="dopri5", tolerance=Tolerance(1e-12, 1e-12)).x1
numbers = [2**k for k in range(3, 9)]
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for solver in ("euler", "midpoint", ralston3, "rk4"):
    ends = [integrate(problem, start, 0.0, 2.0, solver=solver, steps=n).x1 for n in numbers]
    errors = [(end - exact).abs().item() for end in ends]
    name = solver if isinstance(solver, str) else solver.name
    axis.loglog(numbers, errors, "o-", label=name)
    print(f"{name}: measured order {math.log2(errors[-2] / errors[-1]):.2f}")
axis.set(xlabel="steps", ylabel="error at the end")
axis.legend()

# %%
# A tableau goes wherever a solver's name goes: to ``integrate``, to a ``NeuralODE``, to a ``Flow``
# whose blocks are then steps of it.

flow = odenets.Flow(odenets.MLPField(2), solver=ralston3, depth=2)
print(flow.record(torch.randn(100, 2), error=measures.error)[1])

# %%
# A step-size rule
# ----------------
#
# Under error control a *controller* decides after every attempt whether the step is accepted, and
# how large the next one is. It gets its state of before, the error over its tolerance (good up to
# 1) and the order of the lower solution, and returns a state; it remembers nothing itself. This one
# leaves the step size as it is until it would change by much.


class Patient:
    def __init__(self, zone=1.5):
        self.zone = zone

    def __call__(self, state, error, order):
        if not error <= 1:  # too large, or NaN
            return ControllerState(state.h / 2, accepted=False, errors=state.errors)
        factor = min(5.0, 0.8 * max(error, 1e-8) ** (-1 / (order + 1)))
        factor = 1.0 if factor < self.zone else factor
        return ControllerState(state.h * factor, accepted=True, errors=(error, state.errors[0]))


# %%
# Beside the default, on the oscillator of van der Pol, which is slow for long and fast for short:


def oscillator(t, x):
    return torch.stack([x[:, 1], 5 * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]], 1)


start = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, controller in {"default": None, "patient": Patient()}.items():
    options = {"solver": ralston3, "tolerance": Tolerance(1e-4, 1e-6), "controller": controller}
    solution = integrate(oscillator, start, 0.0, 15.0, **options)
    times = np.array(solution.step_times)
    axis.step(times[:-1], np.diff(times), where="post", label=name, alpha=0.8)
    print(f"{name}: {solution.stats}")
axis.set(xlabel="time", ylabel="step size", yscale="log")
axis.legend()

# %%
# A default is hard to beat: compare accepted and rejected steps. For ``control="sample"``, a step
# size of its own for every sample, a controller has a second method ``each``, which does the same
# with arrays.
#
# What to take along
# ------------------
#
# - Measure: ``Step -> (B,)``. Method: an ``Objective`` with ``measures`` and ``loss``. Field:
#   ``forward(t, x, ...)``. Solver: a ``ButcherTableau``. Controller: ``(state, error, order) ->
#   state``.
# - None of them needs to be registered, and none touches the layers of a network.
