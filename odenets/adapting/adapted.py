"""AdaptedModel: a network as it is, each of its residual blocks seen as an Euler step with h = 1."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from odenets.adapting.blocks import Blocks, Place, find_blocks
from odenets.measures import Measure, reductions_of
from odenets.recording import Records, check_values
from solvers import Step, get_tableau
from solvers.reductions import displaced, mean_square_and_cosine
from solvers.validation import check_state

__all__ = ["AdaptedModel", "adapt"]

EULER = get_tableau("euler")


def adapt(
    model: nn.Module, blocks: Blocks | None = None, *, residue: Literal["displacement", "branch"] = "displacement"
) -> AdaptedModel:
    """A torchvision or timm classifier, or one like it, with the ``record`` of an :class:`odenets.Network`.

    Every residual block is a step ``x1 = x0 + r`` of the Euler method with h = 1, where r is what the block truly adds:
    ``x1 - x0``, after its last activation if it has one, or else what its branch gives before that.

    - A block that keeps the shape: x0 is its input, x1 its output. With a ReLU at the end, as in ResNet, ResNeXt and
      RegNet, ``r = relu(x0 + f) - x0 = max(f, -x0)`` for a branch f. (The thesis' own ResNeXt adds ``relu(f)``, so that
      its residues are not negative; torchvision's may be.)
    - A block with a projection (ResNet, RegNet): x0 is the projection's output. It may be negative, and then r is not
      zero where the branch is.
    - A transformer block (ViT, Swin) is two steps, attention and MLP, each after its stochastic depth.
    - A block without shortcut (MobileNet, stride 2) is no step; neither are layers between the blocks.
    - A plain network (VGG): each convolution or linear layer that keeps the shape, with the norm and activation after
      it, from the input x0 of the layer to the output x1 of the last of them.

    Args:
        model: used as it is, not copied. Hooks on its modules do nothing but in :meth:`AdaptedModel.record`.
        blocks: which modules are blocks; those that fit :data:`odenets.adapting.RULES`, or else the layers of a plain
            network, if not given. Names, ``["layer1.0", "layer1.1"]``: what a rule that fits says of such a module, or
            else one step from its input to its output; ``"features.2:features.4"`` is one from the input of the first
            to the output of the last. A dictionary, ``{"layer1.0": None, "layer2.0": "layer2.0.downsample"}``: one step
            each, from the output of the shortcut named, or from the input. Rules, ``[*RULES, Rule(...)]``.
        residue: "displacement", ``x1 - x0``; or "branch", of blocks with an activation behind the addition (ResNet,
            RegNet) the output of their branch instead, as the published code of the thesis has it. A branch that ends
            in a batch norm has, in training, the mean square ``gamma^2 + beta^2`` per channel whatever goes into it: a
            penalty on it acts on these two vectors alone, and a warning says so.

    Raises:
        TypeError: the model is no module, or blocks are neither names nor rules.
        ValueError: no block found, no module of such a name, blocks within blocks, or another residue.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from odenets import measures
    >>> output, records = adapt(resnet18().eval()).record(torch.randn(2, 3, 32, 32), action=measures.action)
    >>> records["action"].shape, records.starts
    (torch.Size([8, 2]), (0, 2, 4, 6))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if residue not in ("displacement", "branch"):
        raise ValueError(f"residue must be 'displacement' or 'branch', got {residue!r}")
    places = find_blocks(model, blocks)
    if residue == "displacement":
        places = tuple(replace(place, branch=None) for place in places)
    if normed := [p.name for p in places if p.branch and _ends_in_batch_norm(model.get_submodule(p.branch))]:
        warnings.warn(
            f"the branches of {len(normed)} blocks ({normed[0]}, ...) end in a batch norm: in training the mean square "
            "of their residues is gamma^2 + beta^2 of that layer, and a penalty on it moves nothing else; "
            'adapt(model, residue="displacement") takes what the block truly adds',
            stacklevel=2,
        )
    return AdaptedModel(model, places)


def _ends_in_batch_norm(module: nn.Module) -> bool:
    last = [m for m in module.modules() if not any(m.children())][-1]
    return isinstance(last, nn.modules.batchnorm._BatchNorm)


class _Seen(NamedTuple):
    """What is remembered of a step: its block, which step of the block it is, the shape of the state's samples."""

    place: Place
    part: int
    shape: tuple[int, ...]


class _Start(NamedTuple):
    """The state at which a step begins; a copy of it, where the block may write into it, and what tells its like."""

    x0: Tensor
    source: Tensor  # x0 as it passes, before it is given the shape of the block's input
    version: int
    copy: Tensor | None
    key: tuple[Place, int, bool, bool]  # step of the block, training mode, gradients

    @property
    def part(self) -> int:
        """Which step of the block begins."""
        return self.key[1]


class _End(NamedTuple):
    """A step that has ended, whose states are looked at again after the pass."""

    start: _Start
    x1: Tensor
    versions: tuple[int, int]  # of x0 and x1
    copy: Tensor | None  # of x1


class _Pass:
    """The steps of one forward pass, each measured as it ends.

    Args:
        measures: functions ``Step -> (B,)`` by name.
        x: the input.
        keep: whether steps are kept.
        writes: which steps write into their input, learned in the passes before.
        overwritten: which have their output written into after them.
    """

    def __init__(
        self,
        measures: dict[str, Measure],
        x: Any,
        keep: bool,
        writes: dict[tuple[Place, int, bool, bool], bool],
        overwritten: dict[tuple[Place, int, bool, bool], bool],
    ) -> None:
        self.measures, self.reductions, self.x, self.keep = measures, reductions_of(measures.values()), x, keep
        self.writes, self.overwritten = writes, overwritten
        self.all_reduced = all(
            getattr(measure, "reduction", None) in ("action", "residue") for measure in measures.values()
        )
        self.rows: dict[str, list[Tensor]] = {name: [] for name in measures}
        self.steps: list[Step] = []
        self.ends: list[_End] = []  # of steps that are kept or differentiated
        self.seen: list[_Seen] = []
        self.starting: dict[Place, _Start] = {}
        self.branches: dict[Place, Tensor] = {}
        self.gradients = torch.is_grad_enabled()
        self.without_gradients: Place | None = None

    def start(self, place: Place, x0: Any, training: bool, part: int = 0, source: Tensor | None = None) -> None:
        """A step of the block begins at x0, which is copied unless the block is known not to write into it."""
        x0, key = _state(place, x0), (place, part, training, torch.is_grad_enabled())
        needed = bool(self.measures) or self.keep
        copied = needed and (torch.compiler.is_compiling() or self.writes.get(key, True))
        self.starting[place] = _Start(
            x0, x0 if source is None else source, _version(x0), x0.clone() if copied else None, key
        )

    def restart(self, place: Place, x0: Any, training: bool) -> None:
        """The step of the block begins at x0, the output of its shortcut, instead."""
        before = self.starting.get(place)
        if before is not None and before.version != _version(before.x0):
            raise _changed(place)
        self.start(place, x0, training)

    def middle(self, place: Place, x: Any, training: bool) -> None:
        """One step of the block ends at x, and the other begins."""
        if place in self.starting and self.starting[place].part == 0:
            shape = self.starting[place].x0.shape
            source = x = _state(place, x)
            if x.shape != shape and x.numel() == shape.numel():
                x = x.reshape(shape)
            self.end(place, x)
            self.start(place, x, training, 1, source)

    def branch(self, place: Place, r: Any) -> None:
        """The branch of the block gives r."""
        if self.measures or self.keep:
            self.branches[place] = _state(place, r).clone()  # torchvision's blocks add to it in place

    def end(self, place: Place, x1: Any) -> None:
        """A step of the block ends at x1."""
        if place not in self.starting:
            raise ValueError(f"block {place.name!r} ends before it starts: {place.last!r} is called first")
        x1, start = _state(place, x1), self.starting.pop(place)
        x0, _, version, copied, key = start
        if x0.shape != x1.shape:
            raise ValueError(
                f"block {place.name!r} changes the shape of the state, {tuple(x0.shape)} to {tuple(x1.shape)}: name "
                f"the module of its shortcut, adapt(model, {{{place.name!r}: ...}}), or leave it out"
            )
        if isinstance(self.x, Tensor) and len(x0) != len(self.x):
            raise ValueError(f"block {place.name!r} has states of shape {tuple(x0.shape)} for {len(self.x)} samples")
        needed, counted = bool(self.measures) or self.keep, not torch.compiler.is_compiling()
        changed = version != _version(x0)
        if counted:
            self.writes[key] = changed or self.writes.get(key, False)
        if changed and (_memory(x1) is not _memory(x0) or (needed and copied is None)):
            raise _changed(place)
        self.seen.append(_Seen(place, start.part, tuple(x0.shape[1:])))
        if not needed:
            return
        if self.gradients and not torch.is_grad_enabled():
            self.without_gradients = place
        r = self.branches.pop(place, None) if place.branch else None
        if place.branch and r is None:
            if x1 is not x0 or changed:
                raise ValueError(
                    f"block {place.name!r} does not call its branch {place.branch!r} in this pass: take "
                    'adapt(model, residue="displacement")'
                )
            r = torch.zeros_like(x0)  # stochastic depth leaves the block out
        copy1 = None
        if counted and (self.keep or (torch.is_grad_enabled() and x1.requires_grad)):
            copy1 = x1.clone() if changed or self.overwritten.get(key, self.keep) else None
            start = start if self.keep else start._replace(copy=None)
            self.ends.append(_End(start, x1, (_version(x0), _version(x1)), copy1))
        begin = copied if copied is not None and (changed or not counted) else x0
        self._measure(begin, x1 if self.keep or copy1 is None else copy1, r)

    def _measure(self, x0: Tensor, x1: Tensor, r: Tensor | None) -> None:
        reductions = None
        dtype = torch.promote_types(x0.dtype, x1.dtype) if r is None else r.dtype
        x0, x1 = x0.to(dtype), x1.to(dtype)
        if self.reductions:
            square, cosine = displaced(x0, x1) if r is None else mean_square_and_cosine(r)
            reductions = {"action": square, "residue": square, "cosine": cosine}  # an Euler step's action with h = 1
        if r is None and (self.keep or not self.all_reduced):
            r = x1 - x0
        step = Step(float(len(self.seen) - 1), 1.0, x0, x1, () if r is None else (r,), EULER, reductions)
        for name, measure in self.measures.items():
            self.rows[name].append(check_values(name, measure(step), x0))
        if self.keep:
            self.steps.append(step)

    def close(self) -> list[str]:
        """After the pass: learn which outputs have been written into since their steps ended.

        Returns:
            The blocks whose records have no gradients therefore.

        Raises:
            ValueError: a state of a step that is kept has been written into, and there is no copy of it.
        """
        later = []
        for m, (start, x1, versions, copy1) in enumerate(self.ends):
            name, written = start.key[0].name, _version(x1) != versions[1]
            self.overwritten[start.key] = written or self.overwritten.get(start.key, False)
            if self.keep:
                step = self.steps[m]
                x0 = copy1 if start.x0 is x1 and start.version == versions[0] else start.copy
                if step.x0 is start.x0 and _version(start.x0) != versions[0]:
                    step = step._replace(x0=_copied(x0, name))
                if step.x1 is x1 and written:
                    step = step._replace(x1=_copied(copy1, name))
                self.steps[m] = step
            elif written and copy1 is None:
                later.append(name)
        return later


class _Taps:
    """What the hooks of a model share: the pass that is on in each thread, and what is known of writing in place."""

    def __init__(self) -> None:
        self.passes: dict[int, _Pass | None] = {}
        self.writes: dict[tuple[Place, int, bool, bool], bool] = {}
        self.overwritten: dict[tuple[Place, int, bool, bool], bool] = {}

    @property
    def on(self) -> _Pass | None:
        """The pass of this thread, if one is on: replicas of ``nn.DataParallel`` run in threads and share the hooks."""
        return self.passes.get(_thread())

    @contextmanager
    def passing(self, taken: _Pass | None) -> Iterator[None]:
        """The pass is on for a while in this thread, and then what was before."""
        thread = _thread()
        before = self.passes.get(thread)
        self.passes[thread] = taken
        try:
            yield
        finally:
            if before is None:
                del self.passes[thread]
            else:
                self.passes[thread] = before


def _changed(place: Place) -> ValueError:
    return ValueError(f"block {place.name!r} changes its input in place: give its first layers inplace=False")


def _copied(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(
            f"a state of block {name!r} is changed in place after it, and was not in earlier passes: call steps once "
            "more, or take record, which measures steps as they end"
        )
    return x


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state that a module is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _starts(taps: _Taps, place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (taken := taps.on) is not None:
        taken.start(place, _given(args, kwargs), module.training)


def _starts_again(taps: _Taps, place: Place, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (taken := taps.on) is not None:
        taken.restart(place, output, module.training)


def _between(taps: _Taps, place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (taken := taps.on) is not None:
        taken.middle(place, _given(args, kwargs), module.training)


def _ends(taps: _Taps, place: Place, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (taken := taps.on) is not None:
        taken.end(place, output)


def _branches(taps: _Taps, place: Place, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if (taken := taps.on) is not None:
        taken.branch(place, output)


class AdaptedModel(nn.Module):
    """A model and where the states of its blocks pass; :func:`adapt` makes it.

    Its ``state_dict`` is that of the model under ``model.``: ``plain.load_state_dict(adapted.model.state_dict())``.
    ``print(adapted)`` lists the steps, and after the first pass the shapes of their states. Activation checkpointing
    inside the model must be off where measures are recorded with gradients. Several threads may record at once.

    A block may add in place to its input, ``x += branch(x)``; one that changes its input and returns another tensor,
    as with a first ``ReLU(inplace=True)``, is refused. Which blocks do so is learned in the first pass, which copies
    their inputs.

    Attributes:
        model: the model, as it was given.
        places: its blocks.

    Args:
        part_of: the whole of which this is a part; inputs of a part are states, which are not checked.
    """

    def __init__(self, model: nn.Module, places: tuple[Place, ...], *, part_of: AdaptedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.places = places
        self.training = model.training
        self._seen: list[_Seen] | None = None
        self._told = False
        self._whole = part_of is None
        if part_of is not None:  # its modules have the hooks of the whole
            self._taps = part_of._taps
            return
        self._taps = taps = _Taps()
        for place in places:
            first = model.get_submodule(place.first)
            first.register_forward_pre_hook(partial(_starts, taps, place), with_kwargs=True)
            model.get_submodule(place.last).register_forward_hook(partial(_ends, taps, place))
            if place.shortcut is not None:
                model.get_submodule(place.shortcut).register_forward_hook(partial(_starts_again, taps, place))
            if place.branch is not None:
                model.get_submodule(place.branch).register_forward_hook(partial(_branches, taps, place))
            for name in place.between:
                model.get_submodule(name).register_forward_pre_hook(partial(_between, taps, place), with_kwargs=True)

    @property
    def depth(self) -> int:
        """Number of steps, the rows of ``record``: of the last pass that was looked at, where each call of a block
        counts; before the first, one call of each block.
        """
        return len(self._steps_seen())

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each: 1."""
        return (1.0,) * self.depth

    @property
    def evaluations(self) -> int:
        """Evaluations of a branch in one forward pass: one per step."""
        return self.depth

    @property
    def names(self) -> tuple[str, ...]:
        """The module of each step; in the order of the rows of ``record`` from the first pass on."""
        return tuple(place.name for place, *_ in self._steps_seen())

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for inputs ``x`` ``(B, ...)``."""
        return self.record(x)[0]

    def record(self, x: Tensor, /, **measures: Measure) -> tuple[Tensor, Records]:
        """The model's output, and one ``(blocks, B)`` tensor per measure, in the order in which the blocks are called.

        Each step is measured as its block ends, and nothing of it is kept but what gradients need. ``records.starts``
        holds the rows at which the shape of the state changes.

        Args:
            x: inputs, ``(B, ...)``.
            measures: functions ``Step -> (B,)`` by name.

        Raises:
            TypeError, ValueError: x is no batch of finite inputs, a measure does not return ``(B,)``, or a block is
                none: it takes or returns no tensor, changes the shape or its input in place; or none is called.

        Warns:
            UserWarning: once, if some blocks are not called, or in another order or number than in earlier passes: the
                rows are the steps of this pass; if a block with weights is computed without gradients though they are
                enabled; if an output is changed in place after its block, so that it cannot be differentiated.
        """
        for name, measure in measures.items():
            if not callable(measure):
                raise TypeError(f"measure {name!r} must be a function Step -> (B,), got {type(measure).__name__}")
        if not measures and self._seen is not None:
            if self._whole:
                _check_input(x)
            with self._taps.passing(None):
                return self.model(x), Records({}, _flow_starts(self._seen))
        output, taken = self._run(x, measures)
        return output, Records(
            {name: torch.stack(values) for name, values in taken.rows.items()}, _flow_starts(taken.seen)
        )

    def steps(self, x: Tensor, *, closing: bool = True) -> list[Step]:
        """Every step for inputs ``x``, with its states; warns as :meth:`record` does.

        Raises:
            TypeError, ValueError: as there.
        """
        return self._run(x, {}, keep=True)[1].steps

    def differentiable_steps(self, x: Tensor) -> tuple[Any, list[Step], list[Tensor]]:
        """The model's output, every step, and the states x0 through which a loss of the output can be differentiated.

        These are as they pass, which may be another shape than the block's.

        Raises:
            ValueError: such a state is changed in place.
        """
        output, taken = self._run(x, {}, keep=True)
        for end in taken.ends:
            if end.start.version != _version(end.start.x0):
                raise ValueError(
                    f"block {end.start.key[0].name!r} has a state that is changed in place, of which there is no "
                    "gradient: give it and the layers after it inplace=False"
                )
        return output, taken.steps, [end.start.source for end in taken.ends]

    def _run(self, x: Tensor, measures: dict[str, Measure], keep: bool = False) -> tuple[Tensor, _Pass]:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # where changes in place are counted
                return self._run(x.clone() if isinstance(x, Tensor) else x, measures, keep)
        if self._whole:
            _check_input(x)
        taken = _Pass(measures, x, keep, self._taps.writes, self._taps.overwritten)
        with self._taps.passing(taken):
            output = self.model(x)
        if not taken.seen:
            names = [place.name for place in self.places]
            raise ValueError(f"none of the blocks was called: {', '.join(names[:4])}{' ...' * (len(names) > 4)}")
        if not torch.compiler.is_compiling():
            self._tell(taken)
            self._seen = taken.seen
        return output, taken

    def _tell(self, taken: _Pass) -> None:
        """Warn of what records lack."""
        if later := taken.close():
            warnings.warn(
                f"the outputs of {len(later)} blocks ({later[0]}, ...) are changed in place after them: torch may "
                "refuse gradients of this pass' records; from the next pass on copies are measured",
                stacklevel=4,
            )
        place = taken.without_gradients
        if place and any(p.requires_grad for p in self.model.get_submodule(place.first).parameters()):
            warnings.warn(
                f"block {place.name!r} is computed without gradients, so that its records have none: under no_grad, or "
                "by activation checkpointing with use_reentrant=True, which is to be off while records are trained on",
                stacklevel=4,
            )
        calls = [(seen.place, seen.part) for seen in taken.seen]
        before = [(seen.place, seen.part) for seen in self._steps_seen()]
        if calls == before or self._told:
            return
        called = {place for place, _ in calls}
        unused = [place.name for place in self.places if place not in called]
        if unused or self._seen is not None:
            self._told = True
            what = "blocks are called in another order or number than before"
            if unused:
                what = f"{len(unused)} of {len(self.places)} blocks are not called, {', '.join(unused[:4])}"
            warnings.warn(
                f"{what}: the rows of records are the steps of this pass, in the order of names (said once)",
                stacklevel=4,
            )

    def _steps_seen(self) -> list[_Seen]:
        return self._seen or [_Seen(place, part, ()) for place in self.places for part in range(place.steps)]

    def extra_repr(self) -> str:
        return "; ".join(map(str, self.places))

    def __repr__(self) -> str:
        rows = []
        for m, (place, part, shape) in enumerate(self._steps_seen()):
            kind = f"{place.kind} {part + 1} of 2" if place.between else place.kind
            rows.append((str(m), place.name, kind, " x ".join(map(str, shape))))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{m:>{widths[0] + 2}}  {a:{widths[1]}}  {b:{widths[2]}}  {c}".rstrip() for m, a, b, c in rows]
        return "\n".join([f"AdaptedModel({type(self.model).__name__}, {len(rows)} steps)", *lines])


def _check_input(x: Any) -> None:
    """Inputs are checked here; states are not, so that a diverging network can be measured."""
    if isinstance(x, Tensor) and x.is_floating_point():
        check_state(x)


def _state(place: Place, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"block {place.name!r} must take and return a tensor, got {type(x).__name__}")
    return x


def _memory(x: Tensor) -> Tensor:
    """The tensor itself, or that of which it is a view."""
    return x if x._base is None else x._base


def _version(x: Any) -> int:
    """How often the tensor has been changed in place, where that is counted."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def _flow_starts(seen: list[_Seen]) -> tuple[int, ...]:
    return tuple(m for m, step in enumerate(seen) if not m or step.shape != seen[m - 1].shape)
