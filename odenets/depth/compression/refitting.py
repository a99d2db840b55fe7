"""Refitting: the linear maps of a compressed network, one after another, to the states of the whole one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from odenets.depth.compression.calls import Calls
from odenets.depth.compression.candidates import Candidate, put
from odenets.depth.compression.last_maps import last_map
from odenets.depth.compression.least_squares import NormalEquations
from odenets.depth.compression.linear_maps import add_rows, has_constant, weights_of, with_weights
from odenets.depth.compression.positions import number_of
from odenets.depth.compression.units import lines_of

__all__ = ["refit"]


@torch.no_grad()
def refit(model: nn.Module, calls: Calls, runs: Sequence[Candidate]) -> None:
    """Fit the last linear map of every block behind the first change, in order, to the states of the whole network.

    Each is fitted on the states that reach it in the compressed network, so that it makes good what was lost before.
    Seams are fitted anew in the same way.

    Args:
        model: the compressed network, in eval mode, changed in place.
        calls: of the whole one, on the calibration data.
        runs: what was changed.
    """
    changed = {run.start: run for run in runs}
    begun = False
    for line in lines_of(calls.units):
        if calls.units[line[0]].adds:
            begun = begun or line[0] in changed
            continue
        whole = [calls.entry(b, line[0]) for b in range(len(calls.batches.inputs))]
        theirs = calls.in_model(model, line) if begun else calls
        states = [theirs.entry(b, line[0]) for b in range(len(whole))]
        at = 0
        while at < len(line):
            run = changed.get(line[at])
            stop = at + 1 if run is None else at + run.stop - run.start
            begun = begun or run is not None
            ends = [calls.along(b, line[at:stop], x)[-1] for b, x in enumerate(whole)]
            whole, wanted = [end.x1 for end in ends], [end.before for end in ends]
            if begun:
                m = line[at] if run is None else run.place
                if run is None or run.kept is not None:
                    _refit_block(model, theirs, m, states, wanted)
                elif run.module is not None:
                    _refit_seam(model, theirs, m, states, wanted)
                module = model.get_submodule(calls.units[m].name)
                states = [theirs.output(b, m, x, module) for b, x in enumerate(states)]
            else:
                states = [*whole]
            at = stop


def _refit_block(model: nn.Module, calls: Calls, m: int, states: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Fit the last linear map of the block in the place of unit ``m``, if it has one."""
    name = calls.units[m].name
    module = model.get_submodule(name)
    if calls.maps[m] is None or type(module) is not type(calls.modules[m]):
        return
    last = last_map(module, calls.units[m], *calls.call(0, m, states[0]))  # scales are not those of the whole network
    if last is None:
        return
    layer = module.get_submodule(last.name)
    if _rows(calls, wanted, len(last.scale)) < len(weights_of(layer)):
        return
    sums = NormalEquations(len(weights_of(layer)) - 1, len(last.scale), has_constant(layer))
    for b, x in enumerate(states):
        own = calls.passage(b, m, x, module, last)
        features, output = own.of_map
        target = last.target(own.before, output, wanted[b])
        add_rows(sums, layer, features, target, x, held_out=calls.batches.held_out[b], tokens=calls.batches.tokens(b))
    fit = sums.solve(last.prior(layer))
    put(model, name, last.put(module, fit.weight, fit.bias))


def _refit_seam(model: nn.Module, calls: Calls, m: int, states: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Fit the seam in the place of unit ``m``."""
    name = calls.units[m].name
    (path, layer), *_ = [
        (path, one) for path, one in model.get_submodule(name).named_modules() if isinstance(one, nn.Linear | nn.Conv2d)
    ]
    prior = weights_of(layer)
    if _rows(calls, wanted, prior.shape[1]) < len(prior):
        return
    sums = NormalEquations(len(prior) - 1, prior.shape[1])
    for b, x in enumerate(states):
        add_rows(sums, layer, x, wanted[b], x, held_out=calls.batches.held_out[b], tokens=calls.batches.tokens(b))
    fit = sums.solve(prior)
    put(model, f"{name}.{path}" if path else name, with_weights(layer, fit.weight, fit.bias))


def _rows(calls: Calls, wanted: Sequence[Tensor], width: int) -> int:
    """Rows that there are to fit a map of so many outputs."""
    batches = calls.batches
    return sum(number_of(x, width, batches.tokens(b)) for b, x in enumerate(wanted) if not batches.held_out[b])
