"""Adaptive depth: the embedded errors of Runge-Kutta blocks add and remove blocks [K24, section 6.2].

As a solver refines its steps where their error is large, a network gets blocks where theirs is: :class:`AdaptiveDepth`
does so between the epochs of a training, :func:`adapt_depth` once, by a :class:`DepthRule`. :class:`Doubling` and
:class:`Stacking` grow a network at given epochs instead. In a trained network, :class:`SampleSteps` lets each sample
take steps of its own size, and :class:`EarlyExit` leave behind the first head that is sure of it.
:func:`compress` takes blocks out of any trained residual network without training, :func:`unroll_last` repeats a
flow's last block, and :func:`share_last` lets its last ones share one field.

>>> from functools import partial
>>> import torch
>>> from odenets.depth import AdaptiveDepth, DepthRule
>>> from odenets.models import points_network
>>> from odenets.training import Batches, fit, points
>>> train, validation = points("moons", 60, seed=0), points("moons", 60, seed=1)
>>> network = points_network(solver="bs23", total_time=1.0, depth=2)
>>> rule = DepthRule(tolerance=1e-9, max_depth=6)
>>> training = fit(
...     network,
...     Batches(train, 20, seed=0),
...     epochs=2,
...     optimizer=partial(torch.optim.Adam, lr=0.01),
...     callbacks=[AdaptiveDepth(rule, Batches(validation, 60).inputs)],
... )
>>> [row["depth"] for row in training.rows], network.depth  # of each epoch, and now
([2, 4], 6)
"""

from odenets.depth.callback import AdaptiveDepth
from odenets.depth.coarsening import Group, at_depth, coarsened, groups_at_depth, without_flow
from odenets.depth.compression import Compression, compress, heal, load_compressed
from odenets.depth.early_exit import EarlyExit, Exits
from odenets.depth.edits import DepthReport, Edit, adapt_depth, refine
from odenets.depth.elastic import ElasticDepth
from odenets.depth.exit_heads import fit_heads, pooled_head
from odenets.depth.growing import Doubling, Stacking, double, stack
from odenets.depth.repetition import share_last, unroll_last
from odenets.depth.resizing import resize_as
from odenets.depth.rule import DepthRule, block_errors, plan
from odenets.depth.sample_steps import SampleSteps, Walk

__all__ = [
    "AdaptiveDepth",
    "Compression",
    "DepthReport",
    "DepthRule",
    "Doubling",
    "EarlyExit",
    "Edit",
    "ElasticDepth",
    "Exits",
    "Group",
    "SampleSteps",
    "Stacking",
    "Walk",
    "adapt_depth",
    "at_depth",
    "block_errors",
    "coarsened",
    "compress",
    "double",
    "fit_heads",
    "groups_at_depth",
    "heal",
    "load_compressed",
    "plan",
    "pooled_head",
    "refine",
    "resize_as",
    "share_last",
    "stack",
    "unroll_last",
    "without_flow",
]
