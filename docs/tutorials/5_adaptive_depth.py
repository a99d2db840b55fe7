"""
Adaptive depth
==============

You learn how a network can tell whether it has too many blocks or too few: from the embedded error
of each block. You train two networks that choose their depth, one from eight blocks down, one from
a single block up; then you do the same to a table of numbers in a loop of your own.

It takes about twenty seconds to run and fifteen minutes to read. You know PyTorch; of ODEs you need
to know only that a solver takes steps, and that long steps are inaccurate.
"""

# %%
# Two solutions in one block
# --------------------------
#
# A block of ``solver="bs23"`` is one step of the method of Bogacki and Shampine. It evaluates its
# velocity field a few times, and combines these stages in two ways: a solution of third order,
# which goes on to the next block, and one of second order. Their difference is the *embedded
# error*. It costs one further evaluation, and says how well a step of this size follows the field.

import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import make_friedman1
from torch import nn
from torch.nn import functional as F

import odenets
from odenets import measures, plotting
from odenets.depth import AdaptiveDepth, DepthRule, adapt_depth, block_errors, plan
from odenets.training import Batches, Task, evaluate, fit, load, split

# %%
# A network of eight such blocks for images of eight by eight pixels. Measured are 128 images of the
# validation part.

torch.manual_seed(0)
parts = split(*load("digits"))  # disjoint: train, validation, test
checked = parts.validation.x[:128]  # the images on which errors are measured

network = odenets.models.small_network(solver="bs23", depth=8, total_time=1.0, features=8)
_, records = network.record(checked, error=measures.error)
print(records)

# %%
# A row is a block. Any network's error can be looked at like this;
# :func:`odenets.depth.block_errors` gives the means over batches, a list for each flow of the
# network, and is what decides below. As a picture, each block on each image:

figure = plotting.blocks_by_samples(records, sort=True)

# %%
# A rule
# ------
#
# Errors above ``tolerance`` call for shorter steps: the block is *duplicated*, and both halves of
# its time get its weights. Errors far below, under ``tolerance / K``, say that the step could be
# longer: the block is *merged* with the next one. :class:`odenets.depth.DepthRule` holds these
# numbers, and :func:`odenets.depth.plan` shows what it would do, without doing it.

rule = DepthRule(tolerance=3e-3, K=8, max_depth=16)
(errors,) = block_errors(network, [checked])  # one flow, so one list
for block, (error, action) in enumerate(zip(errors, plan(errors, network.h, rule), strict=True)):
    print(f"block {block}: error {error:.5f}, {action}")

# %%
# A network without training has small weights, and its steps are far more accurate than they need
# to be. What the rule wants of a *trained* block is another question, so it is applied between
# epochs.
#
# In ``fit``
# ----------
#
# :class:`odenets.depth.AdaptiveDepth` is a callback. Its second argument makes the validation
# inputs anew at each check. After half of the epochs it stops editing, so that the last edits are
# trained. The optimizer's state follows the blocks.


def train(depth, epochs=6):
    torch.manual_seed(0)
    network = odenets.models.small_network(solver="bs23", depth=depth, total_time=1.0, features=8)
    training = fit(
        network,
        Batches(parts.train, 64, seed=0),
        epochs=epochs,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        validation=Batches(parts.validation, 500),
        callbacks=[AdaptiveDepth(rule, lambda: [checked], until=epochs // 2)],
    )
    return network, training


trained = {"from eight blocks": train(8), "from one block": train(1)}

# %%
# The row of an epoch has the depth it was trained with, the step sizes, and, where blocks were
# edited after it, the edits in words.

for name, (_, training) in trained.items():
    print(name)
    for row in training.rows:
        print(f"  epoch {row['epoch']}, depth {row['depth']}")
        for edit in filter(None, row["edits"].split("; ")):
            print(f"    {edit}")

# %%
# Depth and step sizes over the epochs: above the number of blocks, below the time that each block
# covers. The total time, the sum of all step sizes, stays what it was.

figure, axes = plt.subplots(2, 2, sharex=True, sharey="row", figsize=(7, 5), layout="constrained")
for (upper, lower), (name, (_, training)) in zip(axes.T, trained.items(), strict=True):
    epochs = [row["epoch"] for row in training.rows]
    upper.step(epochs, [row["depth"] for row in training.rows], where="mid")
    upper.set(title=name, ylabel="blocks", yticks=range(0, 10, 2))
    for row in training.rows:
        h = [float(size) for size in row["h"].split()]
        for i, (start, end) in enumerate(pairwise(np.cumsum([0.0, *h]))):
            lower.bar(row["epoch"], end - start, 0.9, bottom=start, color=f"C{i % 2}", alpha=0.5)
    lower.set(xlabel="epoch", ylabel="time of the blocks")

# %%
# The errors of the trained blocks, beside the band in which the rule leaves a block alone:

figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.2), layout="constrained")
for axis, (name, (network, _)) in zip(axes, trained.items(), strict=True):
    (errors,) = block_errors(network, [checked])
    axis.axhspan(rule.tolerance / rule.K, rule.tolerance, alpha=0.15, label="left alone")
    axis.plot(errors, "o-", label="embedded error")
    axis.set(title=name, xlabel="block", yscale="log", xticks=range(len(errors)))
axes[0].set_ylabel("error")
axes[0].legend()

# %%
# A block may lie outside the band: edits ended before training did, and a merge that would break
# the tolerance is taken back.
#
# What did it buy? ``training.evaluations`` counts the field evaluations of the training steps,
# summed over the images, and ``check_evaluations`` those of the checks. Beside them, what the depth
# at the start would have cost: three stages a block.

for (name, (network, training)), start in zip(trained.items(), (8, 1), strict=True):
    accuracy = evaluate(network, Batches(parts.test, 500)).accuracy
    cost = training.evaluations + training.check_evaluations
    fixed = 3 * start * len(parts.train) * len(training.rows)
    print(f"{name}: {network.depth} blocks, test accuracy {accuracy:.1%}")
    print(f"  {cost} evaluations, {cost / fixed:.2f} of those of {start} fixed")

# %%
# Digits of eight by eight pixels are an easy task, on which depth gains little: read the two
# accuracies as equal unless they differ by far more than one image in a hundred. What the rule buys
# is not accuracy but a depth that you need not search for, and steps that stay accurate: the blocks
# remain the solver of an ODE.
#
# A table of your own, a loop of your own
# ---------------------------------------
#
# The data are NumPy arrays, here a known regression problem with ten columns, of which five matter.
# Everything becomes float32 and is scaled by the training rows.


def scaled(table):
    rows = torch.from_numpy(table).float()
    return ((rows - rows[:800].mean(0)) / rows[:800].std(0)).split([800, 200, 200])


X, y = make_friedman1(1200, noise=0.5, random_state=0)
x_train, x_valid, x_test = scaled(X)
y_train, y_valid, y_test = scaled(y[:, None])  # targets (N, 1), as the output

torch.manual_seed(0)
flow = odenets.Flow(lambda: odenets.MLPField(16, 32), solver="bs23", depth=1)
regression = odenets.Network(nn.Linear(10, 16), flow, nn.Linear(16, 1))
optimizer = torch.optim.Adam(regression.parameters(), lr=1e-2)
objective = Task(F.mse_loss)

# %%
# In your own loop :func:`odenets.depth.adapt_depth` takes the callback's place. Given the
# optimizer, it gives a copied block the moments of the original, and takes those of a merged one
# away. Its report lists the errors and the edits.

rule = DepthRule(tolerance=2e-3)
history = []
for epoch in range(30):
    for x, target in Batches((x_train, y_train), 64, seed=0).epoch(epoch):
        optimizer.zero_grad()
        objective(regression, x, target).backward()
        optimizer.step()
    loss = evaluate(regression, [(x_valid, y_valid)], objective=objective).loss
    history.append((loss, regression.depth, max(block_errors(regression, [x_valid])[0])))
    if epoch % 3 == 2 and epoch < 20:
        for edit in adapt_depth(regression, lambda: [x_valid], rule, optimizer).edits:
            print(f"after epoch {epoch + 1}: {edit}")

# %%
# Depth answers the error; the loss hardly notices an edit, because a duplicated block does nearly
# what the original did.

losses, depths, largest = zip(*history, strict=True)
epochs = range(1, len(history) + 1)
figure, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
axes[0].semilogy(epochs, losses)
axes[0].set(xlabel="epoch", ylabel="mean squared error", title="validation rows")
axes[1].plot(epochs, largest)
axes[1].axhline(rule.tolerance, color="gray", linestyle="--", label="tolerance")
axes[1].set(xlabel="epoch", ylabel="largest embedded error")
axes[1].legend()
axes[2].step(epochs, depths, where="mid")
axes[2].set(xlabel="epoch", ylabel="blocks", yticks=range(max(depths) + 1))

# %%
# Saving
# ------
#
# The depth that was chosen travels with the weights. The network that loads them is built by the
# same code; where it has another depth or other step sizes, it gets the saved ones, and a warning
# names both.

with tempfile.TemporaryDirectory() as folder:
    path = odenets.save_weights(regression, Path(folder) / "regression.safetensors")
    flow = odenets.Flow(lambda: odenets.MLPField(16, 32), solver="bs23", h=regression.h, depth=regression.depth)
    again = odenets.load_weights(odenets.Network(nn.Linear(10, 16), flow, nn.Linear(16, 1)), path)
print(f"{again.depth} blocks with h = {again.h}")
for name, network in {"trained": regression, "loaded": again}.items():
    loss = evaluate(network, [(x_test, y_test)], objective=objective).loss
    print(f"{name}: mean squared error {loss:.4f} on the test rows")

# %%
# What to take along
# ------------------
#
# - The tolerance is the one number to choose. It is an error of the state, root mean square over
#   its features: a tenth of it needs about twice as many steps of third order.
# - A tolerance that is too small for the total time duplicates blocks up to ``max_depth``; one that
#   is too large merges all of them into one.
# - Solvers with an embedded error are ``"midpoint"``, ``"heun"``, ``"fehlberg2"``, ``"bs23"``,
#   ``"dopri5"`` and ``"tsit5"``. Euler's method, that of residual networks, has none.
