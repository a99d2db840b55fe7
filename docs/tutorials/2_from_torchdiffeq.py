"""
From torchdiffeq in ten lines
=============================

You learn how code that uses torchdiffeq runs here: by its import, with the same arguments, methods and shapes.
You compare values, evaluations, gradients and time of the two, side by side on your own machine.
It runs in about 10 seconds, and needs torchdiffeq beside this package.
"""

import time
from statistics import median
from textwrap import fill

import matplotlib.pyplot as plt
import torch
import torchdiffeq
from torch import nn

import odenets
import solvers
from solvers import Tolerance

torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True

# %%
# Before
# ------
#
# Code for torchdiffeq has a field, a start, times, and a call of ``odeint``. The field here turns its state around the
# origin, and a small network bends the way. It counts how often it is called.


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        return torch.stack([-x[..., 1], x[..., 0]], -1) + self.net(x)


field, x0, t = Field(), torch.randn(256, 2), torch.linspace(0, 3, 31)
before = torchdiffeq.odeint(field, x0, t, method="dopri5", rtol=1e-4, atol=1e-5)
print("states, times by samples by features:", tuple(before.shape))
print("field calls:", field.calls)

# %%
# After
# -----
#
# The functions have the same names and the same arguments. Only the module is another: ``from solvers import odeint``.

field.calls = 0
after = solvers.odeint(field, x0, t, method="dopri5", rtol=1e-4, atol=1e-5)
print("states, times by samples by features:", tuple(after.shape))
print("field calls:", field.calls)
print(f"largest difference of the two: {(after - before).abs().max():.1e}")

# %%
# The difference is no rounding: both solve to a tolerance, and each makes an error of its own. So it is better to hold
# both against a solution in double precision that is far more exact.


def count_and_error(odeint, method, **tolerance):
    field.calls = 0
    states = odeint(field, x0, t, method=method, **tolerance)
    return field.calls, (states - exact).abs().max().item()


with torch.no_grad():
    double = field.double(), x0.double(), t.double()
    exact = torchdiffeq.odeint(*double, rtol=1e-10, atol=1e-11)
    field.float()
    print(f"{'':10}{'torchdiffeq':>22}{'solvers':>22}")
    for method in ("euler", "midpoint", "bosh3", "dopri5"):
        print(f"{method:10}", end="")
        for package in (torchdiffeq, solvers):
            calls, error = count_and_error(package.odeint, method, rtol=1e-4, atol=1e-5)
            print(f"{calls:8} calls {error:8.1e}", end="")
        print()

# %%
# A row shows the field calls and the largest error of each. Methods with fixed steps take the same steps, so that their
# errors agree. ``bosh3`` and ``dopri5`` choose their steps by the tolerance, and output times lie between two steps,
# where the packages interpolate differently. ``dopri5`` also estimates its error by other weights: those of Dormand and
# Prince here, which are stricter at the same tolerance, so that it may take a few calls more
# (:func:`solvers.odeint` lists what is different).

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for name, form, states in (("torchdiffeq", "C0-", before), ("solvers", "C1o", after)):
    states = states.detach()
    for sample in range(4):
        lines = axes[0].plot(*states[:, sample].T, form, markersize=3)
    lines[0].set_label(name)
    error = (states - exact).abs().amax((1, 2))
    axes[1].semilogy(t[1:], error[1:], f"{form[:2]}o-", markersize=3, label=name)
axes[0].set(title="four samples", xlabel="first feature", ylabel="second feature")
axes[1].set(title="dopri5 at rtol 1e-4", xlabel="t", ylabel="largest error")
for axis in axes:
    axis.legend(fontsize="small")

# %%
# To the left dots lie on lines. To the right is the error at each output time, on a logarithmic scale.

# %%
# Gradients
# ---------
#
# ``odeint`` has gradients through its steps, and ``odeint_adjoint`` those of the adjoint ODE, solved backwards.


def gradient(odeint):
    field.zero_grad()
    odeint(field, x0, t, rtol=1e-4, atol=1e-5)[-1].square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in field.parameters()])


through, adjoint = gradient(solvers.odeint), gradient(solvers.odeint_adjoint)
for name, ours, theirs in (
    ("odeint", through, gradient(torchdiffeq.odeint)),
    ("odeint_adjoint", adjoint, gradient(torchdiffeq.odeint_adjoint)),
):
    difference = (ours - theirs).norm() / theirs.norm()
    print(f"{name:15} gradients differ by {difference:.1e} of their norm")

# %%
# Events
# ------
#
# ``odeint_event`` too: when does one sample cross the vertical axis for the first time, and where?

start, zero = torch.tensor([1.0, 0.5]), torch.tensor(0.0)
options = {"event_fn": lambda t, x: x[..., 0], "rtol": 1e-6, "atol": 1e-7}
for package in (torchdiffeq, solvers):
    event_time, states = package.odeint_event(field, start, zero, **options)
    first, second = states[-1]
    print(f"{package.__name__:12} t = {event_time:.5f}, x = ({first:.5f}, {second:.5f})")

# %%
# As a module
# -----------
#
# New code is shorter with :class:`odenets.NeuralODE`. It holds the field, the method and the tolerance, is part of a
# network like any module, and counts its evaluations itself.

tolerance = Tolerance(rtol=1e-4, atol=1e-5)
ode = odenets.NeuralODE(field, solver="dopri5", tolerance=tolerance)
states = ode(x0, at=t)
print("states:", tuple(states.shape), "evaluations:", ode.evaluations)
print(f"largest error: {(states - exact).abs().max():.1e}")

# %%
# Its steps grow by a rule of its own, so that they are not those of ``odeint``; the error is of the same order. What it
# can do beyond, such as steps and times of each sample, is the subject of :doc:`the next tutorial <3_neural_ode>`;
# :doc:`/how_to/neural_odes` has a table of what is called how.

# %%
# Time
# ----
#
# The three are timed in turn, many rounds, on one thread, so that whatever else the machine does disturbs all of them
# alike. Beside them stand the field calls alone: what no solver can save.

torch.set_num_threads(1)
ends, rough = torch.tensor([0.0, 3.0]), {"rtol": 1e-3, "atol": 1e-4}
ode = odenets.NeuralODE(field, tolerance=Tolerance(**rough), t1=3.0)
ways = {
    "torchdiffeq": lambda: torchdiffeq.odeint(field, x0, ends, **rough)[-1],
    "solvers.odeint": lambda: solvers.odeint(field, x0, ends, **rough)[-1],
    "NeuralODE": lambda: ode(x0),
}
calls = {}
for name, way in ways.items():
    field.calls = 0
    way()
    calls[name] = field.calls
ways["calls alone"] = lambda: sum(field(t[0], x0) for _ in range(calls["NeuralODE"]))
calls["calls alone"] = calls["NeuralODE"]

# %%


def seconds(way, backward):
    start = time.perf_counter()
    x1 = way()
    if backward:
        x1.sum().backward()
    return time.perf_counter() - start


times = {}
for backward in (False, True):
    for way in ways.values():
        seconds(way, backward)  # the first time is slower
    rounds = [[seconds(way, backward) for way in ways.values()] for _ in range(60)]
    times[backward] = [1e3 * median(column) for column in zip(*rounds, strict=True)]

# %%
print(f"{'milliseconds':20}{'calls':>8}{'forward':>10}{'and backward':>14}")
for name, forward, both in zip(ways, times[False], times[True], strict=True):
    print(f"{name:20}{calls[name]:8}{forward:10.2f}{both:14.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for axis, backward in zip(axes, (False, True), strict=True):
    axis.barh(list(ways), times[backward], color=["C0", "C1", "C1", "gray"])
    title = "forward and backward" if backward else "forward"
    axis.set(title=title, xlabel="milliseconds, median")
axes[0].invert_yaxis()

# %%
# To read it: what a bar has beyond the gray one is the solver's own work, mostly Python, the same for a field of any
# size. With a field this small it counts; with convolutions on many channels all bars come near the gray one. The
# numbers are of this machine and this moment.

# %%
# What is not supported says so
# -----------------------------
#
# The methods here are explicit Runge-Kutta methods. Others raise, and the message names those there are.

for method in ("radau", "implicit_adams", "scipy_solver"):
    try:
        solvers.odeint(field, x0, t, method=method)
    except ValueError as error:
        print(fill(str(error), 80))

# %%
# One name means something else. ``rk4`` of torchdiffeq is the 3/8 rule, which is ``rk4_38`` here, while ``rk4`` is the
# classic method:

with torch.no_grad():
    field.double()
    theirs = torchdiffeq.odeint(*double, method="rk4")
    for method in ("rk4", "rk4_38"):
        difference = (solvers.odeint(*double, method=method) - theirs).abs().max()
        print(f"torchdiffeq's rk4 and {method:7} differ by {difference:.1e}")

# %%
# Rounding in double precision is near 1e-16: the smaller of the two numbers is the same method.
