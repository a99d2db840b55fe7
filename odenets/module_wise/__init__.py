"""Module-wise training: a network in modules, each trained by its own loss alone [K24, section 4].

:func:`split_into_modules` cuts a network and gives each module a head; :func:`fit_modules` trains the modules on one
device, :func:`fit_in_processes` in a process each. No gradient crosses from one module to another: only one of them
needs memory for a backward pass at a time, and each is a classifier of its own.

>>> from functools import partial
>>> import torch
>>> from odenets.models import small_network
>>> from odenets.module_wise import ModuleWise, fit_modules, split_into_modules, trgl
>>> x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
>>> whole = small_network(solver="euler", h=1.0, depth=4)
>>> network: ModuleWise = split_into_modules(whole, 2, x[:2])
>>> options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "objective": trgl(tau=1.0)}
>>> training = fit_modules(network, [(x, y)], epochs=1, **options)
>>> [(row["module"], "train_accuracy" in row) for row in training.rows]
[(1, True), (2, True)]
>>> network.predict(x[:3], module=1).shape  # labels by the first module alone
torch.Size([3])
"""

from odenets.errors import WorkerLostError
from odenets.module_wise.baselines import auglocal, infopro, predsim
from odenets.module_wise.distributed.processes import fit_in_processes
from odenets.module_wise.fit import fit_modules
from odenets.module_wise.heads import conv_head, linear_head, token_head
from odenets.module_wise.modules import LocalModule, ModuleWise
from odenets.module_wise.objectives import ModuleObjective, greedy, trgl, trgl_multipliers
from odenets.module_wise.partition import balanced, blocks_of, cut, even
from odenets.module_wise.splitting import split_into_modules
from odenets.module_wise.steps import end_to_end_step, local_step, parallel_step
from odenets.module_wise.training import ModuleTraining

__all__ = [
    "LocalModule",
    "ModuleObjective",
    "ModuleTraining",
    "ModuleWise",
    "WorkerLostError",
    "auglocal",
    "balanced",
    "blocks_of",
    "conv_head",
    "cut",
    "end_to_end_step",
    "even",
    "fit_in_processes",
    "fit_modules",
    "greedy",
    "infopro",
    "linear_head",
    "local_step",
    "parallel_step",
    "predsim",
    "split_into_modules",
    "token_head",
    "trgl",
    "trgl_multipliers",
]
