"""
Least action on a model of torchvision
======================================

You learn to measure a residual network of torchvision, as it is, block by block.
You train it so that it moves its data as little as it can, in a loop of your own and by ``fit``, and see what changes.
It runs in about 25 seconds on two cores.
"""

from functools import partial

import matplotlib.pyplot as plt
import torch
import torchvision
from torch.nn import functional as F

import odenets
from odenets import measures, plotting
from odenets.least_action import LeastAction
from odenets.training import Batches, evaluate, fit, load, subsample

plt.rcParams["figure.constrained_layout.use"] = True

# %%
# A few images
# ------------
#
# The data are digits of scikit-learn, made larger to what ``resnet18`` takes, and only 160 of them for training.

train, test = load("digits")


def images(data):
    large = F.interpolate(data.x, size=(32, 32), mode="bilinear")
    return large.repeat(1, 3, 1, 1), data.y


few, many = images(subsample(train, 160)), images(test)
print("training:", tuple(few[0].shape), "test:", tuple(many[0].shape))

# %%
# A model, as it is
# -----------------
#
# :func:`odenets.adapt` finds where a model adds to its states, in a batch of images, and changes nothing in it. Each
# residual block is a step of Euler's method with ``h = 1``: what it adds to its input is the velocity. Transformers,
# masks and networks of one's own are on :doc:`a page of their own </how_to/any_network>`.


def resnet():
    torch.manual_seed(0)
    return odenets.adapt(torchvision.models.resnet18(num_classes=10), few[0][:2])


network, measured = resnet(), {"length": measures.displacement, "action": measures.action}
with torch.no_grad():
    logits, records = network.record(few[0][:32], **measured)
print(records)

# %%
# A row is a block, by its name in torchvision. ``length`` is how far the block moves a sample, as a root mean square
# over the features; ``action`` is its square, the cost of transport.

# %%
# Least action, in a loop of your own
# -----------------------------------
#
# Many networks solve the same task. Least action looks for the one that moves its data least: it minimizes
# ``loss + action / lambda``, and lambda grows with the loss that is left, so that the task has more and more weight as
# long as it is not solved. :class:`~odenets.least_action.LeastAction` is a function of network and batch that returns
# what to differentiate. It notices the optimizer's steps, and lets lambda grow, by itself.

objective = LeastAction(lambda0=0.1, tau=0.05)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
batches = Batches(few, 32, seed=0)  # or a DataLoader
history = []
for _ in range(3):
    for x, y in batches:
        loss = objective(network, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((loss.item(), objective.multiplier.item()))

# %%
# ``objective(network, x, y)`` takes one forward pass and measures while it does so. The lines of the loop are those of
# any other loss.

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
minimized, multipliers = zip(*history, strict=True)
axes[0].plot(range(1, len(history) + 1), minimized, "o-", markersize=3)
axes[0].set(xlabel="step", ylabel="loss + action / lambda")
axes[1].plot(range(1, len(history) + 1), multipliers, "o-", markersize=3)
axes[1].set(xlabel="step", ylabel="lambda")

# %%
# Lambda grows fast while the loss is large, and slows down as the task is solved. What is minimized falls with the loss
# of the task and with the weight of the action.

# %%
# With and without, by ``fit``
# ----------------------------
#
# ``fit`` takes the same objective. Here it trains the same network from the same start twice. Eight epochs are few for
# batch norm, whose running statistics lag behind the weights, so that they are computed anew in the end.


def trained(objective):
    network, optimizer = resnet(), partial(torch.optim.AdamW, lr=1e-3)
    batches = Batches(few, 32, seed=0)
    fit(network, batches, epochs=8, optimizer=optimizer, objective=objective)
    odenets.recalibrate(network, [few[0]])
    return network.eval()


objective = LeastAction(lambda0=0.1, tau=0.05)
networks = {"plain": trained(None), "least action": trained(objective)}

# %%

paths = {}
for name, network in networks.items():
    with torch.no_grad():
        _, paths[name] = network.record(many[0], **measured)
    length, action = (paths[name][measure].sum(0).mean() for measure in measured)
    print(f"{name:13} path {length:.2f}, action {action:.2f},", end=" ")
    on_few, on_many = (evaluate(network, [data]).accuracy for data in (few, many))
    print(f"accuracy {on_few:.1%} in training, {on_many:.1%} on test images")

# %%
# Path and action are measured on test images and summed over the blocks. By block:

figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name, records in paths.items():
    mean = records["length"].mean(1)
    axes[0].plot(records.blocks, mean, "o-", label=name)
    axes[1].plot(records.blocks, mean.cumsum(0), "o-", label=name)
axes[0].set(title="by each block", ylabel="path length")
axes[1].set(title="up to each block", ylabel="path length")
for axis in axes:
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", rotation=45)
    axis.legend()

# %%
# The curves are means over the test images. The network with least action solves the task on a shorter way. Is that so
# for every image? The lengths of each:

lengths = {name: records["length"].sum(0).numpy() for name, records in paths.items()}
figure = plotting.histograms({"test images": lengths}, xlabel="path length")

# %%
# What it buys
# ------------
#
# The farther apart the two hills above, the fewer the images for which the way is not shorter. A shorter path is what
# least action buys for certain, as it is what is minimized. Whether it also buys accuracy is another question, which
# the table above cannot answer: it is one seed, one data set, and one setting that was not chosen on other images.

plain, least = (evaluate(network, [many]).accuracy for network in networks.values())
n = len(many[1])
print(f"least action less plain: {100 * (least - plain):+.1f} points,", end=" ")
print(f"{round((least - plain) * n):+} of {n} test images")

# %%
# Over many seeds, with learning rates chosen for each method and batch norm's statistics recomputed, little is left of
# the gains that the thesis behind the method reports on few images; wrong labels are where it helps.
# :doc:`/reproduction` has the comparisons, each with its interval, and :doc:`/how_to/training` the same objective with
# other tasks and other loops.
