"""
A residual network is an integrator
===================================

You learn that a residual block is a step of an ODE solver, what a step holds, and how to measure it.
You train a classifier of digits twice, in a loop of your own and by ``fit``, and read how its blocks move the data.
At the end another solver takes the place of the first. It runs in about 20 seconds on two cores.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn

import odenets
from odenets import measures, plotting
from odenets.training import Batches, fit, load

plt.rcParams["figure.constrained_layout.use"] = True

# %%
# A residual block adds something to its input: ``x + v(x)``. Here are four of them, written as one writes them in
# PyTorch. A *velocity field* takes a time and a state and returns a velocity of the state's shape.

torch.manual_seed(0)
fields = [odenets.MLPField(2) for _ in range(4)]
x = torch.randn(5, 2)

by_hand = x
for field in fields:
    by_hand = by_hand + field(0.0, by_hand)

# %%
# The same network is a :class:`~odenets.Flow` of four Euler steps of size ``h = 1``, each with a field of its own.

unused = iter(fields)
flow = odenets.Flow(lambda: next(unused), solver="euler", depth=4, h=1.0)
difference = (flow(x) - by_hand).abs().max()
print(f"largest difference of the two: {difference:g}")

# %%
# What you see is rounding, if anything: the network *is* Euler's method, which solves ``dx/dt = v(t, x)`` by steps.

# %%
# What a step holds
# -----------------
#
# ``flow.steps`` takes the steps one by one. A step knows its time, its size, the states at both ends and its
# *stages*: the velocities that it evaluated on the way.

for step in flow.steps(x):
    is_euler = torch.allclose(step.x1, step.x0 + step.h * step.stages[0])
    print(f"t = {step.t}, h = {step.h}, stages: {len(step.stages)},", end=" ")
    print(f"x1 = x0 + h * stage: {is_euler}")

# %%
# Euler's method has one stage a step. Other methods look at the field at more places within a step, and combine what
# they see so that the step follows the curve more closely. The next cell lets four of them go around a circle, on a
# field that we know: the velocity is the position, turned by a right angle.


class Rotation(nn.Module):
    def forward(self, t, x):
        return torch.stack([-x[:, 1], x[:, 0]], 1)


methods = {"euler": 24, "midpoint": 12, "bs23": 8, "rk4": 6}  # and their steps
around = {"total_time": 2 * torch.pi, "shared": True}
start, turns = torch.tensor([[1.0, 0.0]]), {}
for solver, depth in methods.items():
    turn = odenets.Flow(Rotation(), solver=solver, depth=depth, **around)
    turns[solver] = torch.cat([start, *(step.x1 for step in turn.steps(start))])
    miss = (turns[solver][-1] - start).norm()
    print(f"{solver:9}{depth:3} steps, {turn.evaluations:3} evaluations,", end=" ")
    print(f"ends {miss:.3f} from where it began")

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True)
angle = torch.linspace(0, 2 * torch.pi, 100)
for axis, (solver, states) in zip(axes, turns.items(), strict=True):
    axis.plot(angle.cos(), angle.sin(), color="0.7", label="the flow of the field")
    axis.plot(*states.T, "o-", markersize=4, label="the steps")
    axis.set(title=f"{solver}, {methods[solver]} steps", aspect="equal")
axes[-1].legend(loc="lower right", fontsize="small")

# %%
# A dot is the state after a step. Euler's method leaves the circle, as every step goes along the tangent; the methods
# with more stages take fewer and longer steps with as many evaluations and stay nearer.

# %%
# Measures
# --------
#
# A *measure* is any function of a step that returns a number for each sample. ``record`` takes the steps and measures
# each of them: here how far it moves a sample, and the *action*, the mean square of its velocity times ``h``.

x1, records = flow.record(x, length=measures.displacement, action=measures.action)
print(records)
print("shape of one measure, blocks by samples:", tuple(records["action"].shape))

# %%
# Digits, in a loop of your own
# -----------------------------
#
# A classifier is an *encoder*, a flow and a *head*. ``small_network`` is one for small images: a convolution, the flow
# on states of 16 channels, a linear layer. It is a module like any other, and so is its training.

train, test = load("digits")  # images of 8 x 8 pixels, which come with scikit-learn
network = odenets.models.small_network(solver="euler", depth=4)
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for epoch in range(3):
    for index in torch.randperm(len(train.y)).split(64):
        loss = nn.functional.cross_entropy(network(train.x[index]), train.y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (network(test.x).argmax(1) == test.y).float().mean()
    print(f"epoch {epoch + 1}: last loss {loss:.3f}, test accuracy {accuracy:.1%}")

# %%
# The same by ``fit``
# -------------------
#
# :func:`odenets.training.fit` is this loop with what one adds to it sooner or later: validation, schedules, early
# stopping, loggers, runs that resume (:doc:`/how_to/training`). It returns a row of numbers for each epoch.


def trained(solver):
    torch.manual_seed(0)
    network = odenets.models.small_network(solver=solver, depth=4)
    training = fit(
        network,
        Batches(train, 64, seed=0),
        epochs=3,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        validation=Batches(test, 500),
    )
    return network.eval(), training.rows


network, rows = trained("euler")
for row in rows:
    accuracy = row["validation_accuracy"]
    print(f"epoch {row['epoch']}: loss {row['train_loss']:.3f}, test accuracy {accuracy:.1%}")

# %%
# The accuracies are near those of your own loop; they are not the same, since other random numbers were drawn.

# %%
# What the blocks do
# ------------------
#
# The trained network records like the flow. ``print`` shows the means over the samples, and ``to_dataframe`` is the
# whole as a table of pandas, a row for each block and sample. Measures of your own are shown
# :doc:`elsewhere </how_to/measures>`.

with torch.no_grad():
    _, records = network.record(test.x, action=measures.action, cosine=measures.cosine)
print(records)
frame = records.to_dataframe()
frame["digit"] = test.y.numpy()[frame["sample"]]
print(frame.pivot_table("action", "name", "digit").round(2))

# %%
# As a figure: a line of colors is a block, a column is a sample, and the curves beside it are the means of each digit.

figure = plotting.blocks_by_samples(records, labels=test.y)

# %%
# A vertical stripe is a sample that every block moves far, or hardly at all. The curves show which block does most of
# the work, and whether it does so for every digit.

# %%
# Another solver
# --------------
#
# The solver is a word. Its stages share the weights of their block, so that a network with ``bs23`` or ``rk4`` has as
# many parameters as that with ``euler``, and more evaluations of them.

networks, curves = {"euler": network}, {"euler": rows}
for solver in ("bs23", "rk4"):
    networks[solver], curves[solver] = trained(solver)
for solver, rows in curves.items():
    last, evaluations = rows[-1], networks[solver].evaluations
    print(f"{solver:6} {evaluations:3} evaluations, {last['parameters']} parameters,", end=" ")
    print(f"{last['seconds']:5.1f} s, test accuracy {last['validation_accuracy']:.1%}")

# %%
figure, axis = plt.subplots(figsize=(6, 3.4))
for solver, rows in curves.items():
    losses = [row["validation_loss"] for row in rows]
    axis.plot(range(1, len(losses) + 1), losses, "o-", label=solver)
axis.set(xlabel="epoch", ylabel="test loss", xticks=range(1, len(losses) + 1))
axis.legend()

# %%
# One seed and three epochs do not tell which solver is better; they show what each one costs. What the further stages
# bring for certain is an *embedded error*: ``bs23`` has a second solution inside each step, and the difference of the
# two says how well the step follows the flow of its field.

with torch.no_grad():
    network, (error, length) = networks["bs23"], (measures.error, measures.displacement)
    _, records = network.record(test.x, error=error, length=length)
records["error over length"] = records["error"] / records["length"]
print(records)

# %%
# The last column is the error in parts of the way. A block where it is large would gain from being cut in two, one
# where it is tiny can be merged with the next: that is :doc:`adaptive depth <5_adaptive_depth>`.

# %%
# The weights of one solver also load into another. Both are the same fields, read by another integrator:

for solver in ("euler", "midpoint", "bs23", "rk4"):
    other = odenets.models.small_network(solver=solver, depth=4)
    other(test.x[:1])  # the first input makes the fields, whose weights are then loaded
    other.load_state_dict(networks["euler"].state_dict())
    with torch.no_grad():
        accuracy = (other(test.x).argmax(1) == test.y).float().mean()
    print(f"trained with euler, read by {solver:9}: test accuracy {accuracy:.1%}")

# %%
# Where the accuracy falls, the network has learned its own four steps and not the flow that they approximate.
