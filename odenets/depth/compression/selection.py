"""What may become of the blocks of a network, and the network that a choice makes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from odenets.depth.compression.baselines import SCORES, longest_run, replace_me, scored
from odenets.depth.compression.calibration import batches_of
from odenets.depth.compression.calls import Calls
from odenets.depth.compression.candidates import Candidate, applied, replaced
from odenets.depth.compression.changes import write_changes
from odenets.depth.compression.divergence import Kind, Outputs, run, tensor_in
from odenets.depth.compression.forward_hooks import put_to_sleep, wake_up
from odenets.depth.compression.indices import renumber
from odenets.depth.compression.judging import judged
from odenets.depth.compression.layer_lists import close_gaps
from odenets.depth.compression.origins import name_origins, origin_of
from odenets.depth.compression.programming import Best, cheapest, programmed
from odenets.depth.compression.refitting import refit
from odenets.depth.compression.runs import candidates_of
from odenets.depth.compression.units import find_units, lines_of
from odenets.depth.compression.unrolling import rolled, unrolled
from odenets.flow import Flow
from odenets.modes import dtype_of, evaluating, inputs_for
from odenets.network import Chain
from odenets.normalization import recalibrate

__all__ = ["Search", "Settings"]

PARTS = 20
"""Into how many parts the multiplications of an average block are counted."""


@dataclass(frozen=True)
class Settings:
    """How a network is compressed; the arguments of :func:`compress`."""

    by: str
    choices: tuple[str, ...]
    kernels: tuple[int, ...]
    longest: int
    statistics: bool
    refit: bool
    samples: int
    outputs: Kind


class Search:
    """The candidates of a network, and what is built of them.

    Args:
        model: the network.
        calibration: batches of inputs.
        settings: how it is compressed.
        progress: called with the number of candidates that have been judged, and of all.
        remove: how many blocks are to go, if that is known.
        held_out: batches that are held out; some of the calibration's if not given.

    Raises:
        ValueError: no block may go, or fewer than are to, or what a network cannot be compressed with.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Iterable[Any],
        settings: Settings,
        progress: Callable[[int, int], object],
        remove: int | None = None,
        held_out: Iterable[Any] | None = None,
    ) -> None:
        self.whole, self.settings, self.progress = model, settings, progress
        self.model = unrolled(name_origins(copy.deepcopy(model)))
        self._modes = {name: module.training for name, module in self.model.named_modules()} | {"": model.training}
        self.dtype = _half(self.model)  # in which nothing can be fitted
        if self.dtype is not None:
            self.model.float()
        self.model.eval()
        config: Any = getattr(self.model, "config", None)
        self.caches = bool(getattr(config, "use_cache", False))  # of keys and values, as Hugging Face's models make
        if self.caches:
            config.use_cache = False  # which calls of blocks would fill
        self.batches = batches = batches_of(calibration, self.model, held_out)
        if isinstance(model, Chain | Flow) and any(isinstance(x, tuple) and len(x) > 1 for x in batches.inputs):
            raise ValueError(
                "calibration must hold states alone for a Network or a Flow, whose blocks are run one by one: fields "
                "that take more than time and state cannot be compressed"
            )
        first = batches.first(settings.samples)
        put_to_sleep(self.model, first.inputs[0])
        self.held_out = Outputs.of(self.model, batches.on_which_to_choose().inputs, settings.outputs)
        self.judged = batches.on_which_to_choose(settings.samples)
        self.outputs = Outputs.of(self.model, self.judged.inputs, settings.outputs)
        self.units = find_units(self.model, first.inputs[0], first.samples[0])
        if remove is not None and remove > len(self.units):  # before a long search
            raise ValueError(f"remove must be at most {len(self.units)}, all blocks there are, got {remove}")
        self.macs = sum(unit.macs for unit in self.units) or 1
        self._check_same(model)
        self.calls = Calls(self.model, self.units, first)
        self.refused: dict[Candidate, str] = {}  # candidates with which the model does not run
        self.candidates = self._candidates()
        if not self.candidates:
            reasons = [f"{unit.name!r} {unit.reason}" for unit in self.units if unit.reason]
            reasons += [
                f"{self.units[one.place].name!r} is read from outside: {why}" for one, why in self.refused.items()
            ]
            tried = f"{', '.join(settings.choices)} of up to {settings.longest} of {len(self.units)} blocks was tried"
            raise ValueError(
                f"no block may go and nothing may take the place of several: {'; '.join([tried, *reasons])}"
            )
        average = max(1, self.macs // len(self.units))
        cost = self._cost
        self.by_number: Best = programmed(
            self.candidates, len(self.units), cost, lambda one: math.ceil(PARTS * one.added / average), PARTS
        )
        self.by_saving: Best = programmed(
            self.candidates, len(self.units), cost, lambda one: PARTS * one.saved // average
        )

    @torch.no_grad()
    def _check_same(self, model: nn.Module) -> None:
        """That the copy computes what the model does in eval mode, which a flow that is taken apart might not."""
        with evaluating(model):
            output = tensor_in(run(model, inputs_for(model, self.outputs.inputs[0]))).float()
        other = self.outputs.outputs[0].float()
        near = {"rtol": 1e-3, "atol": 1e-4} if dtype_of(model) == dtype_of(self.model) else {"rtol": 0.1, "atol": 0.1}
        finite = other[other.isfinite()]
        scale = finite.abs().amax().clamp_min(1e-6) if finite.numel() else 1.0
        if not torch.allclose(output / scale, other / scale, equal_nan=True, **near):
            raise ValueError(
                f"{type(model).__name__} returns something else than its copy of single blocks, or than a second pass: "
                "it must compute the same each time in eval mode, and a Network's own forward pass"
            )

    def _cost(self, candidate: Candidate) -> float:
        value = candidate.divergence if self.settings.by == "divergence" else candidate.error
        return max(0.0, value) + 1e-9 if math.isfinite(value) else 1e9

    @torch.no_grad()
    def _candidates(self) -> list[Candidate]:
        settings, units = self.settings, self.units
        if settings.by not in ("divergence", "error"):
            return scored(self.calls, SCORES.get(settings.by, SCORES["influence"]))
        found: list[tuple[list[int], list[Candidate]]] = []
        for line in lines_of(units):
            if units[line[0]].adds:
                wanted = "remove" in settings.choices
                found.append((line, [Candidate(m, m + 1, "remove", saved=units[m].macs) for m in line if wanted]))
                continue
            options = {"choices": settings.choices, "kernels": settings.kernels, "longest": settings.longest}
            found.append((line, _worthwhile(candidates_of(self.calls, line, **options))))
        if settings.by == "error":
            return [one for _, candidates in found for one in candidates]
        done, total, kept = 0, sum(len(candidates) for _, candidates in found), []

        def progress(number: int) -> None:
            nonlocal done
            done += number
            self.progress(done, total)

        calls = Calls(self.model, units, self.judged)
        for line, candidates in found:
            for one in judged(calls, line, candidates, self.outputs, progress):
                if isinstance(one, Candidate):
                    kept.append(one)
                else:
                    self.refused[one[0]] = one[1]
        return kept

    @property
    def removable(self) -> list[int]:
        """Numbers of blocks that may go, rising."""
        if self.settings.by == "replaceme":
            return [*range(1, longest_run(self.units) + 1)]
        return sorted({gone for gone, _ in self.by_number} - {0})

    def runs(self, remove: int | None, keep: float | None) -> tuple[Candidate, ...]:
        """The best runs for a number of blocks, or a share of their multiplications that is kept.

        Raises:
            ValueError: more than may go.
        """
        if self.settings.by == "replaceme":
            return self._replace_me(remove, keep)
        if remove is not None:
            runs = cheapest(self.by_number, lambda gone, _: gone == remove)
            if runs is None:
                if remove > (most := max(self.removable, default=0)):
                    raise ValueError(f"remove must be at most {most} of the {len(self.units)} blocks, got {remove}")
                raise ValueError(f"remove must be one of {self.removable} with these choices, got {remove}")
            return runs
        assert keep is not None
        wanted = PARTS * (1 - keep) * len(self.units)
        runs = cheapest(self.by_saving, lambda _, saved: saved >= wanted)
        if runs is None:
            least = 1 - max(saved for _, saved in self.by_saving) / PARTS / len(self.units)
            least = math.ceil(1000 * least) / 1000  # rounded down it would be refused in turn
            raise ValueError(f"keep must be at least {least:.3f} of the multiplications of the blocks, got {keep}")
        return runs

    def _replace_me(self, remove: int | None, keep: float | None) -> tuple[Candidate, ...]:
        """ReplaceMe's run of so many blocks, or of as few as save so much."""
        for number in self.removable if remove is None else [remove]:
            runs = replace_me(self.calls, number)
            if keep is None or self.macs_kept(runs) <= keep:
                return runs
        raise ValueError(f"keep must be more than by='replaceme' can do with one run, got {keep}")

    def macs_kept(self, runs: Sequence[Candidate]) -> float:
        """Share of the blocks' multiplications that is taken with ``runs`` changed."""
        return 1 - sum(run.saved for run in runs) / self.macs

    def curve(self) -> list[dict[str, Any]]:
        """The divergence for each number of blocks that may go."""
        rows = []
        for gone in self.removable:
            runs = self.runs(gone, None)
            with replaced(self.model, self.units, runs):
                divergence = self.outputs.divergence(self.model)
            rows.append({"gone": gone, "macs kept": self.macs_kept(runs), "divergence": divergence})
        return rows

    def _check_gone(self, runs: Sequence[Candidate]) -> None:
        """That the blocks that go are not run by another way than their names."""
        called: list[str] = []
        hooks = [
            self.calls.modules[m].register_forward_pre_hook(lambda *_, m=m: called.append(self.units[m].name))
            for one in runs
            for m in one.positions_gone
        ]
        try:
            with replaced(self.model, self.units, runs):
                run(self.model, self.batches.inputs[0])
        finally:
            for hook in hooks:
                hook.remove()
        if called:
            raise ValueError(
                f"block {called[0]!r} is run by another way than its name, as from a plain list of modules, and cannot "
                "go: the model must call its blocks as its parts"
            )

    def _mode(self, name: str) -> bool:
        """Whether a module was in training mode; of a new one, what it stands for."""
        while name not in self._modes:
            name = name.rpartition(".")[0]
        return self._modes[name]

    def _better(self, model: nn.Module, other: nn.Module) -> nn.Module:
        """The ``other``, unless its outputs diverge more."""
        return other if self.held_out.divergence(other) <= self.held_out.divergence(model) else model

    @torch.no_grad()
    def build(self, runs: Sequence[Candidate]) -> tuple[nn.Module, float]:
        """The network with ``runs`` changed and the rest refitted, and the divergence of its outputs."""
        self._check_gone(runs)
        model = applied(self.model, self.units, runs)
        if self.settings.statistics:
            other = copy.deepcopy(model)
            recalibrate(other, iter(self.batches.inputs), lambda inputs: run(other, inputs))
            ours = self.settings.by in ("divergence", "error")  # what others do is done as they do it
            model = self._better(model, other) if ours else other
        if self.settings.refit:
            other = copy.deepcopy(model)
            refit(other, Calls(self.model, self.units, self.batches), runs)
            model = self._better(model, other)
        modes = {module: self._mode(name) for name, module in model.named_modules()}
        gone = {self.units[m].name for one in runs for m in one.positions_gone}
        renumber(model, self.batches.inputs[0], gone, self.model)
        close_gaps(model, self.batches.inputs[0])
        divergence = self.held_out.divergence(model)
        if self.caches:
            cast(Any, model).config.use_cache = True
        model = rolled(model, self.whole, self.batches.inputs[0])
        wake_up(model)
        for module in model.modules():
            module.training = modes.get(module, self.whole.training)
        if self.dtype is not None:
            _narrow(model, self.whole, self.dtype)
        write_changes(model, self.whole)
        return model, divergence


def _half(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model all of whose weights are of one in half precision, whatever its buffers are of."""
    dtypes = {x.dtype for x in [*model.parameters()] or [*model.buffers()] if x.is_floating_point()}
    return dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else None


def _narrow(model: nn.Module, whole: nn.Module, dtype: torch.dtype) -> None:
    """Take a compressed ``model`` to a ``dtype``, but for buffers of another one in the ``whole``."""
    others: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        if (origin := origin_of(module)) is not None:
            own = whole.get_submodule(origin)._buffers
            for key, buffer in module._buffers.items():
                before = own.get(key)
                if buffer is not None and before is not None and before.dtype != dtype:
                    others.append((module, key, buffer.to(before.dtype)))
    model.to(dtype)
    for module, key, buffer in others:
        module._buffers[key] = buffer


def _worthwhile(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those candidates of each run than which none saves as much with a smaller error."""
    by_run: dict[tuple[int, int], list[Candidate]] = {}
    for one in candidates:
        by_run.setdefault((one.start, one.stop), []).append(one)
    return [
        one
        for run in by_run.values()
        for one in run
        if not any(other.saved >= one.saved and other.error < one.error and other.gone >= one.gone for other in run)
    ]
