"""
Module-wise training
====================

You learn how to cut a network into modules that train without a gradient from one to another, what
the least-action term of TRGL changes about them, and what one gains: predictions after every
module, and training steps that need less memory. The network is a small one at first, then a
ResNet-18 of torchvision.

It takes about twenty seconds to run and fifteen minutes to read. You know PyTorch; nothing about
ODEs is needed, beyond that each residual block moves its data a little.
"""

# %%
# Four modules, each with a head
# ------------------------------
#
# Backpropagation keeps the states of all blocks until the loss is there. In *greedy* training the
# network is cut into modules; each gets a small head of its own, an auxiliary classifier, and
# minimizes its own loss. No gradient crosses from a module to the one before, so that nothing is
# kept beyond one module.

import time
from functools import partial

import matplotlib.pyplot as plt
import torch
import torchvision

import odenets
from odenets import measures, module_wise
from odenets.analysis import measure_memory
from odenets.module_wise import fit_modules, greedy, split_into_modules, trgl
from odenets.training import Batches, CrossEntropy, load, subsample

train, test = load("digits")
train = subsample(train, 300)  # few images, so that there is something left to learn

# %%
# :func:`odenets.module_wise.split_into_modules` cuts a network of eight residual blocks into four
# modules of two. It needs a few inputs to know the shapes of the states. The modules share the
# weights of the network: to train them is to train it.


def four_modules():
    torch.manual_seed(0)
    network = odenets.models.small_network(solver="euler", h=1.0, depth=8, features=8)
    return split_into_modules(network, 4, train.x[:8])


modules = four_modules()
for number, module in enumerate(modules.modules_in_order, start=1):
    weights = [sum(p.numel() for p in part.parameters()) for part in (module.part, module.head)]
    print(f"module {number}: {module.depth} blocks, {weights[0]} weights, {weights[1]} in its head")

# %%
# Greedy, TRGL, and backpropagation
# ---------------------------------
#
# :func:`odenets.module_wise.fit_modules` takes the data, optimizers and schedules that ``fit``
# takes. Its ``objective`` says what a module minimizes: :func:`odenets.module_wise.greedy` its
# cross-entropy, and :func:`odenets.module_wise.trgl` besides it the action of its blocks, that is
# how far they move the data. A greedy module uses up what its own head can use; one that moves the
# data no farther than needed leaves more to the modules behind it. The smaller ``tau``, the shorter
# the way. ``order="end-to-end"`` is backpropagation through the same blocks, from the last head
# alone.

trained = {}
for name, objective, order in (
    ("greedy", greedy(), "parallel"),
    ("TRGL", trgl(tau=5.0), "parallel"),
    ("backpropagation", greedy(), "end-to-end"),
):
    trained[name] = four_modules()
    sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    batches = Batches(train, 32, seed=0)
    options = {"epochs": 12, "optimizer": sgd, "objective": objective, "order": order}
    training = fit_modules(trained[name], batches, **options)
    print(f"{name}: training loss of the last head {training.rows[-1]['train_loss']:.3f}")

# %%
# Accuracies on images that no network has seen, after each module; and the action of each block,
# the mean square of how far it moves an image.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, modules in trained.items():
    accuracies = modules.accuracies(Batches(test, 500))
    _, records = modules.record(test.x, action=measures.action)
    style = "o--" if name == "backpropagation" else "o-"
    axes[0].plot(range(1, 5), accuracies, style, label=name)
    axes[1].semilogy(range(1, 9), records["action"].mean(1).detach(), style, label=name)
    print(name, " ".join(f"{accuracy:.1%}" for accuracy in accuracies))
axes[0].set(xlabel="module", ylabel="test accuracy", xticks=range(1, 5))
axes[1].set(xlabel="block", ylabel="action")
axes[1].legend()

# %%
# Left: the heads of the modules that backpropagation does not train guess; its last one is what the
# others are to be compared with. The modules trained one by one can all be used. Right: TRGL
# reaches its accuracies with a fraction of the action.
#
# Whether the action makes the later modules more accurate is another question. Here the difference
# is within what another seed does; the pages of the experiments say what many seeds give, with few
# images and with wrong labels. Do not expect more modules to be better on an easy task: the first
# head may have solved it.
#
# Early exits
# -----------
#
# ``modules.predict(x, module=k)`` stops after module k. The later ones are not called.

modules = trained["TRGL"]
for k in range(1, modules.K + 1):
    start = time.perf_counter()
    labels = modules.predict(test.x, module=k)
    milliseconds = 1e3 * (time.perf_counter() - start)
    accuracy = (labels == test.y).double().mean()
    print(f"exit {k}: {modules.ends[k - 1]} blocks, {milliseconds:.0f} ms, accuracy {accuracy:.1%}")

# %%
# An image may also leave as soon as a head is sure. ``modules.outputs(x)`` gives the logits after
# each module in turn.

modules.eval()
labels, exits = torch.zeros_like(test.y), torch.zeros_like(test.y)
with torch.no_grad():
    for k, logits in enumerate(modules.outputs(test.x), start=1):
        confidence, label = logits.softmax(1).max(1)
        leaves = (exits == 0) & ((confidence > 0.9) | (k == modules.K))
        labels[leaves], exits[leaves] = label[leaves], k
blocks = torch.tensor(modules.ends, dtype=torch.float64)[exits - 1].mean()
accuracy = (labels == test.y).double().mean()
print(f"accuracy {accuracy:.1%}, on average {blocks:.2f} of {modules.depth} blocks an image")
print("images that leave after each module:", torch.bincount(exits, minlength=5)[1:].tolist())

# %%
# Easy images leave early, hard ones late: the average number of blocks is what all of them cost.
# The bound on the confidence trades one for the other; choose it on validation images.
#
# A ResNet-18 of torchvision
# --------------------------
#
# :func:`odenets.adapt` finds the residual blocks of a model in a batch, without changing it; its
# modules are split like any other's. The digits become color images of 32 by 32 pixels.


def enlarge(x):
    return x.repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)


torch.manual_seed(0)
resnet18 = torchvision.models.resnet18(num_classes=10)
adapted = odenets.adapt(resnet18, enlarge(train.x[:2]))
modules = split_into_modules(adapted, 4, enlarge(train.x[:8]))
batches = Batches((enlarge(train.x), train.y), 50, seed=0)
testing = Batches((enlarge(test.x), test.y), 120)
fit_modules(modules, batches, epochs=4, optimizer=sgd, objective=trgl(tau=20.0))
before = modules.accuracies(testing)

# %%
# After so few steps the running statistics of batch norms lag behind the weights, and in eval mode
# a good network may look like a bad one. :func:`odenets.recalibrate` computes them anew from
# training images.

norms = odenets.recalibrate(modules, batches.inputs())
after = modules.accuracies(testing)
print(f"{norms} batch norms have new statistics")
for k, (old, new) in enumerate(zip(before, after, strict=True), start=1):
    print(f"module {k}: accuracy {old:.1%}, recalibrated {new:.1%}")

# %%
# ``resnet18`` itself has been trained, with its own last layer as the last head:

resnet18.eval()
with torch.no_grad():
    labels = resnet18(enlarge(test.x)).argmax(1)
print(f"torchvision's model: {(labels == test.y).double().mean():.1%}")

# %%
# Memory
# ------
#
# What a training step allocates is counted by :func:`odenets.analysis.measure_memory`. The network
# is a pre-activation ResNet of eighteen blocks, whose early states are large and later ones small.
# Cut into modules of equally many blocks, the first is by far the heaviest; ``balance="memory"``
# measures what each block keeps for its backward pass, and cuts so that the modules are equally
# heavy.

resnet = odenets.models.resnet110(blocks=6)
x, y = torch.rand(64, 3, 32, 32), torch.randint(10, (64,))


def peak_of_a_step(number, balance, step):
    modules = split_into_modules(resnet, number, x[:8], balance=balance).train()
    optimizers = [sgd(module.parameters()) for module in modules.modules_in_order]
    objectives = [CrossEntropy() for _ in optimizers]
    if step is module_wise.end_to_end_step:
        objectives, optimizers = objectives[0], sgd(modules.parameters())
    memory = measure_memory(lambda: step(modules, objectives, optimizers, x, y))
    mebibytes = memory.peak / 2**20
    print(f"{number} modules, equal in {balance}, end at {modules.ends}: {mebibytes:.0f} MiB")
    return mebibytes


# %%
# In a loop of your own :func:`odenets.module_wise.parallel_step` is the step that ``fit_modules``
# takes with each batch, and :func:`odenets.module_wise.end_to_end_step` that of backpropagation.

whole = peak_of_a_step(4, "blocks", module_wise.end_to_end_step)
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
for i, balance in enumerate(("blocks", "memory")):
    step = module_wise.parallel_step
    peaks = [peak_of_a_step(number, balance, step) for number in (2, 4, 8)]
    axis.bar([n + 0.38 * i for n in range(3)], peaks, 0.36, label=f"modules equal in {balance}")
axis.axhline(whole, color="gray", linestyle="--", label="backpropagation")
axis.set(xlabel="modules", ylabel="peak of a training step (MiB)")
axis.set_xticks([0.19, 1.19, 2.19], ["2", "4", "8"])
axis.legend(loc="upper left", bbox_to_anchor=(1, 1))

# %%
# The memory counted is that of states and gradients. Balancing looks at the states alone, which is
# what large images and large batches make the most of. Where gradients of weights outweigh them, as
# in the last layers of a ResNet-18 on small images, modules of equally many blocks may need less:
# measure, as here.
#
# What to take along
# ------------------
#
# - Modules need ``fit_modules``; the rest, from data to schedules, is as for ``fit``.
# - ``order="sequential"`` trains one module to its end before the next, and ``cache="memory"`` then
#   keeps the states before it, so that earlier modules are run once and not in every epoch.
# - :func:`odenets.module_wise.fit_in_processes` gives each module a process of its own.
