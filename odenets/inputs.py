"""Inputs of a network: a tensor x, a tuple ``(x, *args)``, or a mapping of what it takes by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "arguments",
    "call",
    "check_batches",
    "check_keywords",
    "exchanged",
    "has_rows",
    "inputs_in",
    "inputs_of",
    "is_by_keyword",
    "is_mask",
    "kind_of",
    "plain",
    "rows",
    "samples_in",
    "tensors_in",
]


def call(function: Callable[..., Any], inputs: Any, /, **options: Any) -> Any:
    """``function(x, **options)``, ``function(x, *args, **options)`` or ``function(**inputs, **options)``.

    Args:
        function: a network, or its ``record`` or ``steps``.
        inputs: x, ``(x, *args)``, or a mapping of inputs by keyword, such as a batch of Hugging Face's tokenizers.
        options: what it takes besides, such as measures.

    Raises:
        TypeError: a mapping, of what takes its inputs by position.
        ValueError: an input and an option of one name.

    >>> call(lambda x, y: x - y, (3, 1)), call(lambda x, y: x - y, {"y": 3, "x": 1})
    (2, -2)
    """
    if not is_by_keyword(inputs):
        return function(*arguments(inputs), **options)
    check_keywords(function, inputs, options)
    return function(**inputs, **options)


def check_keywords(function: Callable[..., Any], inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """That a function takes inputs by keyword, beside options of other names.

    Raises:
        TypeError, ValueError: as :func:`call`.
    """
    if both := [name for name in inputs if name in options]:
        raise ValueError(f"a name must be that of an input or of a measure, got {both} for both: rename the measure")
    if first := _by_position(function):
        raise TypeError(
            f"inputs must come by position, {first} or ({first}, *args), to a network that takes {first} so, got a "
            f"{kind_of(inputs)}"
        )


def _by_position(function: Callable[..., Any]) -> str:
    """The name of what a function takes by position alone, and must have; "" if there is none."""
    with suppress(TypeError, ValueError):  # of what has no signature
        parameters = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
        for p in parameters.values():
            if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
                return p.name
    return ""


def is_by_keyword(inputs: Any) -> bool:
    """Whether the inputs are a mapping, of what a network takes by keyword."""
    return isinstance(inputs, Mapping)


def arguments(inputs: Any) -> tuple[Any, ...]:
    """The arguments ``(x, *args)`` of a network for the inputs of a batch, a tensor or that tuple.

    Raises:
        TypeError: they come by keyword.

    >>> arguments(3), arguments((3, 1))
    ((3,), (3, 1))
    """
    if is_by_keyword(inputs):
        raise TypeError(
            f"inputs must come by position, x or (x, *args), where their order counts, got a {kind_of(inputs)}"
        )
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def plain(inputs: Any) -> Any:
    """The same inputs as a tensor, a tuple or a dictionary, which torch's trees know.

    >>> from collections import UserDict
    >>> plain([1, 2]), plain(UserDict(a=1))
    ((1, 2), {'a': 1})
    """
    if isinstance(inputs, list):
        return tuple(inputs)
    return dict(inputs) if is_by_keyword(inputs) else inputs


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors among the inputs of a batch, in their order.

    >>> import torch
    >>> [tuple(x.shape) for x in tensors_in({"x": torch.zeros(4, 2), "deep": True})]
    [(4, 2)]
    """
    parts = inputs.values() if is_by_keyword(inputs) else arguments(inputs)
    return [part for part in parts if isinstance(part, Tensor)]


def samples_in(inputs: Any, which: str = "a batch") -> int:
    """Samples in the inputs of a batch: the length of their first tensor, ``(B, ...)``.

    Of a mapping that is the first in its order: settings, and tensors without dimensions, may stand before it.

    Raises:
        TypeError: that is no tensor ``(B, ...)``.

    >>> import torch
    >>> samples_in(torch.zeros(4, 2)), samples_in({"output_attentions": False, "input_ids": torch.zeros(3, 7)})
    (4, 3)
    """
    if is_by_keyword(inputs):
        leaf: Any = next((x for x in tensors_in(inputs) if x.ndim), inputs)
    else:
        leaf = inputs if isinstance(inputs, Tensor) else next(iter(tree_leaves(inputs)), None)
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        raise TypeError(f"the inputs of {which} must be tensors (B, ...), got {kind_of(leaf)}")
    return len(leaf)


def rows(tree: Any, index: Any, samples: int) -> Any:
    """What is at ``index`` of every tensor of a tree that has one row for each of so many samples, the rest as it is.

    >>> import torch
    >>> rows({"x": torch.arange(4), "scale": torch.ones(1)}, slice(1, 3), samples=4)
    {'x': tensor([1, 2]), 'scale': tensor([1.])}
    """
    return tree_map(lambda leaf: leaf[index] if has_rows(leaf, samples) else leaf, tree)


def has_rows(leaf: Any, samples: int) -> bool:
    """Whether it is a tensor with one row for each of so many samples."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == samples


def kind_of(value: Any) -> str:
    """A value in words, for errors.

    >>> kind_of((1, 2)), kind_of({"input_ids": 1}), kind_of(None)
    ('tuple of 2 parts', "dict with ['input_ids']", 'NoneType')
    """
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} parts"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {list(value)[:6]}"
    if isinstance(value, Tensor):
        return f"one tensor {tuple(value.shape)}"
    return type(value).__name__


def inputs_of(batches: Any, name: str, network: nn.Module | None = None) -> Iterator[Any]:
    """The inputs of batches, as :func:`inputs_in` reads each: what takes inputs takes the loader of a training too.

    Args:
        batches: an iterable of batches, or a function that makes one.
        name: of the argument that holds them, for errors.
        network: what takes them, if that is known.

    Raises:
        TypeError: one batch in their place, or what is no iterable, or a batch without inputs.
        ValueError: there is none.

    >>> import torch
    >>> x, labels = torch.zeros(4, 2), torch.arange(4)
    >>> [tuple(inputs.shape) for inputs in inputs_of([x, (x, labels)], "batches")]
    [(4, 2), (4, 2)]
    """
    makes = callable(batches) and not isinstance(batches, Iterable | nn.Module | type)
    batches = cast(Any, batches)() if makes else batches
    check_batches(batches, name)
    empty = True
    for batch in batches:
        empty = False
        yield inputs_in(batch, name, network)
    if empty:
        raise ValueError(f"{name} must hold at least one batch, got none: was an iterator used up before?")


def check_batches(batches: Any, name: str) -> None:
    """That an argument of a ``name`` holds ``batches``, and is not one of them.

    Raises:
        TypeError: it is one tensor, whose entries are samples, one pair, or no iterable.
    """
    if isinstance(batches, np.ndarray):
        raise TypeError(
            f"{name} must hold batches of inputs, got an array {batches.shape}: torch.from_numpy makes a tensor"
        )
    if isinstance(batches, Tensor | Mapping | nn.Module | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must hold batches of inputs, got {kind_of(batches)}: a DataLoader, or [x] for one batch"
        )
    if isinstance(batches, tuple | list) and len(batches) == 2 and exchanged(*reversed(batches)):
        raise TypeError(f"{name} must hold batches, got one pair of inputs and labels: pass [(x, y)]")


def inputs_in(batch: Any, name: str, network: nn.Module | None = None) -> Any:
    """The inputs of a batch of them, or of a pair ``(inputs, labels)``, whose labels are not read.

    Several inputs by position are the first of a pair, ``((x, c), labels)``.

    Args:
        batch: a tensor, a mapping, or a pair.
        name: of the argument that holds it, for errors.
        network: what takes the inputs, if that is known.

    Raises:
        TypeError: it is neither inputs nor a pair, or a pair whose parts are exchanged, or one of tokens and their mask
            for a network that takes an ``attention_mask``.

    >>> inputs_in(((3, 1), 0), "batches")
    (3, 1)
    """
    if isinstance(batch, list | tuple):
        if not 1 <= len(batch) <= 2:
            raise TypeError(
                f"{name} must hold inputs or pairs (inputs, labels), got a {kind_of(batch)}: several inputs of "
                "one batch are ((x, c), labels), or a mapping"
            )
        if exchanged(*batch[:2]):
            raise TypeError(
                f"{name} must hold pairs (inputs, labels), got {kind_of(batch[0])} of {batch[0].dtype} before "
                f"{kind_of(batch[1])}: exchange them"
            )
        masked = network is not None and len(batch) == 2 and is_mask(batch[1], batch[0])
        if masked and "attention_mask" in inspect.signature(cast(nn.Module, network).forward).parameters:
            raise TypeError(
                f"{name} must hold inputs or pairs (inputs, labels), got a pair whose second tensor is a mask of the "
                "first, which would not be read: {'input_ids': ids, 'attention_mask': mask}"
            )
        batch = batch[0]
    if not isinstance(batch, Tensor | Mapping | list | tuple):
        remedy = "torch.as_tensor of an array, torchvision's to_tensor of a PIL image"
        raise TypeError(f"{name} must hold inputs, tensors (B, *S), got {kind_of(batch)}: {remedy}")
    return plain(batch)


def is_mask(x: Any, tokens: Any) -> bool:
    """Whether a tensor may be the mask of ``tokens``: whole numbers 0 and 1, one for each."""
    if not (isinstance(x, Tensor) and isinstance(tokens, Tensor) and x.shape == tokens.shape and x.ndim > 1):
        return False
    return not (x.is_floating_point() or x.is_complex() or tokens.is_floating_point()) and bool((x == x.bool()).all())


def exchanged(x: Any, y: Any = None) -> bool:
    """Whether what should be inputs x are labels, and what should be labels y are inputs.

    >>> import torch
    >>> exchanged(torch.arange(4), torch.zeros(4, 2))
    True
    """
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return x.ndim < 2 and not x.is_floating_point() and y.ndim > 1 and y.is_floating_point()
