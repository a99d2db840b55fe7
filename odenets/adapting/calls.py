"""What a call of an adapted model gives: inputs of the model, by position and by keyword, and measures by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odenets.adapting.program.places import tensors_in
from odenets.measures import Measure, StepFunction
from solvers.validation import check_state

__all__ = ["check_inputs", "cloned", "inputs_and_measures"]


def inputs_and_measures(model: nn.Module, named: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, StepFunction]]:
    """What a ``model`` takes by keyword, and the measures, among what is ``named``: functions are measures.

    Raises:
        TypeError: what is neither.

    >>> inputs_and_measures(nn.Linear(2, 2), {"input": 1, "norm": len})
    ({'input': 1}, {'norm': <built-in function len>})
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # of a script, which has none
        takes, anything = [], True
    else:
        takes = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    keywords, measures = {}, {}
    for name, value in named.items():
        if isinstance(value, Measure) or (callable(value) and name not in takes):
            measures[name] = value
        elif name in takes or anything:
            keywords[name] = value
        else:
            inputs = ", ".join(takes) or "none by keyword"
            if isinstance(value, Tensor):
                raise TypeError(f"the model takes no input {name!r}, which is a tensor; its inputs are {inputs}")
            raise TypeError(
                f"measure {name!r} must be a function Step -> (B,), got {type(value).__name__}, and the model takes no "
                f"input of that name: {inputs}"
            )
    return keywords, measures


def check_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """That the first tensor of more than one dimension in ``args`` and ``kwargs`` is finite, if it is floating.

    Raises:
        ValueError: it is not.
    """
    x = next((x for _, x in tensors_in((args, dict(kwargs))) if x.ndim > 1), None)
    if x is not None and x.is_floating_point():
        check_state(x)


def cloned(inputs: Any) -> Any:
    """The ``inputs`` with copies of their tensors, which are none of inference mode where that is off."""
    return tree_map_only(Tensor, torch.clone, inputs)
