"""AdaptedModel: a network as it is, each of its residual blocks seen as an Euler step with h = 1."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.calls import check_inputs, cloned, inputs_and_measures
from odenets.adapting.comparison import Comparison
from odenets.adapting.finding import Blocks, find
from odenets.adapting.flows import FlowObserver, Row, lines_of, rows_of
from odenets.adapting.forward_pass import ForwardPass, Visited
from odenets.adapting.hooks import Hooks
from odenets.adapting.layouts import samples_of
from odenets.adapting.masking import Masking
from odenets.adapting.norms import warn_of_norms
from odenets.adapting.program.graph import FailedPass
from odenets.measures import StepFunction
from odenets.observing import observing
from odenets.recording import Records
from odenets.regrouping import OTHERS
from solvers import Step

__all__ = ["AdaptedModel"]

_MISSING: Any = object()
_FINDING = threading.RLock()


class AdaptedModel(nn.Module):
    """A model and where the states of its steps pass; :func:`~odenets.adapt` makes it and shows its use.

    Its ``state_dict`` is that of the model under ``model.``: ``plain.load_state_dict(adapted.model.state_dict())``.
    ``print(adapted)`` is a table of the steps, after the first pass with the shapes of their states, and of the
    projections at whose outputs they begin. Several threads may record at once.

    A block may add in place to its input, ``x += branch(x)``; one that changes its input and returns another tensor,
    as with a first ``ReLU(inplace=True)``, is refused. Which blocks do so is learned in the first pass, which copies
    their inputs. Blocks may be under ``torch.utils.checkpoint`` with ``use_reentrant=False``, as Hugging Face and timm
    have it: what is measured is kept, not computed again, and gradients are those without it.

    Attributes:
        hooks: what passes through them.
        partial: whether passes may take other steps than those that were found.
        residue: "displacement" or "branch", as :func:`~odenets.adapt` has it.
        masking: which tokens are measured, and whether rows of measures are of samples or of tokens.

    Args:
        model: the model itself, not a copy.
        blocks: where its states pass; they are found at the first batch if not given.
        partial, residue, masking: see the attributes.
        part_of: the whole of which this is a part; inputs of a part are states, which are not checked.

    >>> from odenets.adapting import adapt
    >>> layers = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    >>> adapt(nn.Sequential(*layers), displacement=True)
    AdaptedModel(Sequential, 2 steps)
      step  name  kind
         0  0:1   layer
         1  2:3   layer
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[BlockSpec] | None,
        *,
        partial: bool = False,
        residue: str = "displacement",
        masking: Masking | None = None,
        part_of: AdaptedModel | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.partial, self.residue = partial, residue
        self.masking = masking or (Masking() if part_of is None else part_of.masking)
        self.training = model.training
        self.hooks = Hooks() if part_of is None else part_of.hooks  # the modules of a part have the hooks of the whole
        self._whole = part_of is None
        self._named = None if blocks is None else tuple(blocks)
        self._blocks: tuple[BlockSpec, ...] | None = None
        self._compared: Comparison | None = None
        self._following: dict[str, BlockSpec] = {}
        self._visited: list[Visited] | None = None
        self._notes: tuple[str, ...] = ()  # what is not recorded of the program
        self._axis = 0  # of the inputs, along which the samples lie
        self._warned = False
        self._part_of = (part_of,)  # whose hooks stay as long as there are parts
        if part_of is None:
            weakref.finalize(self, self.hooks.detach).atexit = False
        if blocks is not None:
            self._take(blocks)

    def _take(self, blocks: Sequence[BlockSpec], found: Blocks | None = None) -> None:
        """Take the specifications of the steps, and those of a whole pass where they have been found."""
        self._blocks = tuple(blocks)
        pairs = zip(self._blocks, self._blocks[1:], strict=False)
        self._following = {before.name: block for before, block in pairs if block.start is None}
        self._compared = Comparison(self._blocks, found, self.partial)
        if found is not None:
            self._axis, self.hooks.decides = found.axis, found.decisions is not None
            self._notes = (*(f"a step that is not seen in {name}" for name in found.hidden), *found.others)
        if self._whole:
            self.hooks.attach(self.model, self._blocks)
            warn_of_norms(self.model, self._blocks, stacklevel=4)

    def find(self, *inputs: Any, **keywords: Any) -> Blocks | None:
        """Find the blocks in the program of a batch of ``inputs`` and ``keywords``, unless that has been done.

        Returns:
            What is found; None where they are known.

        Raises:
            ValueError: as :func:`~odenets.adapt`.
        """
        if self._blocks is not None:
            return None
        if torch.compiler.is_compiling():
            raise ValueError(f"the blocks are not found in a graph of torch.compile: {_GIVE}")
        with _FINDING:
            return self._find(inputs, keywords)

    def _find(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Blocks | None:
        """Find the blocks; one thread does, and others wait for it."""
        if self._blocks is not None:
            return None
        self._check_input(inputs, keywords)
        found = find(self.model, inputs, keywords, partial=self.partial)
        steps = [self._with_residue(spec) for spec in found.steps]
        found = replace(found, steps=tuple(steps))
        self._take(found.specs, replace(found, output=None))
        return found

    def _with_residue(self, spec: BlockSpec) -> BlockSpec:
        return spec if self.residue == "branch" else replace(spec, branch=None)

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """The specification of each step.

        Raises:
            ValueError: they are found at the first batch, and there was none.
        """
        if self._blocks is None:
            raise ValueError(f"the blocks are found at the first batch, and there was none: {_GIVE}")
        return self._blocks

    @property
    def depth(self) -> int:
        """Number of steps, the rows of ``record``.

        They are those of the last pass that was looked at, where each call of a block counts; before the first, those
        that were found, or one call of each block that was named.
        """
        return len(self._rows())

    @property
    def h(self) -> tuple[float, ...]:
        """Step size of each step, which is 1, and of those of a flow its own."""
        return tuple(row.h for row in self._rows())

    @property
    def evaluations(self) -> int:
        """Evaluations of a branch in one forward pass, one per step, and of fields of the flows in it."""
        flows = [self.model.get_submodule(one.block.block) for one in self._last_visited() if one.block.recorder]
        return sum(not row.block.recorder for row in self._rows()) + sum(flow.evaluations for flow in flows)  # type: ignore[misc]

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each step, as in ``records.blocks``.

        That is its module, "layer1.0", and which part of it a step of a transformer is, "blocks.0 attention" and
        "blocks.0 mlp"; with the number of the call where a block is called several times. In the order of the rows of
        ``record``.
        """
        return tuple(row.name for row in self._rows())

    def forward(self, x: Any = _MISSING, /, *inputs: Any, **keywords: Any) -> Any:
        """The model's output for its inputs, ``x`` and other ``inputs`` by position and ``keywords``, as it is."""
        return self._record(inputs if x is _MISSING else (x, *inputs), keywords, {})[0]

    def record(self, *inputs: Any, **named: Any) -> tuple[Any, Records]:
        """The model's output, and one ``(steps, B)`` tensor per measure, in the order in which the blocks are called.

        Each step is measured as its block ends, and nothing of it is kept but what gradients need. ``records.starts``
        holds the rows at which the shape of the state changes, ``records.blocks`` the names of the steps, as
        :attr:`names`.

        Args:
            inputs: of the model by position; the first tensor tells the number B of samples.
            named: measures, functions ``Step -> (B,)``, by their names; and what the model takes by keyword, as
                ``attention_mask=mask``.

        Returns:
            The output, and the records, ``(steps, B)`` by name; of tokens ``(steps, N)``, and ``records.tokens``.

        Raises:
            TypeError, ValueError: x is no batch of finite inputs, a measure does not return ``(B,)``, or a block is
                none: it takes or returns no tensor, changes the shape or its input in place; or the steps of the pass
                are others than those that were found, without ``partial``; or a mask is none of the states' tokens.

        Warns:
            UserWarning: once, with ``partial``, if the steps are others than in earlier passes: the rows are those of
                this pass; if a block with weights is computed without gradients though they are enabled; if an output
                is changed in place after its block, so that it cannot be differentiated.
        """
        return self._record(inputs, *inputs_and_measures(self.model, named))

    def _record(
        self, inputs: tuple[Any, ...], keywords: Mapping[str, Any], measures: dict[str, StepFunction]
    ) -> tuple[Any, Records]:
        if not measures and (self._visited is not None or torch.compiler.is_exporting()):
            self._check_input(inputs, keywords)
            with self.hooks.running(None, self.model):
                output = self.model(*inputs, **keywords)
            rows = self._rows() if self._blocks is not None else []  # in an export they may not have been found
            starts = tuple(m for m, row in enumerate(rows) if row.begins)
            return output, Records({}, starts or (0,), [row.name for row in rows])
        output, current = self._run(inputs, keywords, measures)
        return output, current.records()

    def steps(self, *inputs: Any, closing: bool = True, **keywords: Any) -> list[Step]:
        """Every step for the model's ``inputs`` and ``keywords``, with its states; warns as :meth:`record` does.

        The states are whole, with the tokens that a mask leaves out, which ``record`` does not measure.

        ``closing``: whether those of a flow carry the closing stages of its method.

        Raises:
            TypeError, ValueError: as there.
        """
        return self._run(inputs, keywords, {}, keep=True, closing=closing)[1].steps

    def output_and_steps(self, *inputs: Any, **keywords: Any) -> tuple[Any, list[Step]]:
        """The model's output, and every step, whole, in one pass; ``inputs`` and ``keywords`` as in :meth:`steps`."""
        output, current = self._run(inputs, keywords, {}, keep=True)
        return output, current.steps

    def differentiable_steps(self, *inputs: Any, **keywords: Any) -> tuple[Any, list[Step], list[Tensor]]:
        """The model's output, every step, and the states x0 through which a loss of the output can be differentiated.

        These are as they pass for ``inputs`` and ``keywords``, which may be another shape than the step's.

        Raises:
            ValueError: such a state is changed in place.
        """
        output, current = self._run(inputs, keywords, {}, keep=True)
        return output, current.steps, list(current.sources())

    def _run(
        self,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
        measures: dict[str, StepFunction],
        keep: bool = False,
        closing: bool = True,
    ) -> tuple[Any, ForwardPass]:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():  # where changes in place are counted
                inputs, keywords = cloned((inputs, dict(keywords)))
                return self._run(inputs, keywords, measures, keep, closing)
        self._check_input(inputs, keywords)
        try:
            self.find(*inputs, **keywords)
        except FailedPass as failed:
            raise (failed.__cause__ or failed) from None
        comparison = self._compared
        assert comparison is not None  # since the blocks are found
        samples = samples_of(inputs, keywords, self._axis)
        tokens = self.masking.tokens(self.model, inputs, keywords, samples) if measures else None
        current = ForwardPass(measures, samples, keep, self.hooks.in_place, self._following, tokens)
        flows = [(self.model.get_submodule(one.block), one) for one in self.blocks if one.recorder]
        observer = FlowObserver(current, flows, closing)
        with self.hooks.running(current, self.model), observing(observer):
            output = self.model(*inputs, **keywords)
        if torch.compiler.is_compiling():
            comparison.check_called(current)
        else:
            comparison.check(self.model, current, observer, inputs, keywords)
            self._warn(current)
            self._visited = current.visited
        return output, current

    def _check_input(self, inputs: Any, keywords: Mapping[str, Any]) -> None:
        """Inputs are checked here; states are not, so that a diverging network can be measured."""
        if self._whole:
            check_inputs(inputs, keywords)

    def _warn(self, current: ForwardPass) -> None:
        """Warn of what records lack."""
        if later := current.close():
            warnings.warn(
                f"the outputs of {len(later)} blocks ({later[0]}, ...) are changed in place after them: torch may "
                "refuse gradients of this pass' records; from the next pass on copies are measured",
                stacklevel=5,
            )
        block = current.without_gradients
        if block and any(p.requires_grad for p in self.model.get_submodule(block.block.partition(":")[0]).parameters()):
            warnings.warn(
                f"block {block.name!r} is computed without gradients, so that its records have none: under no_grad, or "
                "by activation checkpointing with use_reentrant=True, which is to be off while records are trained on",
                stacklevel=5,
            )
        if self._warned or [step.block for step in current.visited] == [one.block for one in self._last_visited()]:
            return
        self._warned = True
        warnings.warn(
            "blocks are called in another order or number than before: the rows of records are the steps of this pass, "
            "in the order of names (said once)",
            stacklevel=5,
        )

    def _last_visited(self) -> list[Visited]:
        """What the last pass has visited, or one that is to come will."""
        expected = self._compared.steps if self._compared is not None else None
        return self._visited or [Visited(block, ()) for block in expected or self.blocks]

    def _rows(self) -> list[Row]:
        return rows_of(self.model, self._last_visited())

    def extra_repr(self) -> str:
        """The residue and the blocks that are named, for the fingerprint; what is found follows from the model."""
        named = (f"{block.name}: {block.kind}, {block.projection}" for block in self._named or ())
        return "; ".join([self.residue, *named])

    def __repr__(self) -> str:
        kind, often = type(self.model).__name__, Counter(self._notes).items()
        if self._blocks is None:
            return f"AdaptedModel({kind}, its steps are found at the first batch)"
        rows, notes = self._rows(), [f"{note} ({n} times)" if n > 1 else note for note, n in often]
        lines = *lines_of(rows), *(f"  not recorded: {note}" for note in notes)
        return "\n".join([f"AdaptedModel({kind}, {len(rows)} steps)", *lines])

    def __getattr__(self, name: str) -> Any:
        if name == "at_depth":
            raise AttributeError(f"an adapted model has no at_depth, which is of flows: {OTHERS}", name=name, obj=self)
        return super().__getattr__(name)


_GIVE = "give one, adapt(model, torch.randn(2, 3, 32, 32)), or call the model once before"
