"""Module-wise training: a network in modules, each trained by its own loss alone [K24, section 4]."""

from odenets.errors import WorkerLostError
from odenets.module_wise.baselines import auglocal, infopro, predsim
from odenets.module_wise.distributed.processes import fit_in_processes
from odenets.module_wise.fit import fit_modules
from odenets.module_wise.heads import conv_head, linear_head, token_head
from odenets.module_wise.modules import LocalModule, ModuleWise, split_into_modules
from odenets.module_wise.objectives import ModuleObjective, greedy, trgl, trgl_multipliers
from odenets.module_wise.partition import balanced, blocks_of, cut, even
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
