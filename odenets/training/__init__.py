"""Training: data in batches, objectives, one loop, its evaluation, and a folder per run.

:func:`fit` trains any network that records its steps, :func:`evaluate` measures it; what they minimize is an
:class:`Objective`, what acts between their epochs a :class:`Callback`.

>>> from functools import partial
>>> import torch
>>> from odenets.models import points_network
>>> from odenets.training import Batches, evaluate, fit, hold_out, points
>>> from odenets.training import BestWeights, EarlyStopping
>>> train, held_out = hold_out(points("circles", 200, seed=0), 0.2)
>>> network = points_network(depth=2)
>>> stop, best = EarlyStopping(patience=2), BestWeights()
>>> training = fit(
...     network,
...     Batches(train, 40, seed=0),
...     epochs=3,
...     optimizer=partial(torch.optim.Adam, lr=0.01),
...     validation=Batches(held_out, 40),
...     callbacks=[stop, best],
... )
>>> evaluate(network, Batches(held_out, 40)).loss == best.best  # of the best epoch
True
"""

from odenets.errors import DivergedError
from odenets.training.callbacks import BestWeights, Callback, EarlyStopping
from odenets.training.data import Batches, Split, TensorData
from odenets.training.datasets import hold_out, load, points, split, subsample
from odenets.training.evaluation import Evaluation, evaluate, evaluate_schemes
from odenets.training.instances import Instances, fit_instances
from odenets.training.loop import fit
from odenets.training.metrics import accuracy
from odenets.training.objectives import CrossEntropy, Objective, ReverseCrossEntropy, Task
from odenets.training.runs import Run
from odenets.training.state import Training

__all__ = [
    "Batches",
    "BestWeights",
    "Callback",
    "CrossEntropy",
    "DivergedError",
    "EarlyStopping",
    "Evaluation",
    "Instances",
    "Objective",
    "ReverseCrossEntropy",
    "Run",
    "Split",
    "Task",
    "TensorData",
    "Training",
    "accuracy",
    "evaluate",
    "evaluate_schemes",
    "fit",
    "fit_instances",
    "hold_out",
    "load",
    "points",
    "split",
    "subsample",
]
