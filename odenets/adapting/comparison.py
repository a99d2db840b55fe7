"""What a pass records beside what the program shows: the same steps, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from odenets.adapting.blocks import BlockSpec
from odenets.adapting.finding import Blocks, find
from odenets.adapting.flows import FlowObserver
from odenets.adapting.forward_pass import ForwardPass

__all__ = ["Comparison"]


class Comparison:
    """The steps with which those of each pass are compared.

    Args:
        blocks: the specifications of all steps.
        found: what the program shows; None of blocks that are named, where the first pass shows it.
        partial: whether passes may take other steps.

    Attributes:
        steps: the specification of each step of a pass; None before it is known.
    """

    def __init__(self, blocks: Sequence[BlockSpec], found: Blocks | None, partial: bool) -> None:
        self.blocks, self.found, self.partial = blocks, found, partial
        self.steps = None if found is None else found.steps
        self.ways = set() if found is None else {found.decisions}  # decisions of passes that take these steps
        self.kinds: tuple[type, ...] | None = None  # of the modules of a model that takes these steps

    def check(
        self,
        model: nn.Module,
        current: ForwardPass,
        observer: FlowObserver,
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> None:
        """Compare a pass, and the flows that it has called, with what was found.

        Args:
            model: whose pass it is.
            current, observer: the pass, and the flows in it.
            inputs, keywords: of the pass, whose program is looked at where it decides otherwise by its data.

        Raises:
            ValueError: other steps, without ``partial``; or none at all.
        """
        self.check_called(current)
        blocks = tuple(step.block for step in current.visited)
        if self.steps is None and set(blocks) == set(self.blocks):
            self.steps = blocks
        if self.partial:
            return
        self._check_way(model, current, inputs, keywords)
        others = {module: name for name, module in model.named_modules()} if observer.others else {}
        if self.found is not None and (more := [others[one] for one in observer.others if one in others]):
            raise ValueError(
                f"{len(more)} flows were not called when the blocks were found: {', '.join(more[:4])}{self._hint()}: "
                "partial=True leaves them out"
            )
        if blocks == self.steps:
            return
        if missing := [block.name for block in self.blocks if block not in blocks]:
            raise self._not_called(missing)
        raise ValueError(
            f"the blocks are called in another order or number than before, {len(blocks)} steps for "
            f"{len(self.steps or ())}{self._hint()}: partial=True accepts it, and the rows are the steps of each pass"
        )

    def check_called(self, current: ForwardPass) -> None:
        """That a pass takes a step, and in a graph, where no more is compared, as many as expected.

        Raises:
            ValueError: it does not.
        """
        if not current.visited:
            raise self._not_called([block.name for block in self.blocks])
        steps = len(self.steps or current.visited)
        if torch.compiler.is_compiling() and not self.partial and len(current.visited) != steps:
            got = len(current.visited)
            raise ValueError(f"this pass takes {got} steps, and {steps} are expected: partial=True accepts it")

    def _check_way(
        self, model: nn.Module, current: ForwardPass, inputs: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> None:
        """Look at the program too where a pass has decided otherwise by its data, or the model has other modules."""
        if self.found is None:
            return
        kinds = tuple(map(type, model.modules()))
        way = None if self.found.decisions is None else tuple(current.decisions)
        if way in self.ways and kinds == (self.kinds or kinds):
            self.kinds = kinds
            return
        steps = [spec.name for spec in find(model, inputs, keywords, partial=True).steps]
        if steps != [block.name for block in self.steps or ()]:
            raise ValueError(
                f"this pass takes other steps than those that were found, {', '.join(steps)}{self._hint()}: adapt the "
                'model again, or name those that all passes take, adapt(model, blocks=["layer1.0", ...])'
            )
        self.ways.add(way)
        self.kinds = kinds

    def _not_called(self, missing: Sequence[str]) -> ValueError:
        return ValueError(
            f"{len(missing)} of {len(self.blocks)} blocks are not called: {', '.join(missing[:4])}"
            f"{' ...' * (len(missing) > 4)}{self._hint()}; partial=True accepts it where some are"
        )

    def _hint(self) -> str:
        reads = () if self.found is None else self.found.reads
        return f" (the pass reads numbers from its data at {'; '.join(reads)})" if reads else ""
