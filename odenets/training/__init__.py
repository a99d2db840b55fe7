"""Training: data in batches, objectives, one loop, its evaluation, and a folder per run."""

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
