"""
A neural ODE on irregular times, with events
============================================

You train a neural ODE on series that are each observed at times of their own, with step sizes for each sample.
You compare three ways to its gradient, by value and by memory, and differentiate the time at which something happens.
It runs in about 15 seconds on two cores.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import odenets
from odenets.analysis import measure_memory
from solvers import Tolerance

torch.manual_seed(0)
plt.rcParams["figure.constrained_layout.use"] = True

# %%
# Series with times of their own
# ------------------------------
#
# A :class:`~odenets.NeuralODE` integrates one velocity field ``v(t, x)``, here one that we know: points spiral inwards,
# and the farther out they are, the faster. With ``control="sample"`` each sample has step sizes of its own, and may
# have output times of its own: ``at`` is then a table, a row of times for each sample.

spiral = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
exactly = Tolerance(rtol=1e-6, atol=1e-8)
truth = odenets.NeuralODE(lambda t, x: x**3 @ spiral, control="sample", tolerance=exactly)

x0 = 3 * torch.rand(48, 2) - 1.5
times = (1.5 * torch.rand(48, 6)).sort(1).values  # six for each sample
exact = truth(x0, at=times)
observed = exact + 0.03 * torch.randn_like(exact)
print("starts:", tuple(x0.shape), "times:", tuple(times.shape))
print("states at these times:", tuple(observed.shape))

# %%
# The states are samples by times by features. Series of several lengths go into one table too: a sample with fewer
# times repeats its last one.

# %%
# Training
# --------
#
# What is to be learned is the field. Any module with ``forward(self, t, x)`` is one, and the training is PyTorch's.


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, t, x):
        return self.layers(x**3)


field = Field()
tolerance = Tolerance(rtol=1e-3, atol=1e-4)
settings = {"solver": "bs23", "tolerance": tolerance, "t1": 1.5}
ode = odenets.NeuralODE(field, control="sample", **settings)
optimizer = torch.optim.Adam(ode.parameters(), lr=3e-2)

# %%

for step in range(151):
    loss = (ode(x0, at=times) - observed).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 30 == 0:
        print(f"step {step:3}: squared error {loss:.4f}, {ode.evaluations} field calls")
print(f"the noise alone: {(exact - observed).square().mean():.4f}")

# %%
# The error falls towards that of the noise. The field calls are those of one pass, for all samples together; they grow
# while the field learns to turn fast.

dense = torch.linspace(0, 1.5, 200)
with torch.no_grad():
    learned, true = ode(x0, at=dense), truth(x0, at=dense)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
for sample in range(4):
    axes[0].plot(times[sample], torch.full((6,), sample + 1), f"C{sample}o")
    axes[1].plot(*true[:, sample].T, color="gray", linewidth=4, alpha=0.5)
    axes[1].plot(*learned[:, sample].T, f"C{sample}")
    axes[1].plot(*observed[sample].T, f"C{sample}o")
axes[1].legend(["true", "learned", "observed"], loc="center left", bbox_to_anchor=(1, 0.5))
axes[0].set(title="when they are observed", xlabel="t", ylabel="sample", yticks=range(1, 5))
axes[1].set(title="ways", xlabel="first feature", ylabel="second feature", aspect="equal")

# %%
# To the left, no two samples share a time. To the right, the learned ways lie on the true ones where there is data for
# them.

# %%
# Steps of each sample
# --------------------
#
# ``solution`` returns all that a solve knows, the counts of each sample among it. With ``control="batch"``, the
# default, one step size serves all samples.

with torch.no_grad():
    each = ode.solution(x0).sample_stats.evaluations
    batch = odenets.NeuralODE(field, **settings)
    batch(x0)
print(f"a step size for each: {each.min()} to {each.max()} evaluations of a sample")
print(f"one for the batch:    {batch.evaluations} of every sample")

figure, axis = plt.subplots(figsize=(6, 3.4))
axis.plot(x0.norm(dim=1), each, "o", markersize=4, label='control="sample"')
axis.axhline(batch.evaluations, color="C1", label='control="batch"')
axis.set(xlabel="distance of the start from the origin", ylabel="evaluations")
axis.legend()

# %%
# Samples that start far out move fast and need short steps, those near the origin hardly any. With one step size the
# error is that of the batch as a whole: slow samples are solved better than they need, fast ones worse than alone.

# %%
# Three ways to the gradient
# --------------------------
#
# ``gradient="direct"`` differentiates the steps that were taken, and keeps what that needs. ``"checkpoint"`` keeps some
# states and takes the steps again in the backward pass. ``"backsolve"`` keeps the end alone and solves the adjoint ODE
# backwards. All three are an argument of the module; here they meet on more and more equal steps.


def gradient(way, steps):
    """The gradient as one vector, and the peak of memory on the way, in KiB."""
    ode = odenets.NeuralODE(field, solver="bs23", steps=steps, gradient=way)
    field.zero_grad()
    memory = measure_memory(lambda: ode(x0).square().mean().backward())
    flat = torch.cat([parameter.grad.flatten() for parameter in field.parameters()])
    return flat, memory.peak / 1024


# %%

counts = (10, 20, 40, 80, 160)
peaks = {"direct": [], "checkpoint": [], "backsolve": []}
print("steps" + "".join(f"{way:>20}" for way in peaks))
for steps in counts:
    direct, _ = gradient("direct", steps)
    print(f"{steps:5}", end="")
    for way, peak in peaks.items():
        vector, kib = gradient(way, steps)
        peak.append(kib)
        off = (vector - direct).norm() / direct.norm()
        print(f"{kib:7.0f} KiB, {off:7.0e}", end="")
    print()

# %%
# The second number is the distance of the gradient to that of ``"direct"``, in parts of it. That of ``"backsolve"`` is
# the gradient of the ODE and not of the steps: it differs by the error of both solves, and less with more steps, until
# rounding is all that is left.

figure, axis = plt.subplots(figsize=(6, 3.4))
for way, peak in peaks.items():
    axis.loglog(counts, peak, "o-", label=way)
axis.set(xlabel="steps", ylabel="peak of memory, KiB")
axis.set_xticks(counts, map(str, counts))
axis.minorticks_off()
axis.legend()

# %%
# The memory of ``"direct"`` grows with the steps, that of ``"checkpoint"`` with their square root, and that of
# ``"backsolve"`` not at all. Both pay with further evaluations. Where memory suffices, ``"direct"`` is the fastest.

# %%
# Until something happens
# -----------------------
#
# An *event* is a function of time and state; the solve ends where it changes sign. The state of a falling ball is its
# height and its speed, and it lands where the height changes sign. With ``control="sample"`` each ball lands at its
# own time.


def gravity(t, x):
    return torch.stack([x[:, 1], torch.full_like(x[:, 1], -9.81)], 1)


landing = {"event": lambda t, x: x[:, 0], "t1": 10.0}
fall = odenets.NeuralODE(gravity, control="sample", **landing)
height = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
solution = fall.solution(torch.stack([height, torch.zeros_like(height)], 1))
solution.event_time.sum().backward()
print("status:         ", solution.status)
print("landing:        ", solution.event_time.tolist())
print("by hand:        ", (2 * height / 9.81).sqrt().tolist())
print("its gradient:   ", height.grad.tolist())
print("by hand:        ", (1 / (2 * 9.81 * height).sqrt()).tolist())

# %%
# The time of an event is a tensor with a gradient. So one can learn from *when* something happens. Here balls bounce
# with an elasticity that we do not know, and all that is observed is when each touches the ground for the third time.


def flights(elasticity, heights):
    """The starts and the durations of three flights of each ball."""
    x = torch.stack([heights, torch.zeros_like(heights)], 1)
    starts, durations = [], []
    for _ in range(3):
        solution = fall.solution(x)
        starts.append(x)
        durations.append(solution.event_time)
        upwards = -elasticity * solution.x1[:, 1]
        ground = torch.full_like(upwards, 1e-6)  # at zero the next event would be at once
        x = torch.stack([ground, upwards], 1)
    return starts, durations


heights = height.detach()
third = sum(flights(torch.tensor(0.8), heights)[1])
elasticity = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

# %%

optimizer = torch.optim.SGD([elasticity], lr=0.02)
for step in range(21):
    loss = (sum(flights(elasticity, heights)[1]) - third).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        print(f"step {step:2}: elasticity {elasticity.item():.3f}, squared error {loss:.1e}")

# %%
# The elasticity goes to the one of the observations, 0.8. The figure draws the flights of each ball;
# ``at`` takes twenty times within each of them.

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True, sharey=True)
values = {"at first": torch.tensor(0.4), "learned": elasticity.detach()}
inner = torch.linspace(0, 0.999, 20, dtype=torch.float64)
for axis, (name, value) in zip(axes, values.items(), strict=True):
    now = torch.zeros(3, 1, dtype=torch.float64)
    for x, duration in zip(*flights(value, heights), strict=True):
        inside = duration[:, None] * inner
        for ball, path in enumerate(fall(x, at=inside)[..., 0]):
            axis.plot(now[ball] + inside[ball], path, f"C{ball}")
        now = now + duration[:, None]
    axis.plot(third, torch.zeros(3), "v", color="gray", label="third landing, observed")
    axis.set(title=f"{name}: elasticity {value:.2f}", xlabel="seconds", ylabel="meters")
axes[1].legend()

# %%
# To the right the third flight of each ball ends at its mark. What else a neural ODE takes, such as conditions and
# measures, stands in :doc:`/how_to/neural_odes`.
