"""
From torchdiffeq in ten lines
=============================

You learn how code that uses torchdiffeq runs here: by its import, with the same arguments, methods and shapes.
You compare values, evaluations, gradients and time of the two, side by side on your own machine.
It runs in about 10 seconds, and needs torchdiffeq beside this package.
"""

import time
from statistics import median

import matplotlib.pyplot as plt
import torch
import torchdiffeq
from torch import nn

import odenets
import solvers
from solvers import Tolerance

torch.manual_seed(0)

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
    exact = torchdiffeq.odeint(field.double(), x0.double(), t.double(), rtol=1e-10, atol=1e-11)
    field.float()
    print(f"{'':10}{'torchdiffeq':>22}{'solvers':>22}")
    for method in ("euler", "midpoint", "bosh3", "dopri5"):
        row = [count_and_error(package.odeint, method, rtol=1e-4, atol=1e-5) for package in (torchdiffeq, solvers)]
        print(f"{method:10}" + "".join(f"{calls:8} calls {error:8.1e}" for calls, error in row))

# %%
# A row shows the field calls and the largest error of each. Methods with fixed steps take the same steps, so that their
# errors agree. ``bosh3`` and ``dopri5`` choose their steps by the tolerance, and output times lie between two steps,
# where the packages interpolate differently. ``dopri5`` also estimates its error by other weights: those of Dormand and
# Prince here, which are stricter at the same tolerance, so that it may take a few calls more
# (:func:`solvers.odeint` lists what is different).

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, color, form, states in (("torchdiffeq", "C0", "-", before), ("solvers", "C1", "o", after)):
    states = states.detach()
    for sample in range(4):
        axes[0].plot(*states[:, sample].T, form, color=color, markersize=3, label=name if sample == 0 else None)
    error = (states - exact).abs().amax((1, 2))
    axes[1].semilogy(t[1:], error[1:], "o-", color=color, markersize=3, label=name)
axes[0].set(title="four samples", xlabel="first feature", ylabel="second feature", aspect="equal")
axes[1].set(title="dopri5 at rtol 1e-4", xlabel="t", ylabel="largest error over the samples")
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
    print(f"{name:15} gradients differ by {(ours - theirs).norm() / theirs.norm():.1e} of their norm")

# %%
# Events
# ------
#
# ``odeint_event`` too: when does one sample cross the vertical axis for the first time, and where?

start = torch.tensor([1.0, 0.5])
for package in (torchdiffeq, solvers):
    found = package.odeint_event(field, start, torch.tensor(0.0), event_fn=lambda t, x: x[..., 0], rtol=1e-6, atol=1e-7)
    event_time, states = found
    print(f"{package.__name__:12} t = {event_time:.5f}, x = ({states[-1][0]:.5f}, {states[-1][1]:.5f})")

# %%
# As a module
# -----------
#
# New code is shorter with :class:`odenets.NeuralODE`. It holds the field, the method and the tolerance, is part of a
# network like any module, and counts its evaluations itself.

ode = odenets.NeuralODE(field, solver="dopri5", tolerance=Tolerance(rtol=1e-4, atol=1e-5))
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
end = t[[0, -1]]
ode = odenets.NeuralODE(field, tolerance=Tolerance(rtol=1e-3, atol=1e-4), t1=end[-1].item())
ways = {
    "torchdiffeq": lambda: torchdiffeq.odeint(field, x0, end, rtol=1e-3, atol=1e-4)[-1],
    "solvers.odeint": lambda: solvers.odeint(field, x0, end, rtol=1e-3, atol=1e-4)[-1],
    "NeuralODE": lambda: ode(x0),
}
calls = {}
for name, way in ways.items():
    field.calls = 0
    way()
    calls[name] = field.calls
ways["field calls alone"] = lambda: sum(field(t[0], x0) for _ in range(calls["NeuralODE"]))

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
    rounds = [{name: seconds(way, backward) for name, way in ways.items()} for _ in range(60)]
    times[backward] = {name: 1e3 * median(one[name] for one in rounds) for name in ways}

# %%
print(f"{'milliseconds':20}{'calls':>8}{'forward':>10}{'and backward':>14}")
for name in ways:
    print(f"{name:20}{calls.get(name, calls['NeuralODE']):8}{times[False][name]:10.2f}{times[True][name]:14.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
for axis, backward, title in ((axes[0], False, "forward"), (axes[1], True, "forward and backward")):
    axis.barh(list(ways), list(times[backward].values()), color=["C0", "C1", "C1", "gray"])
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

for method in ("dopri8", "implicit_adams", "scipy_solver"):
    try:
        solvers.odeint(field, x0, t, method=method)
    except ValueError as error:
        print(f"{error}\n")

# %%
# One name means something else. ``rk4`` of torchdiffeq is the 3/8 rule, which is ``rk4_38`` here, while ``rk4`` is the
# classic method:

with torch.no_grad():
    theirs = torchdiffeq.odeint(field.double(), x0.double(), t.double(), method="rk4")
    for method in ("rk4", "rk4_38"):
        ours = solvers.odeint(field, x0.double(), t.double(), method=method)
        print(f"torchdiffeq's rk4 and {method:7} differ by {(ours - theirs).abs().max():.1e}")

# %%
# Rounding in double precision is near 1e-16: the smaller of the two numbers is the same method.
