"""
A detector for a trained network
================================

You learn how to tell manipulated images by the path they take through a network: you attack a
network of your own, fit a detector on what its blocks do to clean and to attacked images, and test
it on images it has not seen. You see what such a detector recognizes, and what it does not.

It takes about twenty seconds to run and fifteen minutes to read. You know PyTorch and have heard of
scikit-learn; attacks come from the Adversarial Robustness Toolbox (``pip install
'odenets[detection]'``).
"""

# %%
# A network, and images it has not seen
# -------------------------------------

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve

import odenets
from odenets import detection, measures, plotting
from odenets.detection import Detector, Pipeline, QuantileTest, Trajectory, preset, run_attack
from odenets.training import Batches, evaluate, fit, load

# %%
# The detector is fitted and tested on images that the network was not trained on. On its training
# images a network behaves otherwise, and a detector would learn that instead.

torch.manual_seed(0)
train, test = load("digits")
seen, unseen = train.subset(torch.arange(700)), train.subset(torch.arange(700, len(train)))
images, labels = torch.cat([unseen.x, test.x]), torch.cat([unseen.y, test.y])

network = odenets.models.small_network(solver="bs23", depth=3)
optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
fit(network, Batches(seen, 50, seed=0), epochs=8, optimizer=optimizer)
network.eval()
accuracy = evaluate(network, Batches((images, labels), 500)).accuracy
print(f"accuracy on {len(images)} new images: {accuracy:.1%}")

# %%
# Attacks
# -------
#
# :func:`odenets.detection.run_attack` lets ART attack the network. FGM takes one step along the
# sign of the gradient, BIM several small ones. No pixel changes by more than ``eps``. With a cache,
# batches that were attacked before are read and not computed again; here it is a temporary folder.

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
attacks = {"FGM": preset("FGM", eps=0.1), "BIM": preset("BIM", eps=0.1, eps_step=0.02, max_iter=10)}
attacked = {}
for name, attack in attacks.items():
    attacked[name] = run_attack(network, attack, images, labels, cache=folder / "attacks")
    print(f"{name}: {attacked[name].success_rate:.1%} of the right predictions become wrong")

# %%
# The first images, clean and attacked. To an eye the digits stay what they were.

columns = [images[:4], attacked["FGM"].images[:4], attacked["BIM"].images[:4]]
figure = plotting.pictures(torch.stack(columns, 1).numpy(), ["clean", *attacks])

# %%
# The path of an image
# --------------------
#
# A *trajectory* is what the blocks do to an image: for each block the mean square of its residue
# and its cosine with a fixed vector, and for Runge-Kutta blocks also those of the single stages and
# the embedded error. They are read off the network's own forward pass, in which nothing is changed.

features = Trajectory("residue", "cosine", "stages", "error")
print(features(network, images[:5]).shape, features.names(network)[:4], "...")
for name, x in {"clean": images, **{name: attacked[name].images for name in attacked}}.items():
    _, records = network.record(x, action=measures.action)
    means = [f"{value:.4f}" for value in records["action"].mean(1).tolist()]
    print(f"{name:>5}: mean action of the blocks {', '.join(means)}")

# %%
# The means hardly differ: an attack changes the path of an image little, and clean images differ a
# great deal among themselves. That is why a classifier of all features together is fitted, and why
# it cannot be perfect.
#
# Fit, predict, score
# -------------------
#
# :func:`odenets.detection.split` divides the images by index, so that a clean image and its
# attacked copy are always in the same part. A :class:`odenets.detection.Pipeline` is network,
# features and detector; here the detector is a random forest for each class that the network
# predicts (``mode="conditional"``), since the path depends on the class.

parts = detection.split(len(images), test=0.4)
pipelines = {}
for mode in ("general", "conditional"):
    pipelines[mode] = Pipeline(network, features, Detector(mode=mode, random_state=0))
    pipelines[mode].fit(images[parts.fit], attacked["FGM"].images[parts.fit])
pipeline = pipelines["conditional"]
print("ten clean images, 1 is called adversarial:", pipeline.predict(images[parts.test][:10]))

# %%
# Both have seen FGM only. BIM is an attack that they were not fitted on.

for mode in pipelines:
    for name in attacked:
        x, fools = attacked[name].images[parts.test], attacked[name].success[parts.test]
        scores = pipelines[mode].evaluate(images[parts.test], x, successful=fools)
        print(f"{mode}, {name}: area under the curve {scores.auroc:.3f}")
        print(f"  detected {scores.detected:.0%}, false alarms {scores.false_positives:.0%}")
        print(f"  detected of those that fool the network {scores.detected_successful:.0%}")

# %%
# The receiver operating characteristic: which share of the attacked images is detected, if one
# accepts so many false alarms. The diagonal is guessing.

false, curves = detection.FALSE_POSITIVE_RATES, {}
for name in attacked:
    for mode in pipelines:
        clean = pipelines[mode].scores(images[parts.test])
        adversarial = pipelines[mode].scores(attacked[name].images[parts.test])
        truth = np.repeat([0, 1], [len(clean), len(adversarial)])
        rates = roc_curve(truth, np.concatenate([clean, adversarial]))
        curves.setdefault(name, {})[mode] = np.interp(false, rates[0], rates[1])
figure = plotting.operating_characteristics(curves, false)

# %%
# The scores themselves. Images to the right of the line are called adversarial; where the two kinds
# overlap, no threshold separates them.

kinds = {"clean": images, "FGM": attacked["FGM"].images, "BIM": attacked["BIM"].images}
scores = {name: pipeline.scores(x[parts.test]) for name, x in kinds.items()}
title = "one forest for each class"
figure = plotting.histograms({title: scores}, xlabel="score", lines={title: [0.0]})

# %%
# A test that has seen no attack
# ------------------------------
#
# Attacked images are not always at hand. :class:`odenets.detection.QuantileTest` is fitted on clean
# images alone: it sounds the alarm where the action of the whole network is larger or smaller than
# that of nearly all of them. ``level`` is the rate of false alarms that it may have. Foreign
# inputs, which are no digits, are what it is for.

test_of_action = Pipeline(network, Trajectory("action"), QuantileTest(level=0.05, side="both"))
test_of_action.fit(images[parts.fit])
torch.manual_seed(1)
foreign = {
    "clean": images[parts.test],
    "FGM": attacked["FGM"].images[parts.test],
    "noise": torch.rand(400, 1, 8, 8),
    "inverted": 1 - images[parts.test],
    "shifted": images[parts.test].roll(3, dims=3),
}
for name, x in foreign.items():
    alarms = pipeline.predict(x).mean(), test_of_action.predict(x).mean()
    print(f"{name:>8}: {alarms[0]:.0%} called adversarial, {alarms[1]:.0%} outside the quantiles")

# %%
# Foreign is what lies outside the bounds of the test; an attack of this size hardly changes the
# action.


def action(x):
    with torch.no_grad():
        _, records = network.record(x, action=measures.action)
    return records["action"].sum(0).numpy()


actions = {name: action(foreign[name]) for name in ("clean", "FGM", "noise", "inverted")}
bounds = np.quantile(action(images[parts.fit]), [0.025, 0.975])
title = "action of the whole network"
figure = plotting.histograms({title: actions}, xlabel="action", lines={title: bounds})

# %%
# Saving
# ------
#
# Features and detector go to one file, without pickle, so that a file of another's can be opened;
# the network's weights are saved apart.

pipeline = pipelines["general"]
path = pipeline.save(folder / "detector")
again = Pipeline.load(path, network)
same = np.array_equal(again.scores(images[parts.test]), pipeline.scores(images[parts.test]))
print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB, the same scores: {same}")
temporary.cleanup()

# %%
# What it sees, and what not
# --------------------------
#
# - The detector is better than guessing and far from an alarm system: look at the false alarms
#   beside the detections before you act on one. On small images, detectors that look at the pixels
#   alone do better; the experiments say by how much.
# - It recognizes what it was fitted on, and what is like it. The quantile test recognizes what
#   moves through the network unlike clean images; an attack that moves like them passes it.
# - An attacker who knows of the detector can get past it: :mod:`odenets.detection` has three
#   attacks of this kind. It does not replace a network that is robust.
