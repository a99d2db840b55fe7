"""Masking: which tokens of a batch are measured, and whether a row of measures is of a sample or of a token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from odenets.adapting.tokens import MAKE, OFF, Per, Tokens

__all__ = ["MASKS", "Mask", "Masking", "inputs_by_name"]

Mask = str | Callable[[Mapping[str, Any]], Tensor | None] | None
"""Where the mask of padding is: "auto", the name of an input, a function of the inputs by name, or nowhere."""

MASKS = {
    "attention_mask": True,
    "decoder_attention_mask": True,
    "patch_valid": True,
    "src_key_padding_mask": False,
    "tgt_key_padding_mask": False,
    "key_padding_mask": False,
    "padding_mask": False,
}
"""Inputs that say which tokens are padding, ``(B, T)``, and what they are where there is a token: those of Hugging Face
and of timm are 1 there, those of ``torch.nn`` and fairseq are True, or minus infinity, where there is padding."""

ENCODER, DECODER = {"attention_mask", "src_key_padding_mask"}, {"decoder_attention_mask", "tgt_key_padding_mask"}
"""Masks of a model that takes one of each: the states of its steps are of either's tokens."""

CACHES = "past_key_values", "cache"
"""Inputs that hold earlier tokens, of which there are no states: a mask says of them too what they are."""


@dataclass(frozen=True)
class Masking:
    """Which tokens an adapted model measures.

    Attributes:
        mask: "auto", an input of one of the names in ``MASKS``; the name of another, which is 1 where there is a token;
            a function of the inputs by name to a mask ``(B, T)`` that is True there, or to None where nothing is
            padded; None, everything is measured.
        per: what a row of measures is of.

    Raises:
        TypeError: a mask that is neither.
        ValueError: what is neither "sample" nor "token".

    >>> Masking(per="tokens")
    Traceback (most recent call last):
        ...
    ValueError: per must be 'sample' or 'token', got 'tokens'
    """

    mask: Mask = "auto"
    per: Per = "sample"

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise ValueError(f"per must be 'sample' or 'token', got {self.per!r}")
        if not (self.mask is None or isinstance(self.mask, str) or callable(self.mask)):
            raise TypeError(
                "mask must be 'auto', the name of an input, a function of the inputs by name, or None, got "
                f"{type(self.mask).__name__}"
            )

    def tokens(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], samples: int | None
    ) -> Tokens | None:
        """The tokens of a batch.

        Args:
            model: what takes the batch.
            args, kwargs: the batch, by position and by keyword.
            samples: B; None where that is not known.

        Returns:
            The tokens; None where measures are of samples none of which is padded.

        Raises:
            ValueError: a mask of another shape or of other numbers, a sample without tokens, several masks, or that of
                an encoder beside a decoder.
        """
        mask = None if self.mask is None else self._mask(inputs_by_name(model, args, kwargs), model, samples)
        return Tokens(mask, self.per) if mask is not None or self.per == "token" else None

    def _mask(self, inputs: Mapping[str, Any], model: nn.Module, samples: int | None) -> Tensor | None:
        """The mask, True where there is a token; None where nothing is padded."""
        if callable(self.mask):
            return _mask_in(self.mask(inputs), True, "mask", samples, inputs)
        if isinstance(self.mask, str) and self.mask != "auto":
            _check_name(self.mask, inputs, model)
            return _mask_in(inputs.get(self.mask), MASKS.get(self.mask, True), self.mask, samples, inputs)
        given = [name for name in MASKS if inputs.get(name) is not None]
        both = ENCODER & _takes(model) and DECODER & _takes(model)
        if len(given) > 1 and not both:
            raise ValueError(
                f"inputs hold several masks, {', '.join(given)}: name one, adapt(model, mask={given[0]!r})"
            )
        masks = {name: _mask_in(inputs[name], MASKS[name], name, samples, inputs) for name in given}
        padded = {name: mask for name, mask in masks.items() if mask is not None}
        if padded and both:
            raise ValueError(
                f"{next(iter(padded))} is of some of the states, for {type(model).__name__} has an encoder and a "
                f"decoder: adapt one of them, or {OFF}"
            )
        return next(iter(padded.values()), None)


def inputs_by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``model`` is given, ``args`` and ``kwargs``, by the names under which its forward pass takes it.

    What is in mappings that it takes is there too, under names that it has not.

    >>> inputs_by_name(nn.TransformerEncoderLayer(4, 2), [1], {"src_key_padding_mask": 2})
    {'src': 1, 'src_key_padding_mask': 2}
    """
    try:
        bound = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or other inputs, which the model refuses itself
        return dict(kwargs)
    inputs = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(parameter.name, {})
    for value in [*inputs.values()]:
        if isinstance(value, Mapping):
            inputs = {name: one for name, one in value.items() if isinstance(name, str)} | inputs
    return inputs


def _takes(model: nn.Module) -> set[str]:
    """The names of what a model takes, with "**" where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {"**" if one.kind is one.VAR_KEYWORD else one.name for one in parameters}


def _check_name(name: str, inputs: Mapping[str, Any], model: nn.Module) -> None:
    takes = _takes(model)
    if name not in inputs and name not in takes:  # nor one of any names that it takes
        takes = sorted({*takes, *inputs} - {"**"})
        raise ValueError(f"mask {name!r} is no input of {type(model).__name__}, which takes {', '.join(takes)}")


def _mask_in(value: Any, token: bool, name: str, samples: int | None, inputs: Mapping[str, Any]) -> Tensor | None:
    """The input ``name`` as True where there is a token, on the CPU; None where nothing is padded."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.ndim != 2 or (samples is not None and len(value) != samples):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must have shape ({'B' if samples is None else samples}, T), a number per token, got {got}: "
            f"{MAKE}, and {OFF}"
        )
    if torch.compiler.is_compiling():
        raise ValueError(f"{name} groups samples by their tokens, which torch.compile cannot: {OFF}")
    mask = _without_cached(_true_of_tokens(value.detach().cpu(), token, name), inputs)
    if mask.all():
        return None
    if empty := (~mask.any(1)).nonzero().flatten().tolist():
        raise ValueError(f"{name} leaves no token of sample {empty[0]}, which has no measures: leave it out, or {OFF}")
    return mask


def _true_of_tokens(mask: Tensor, token: bool, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask if token else ~mask
    padding: float = 0 if token else 1
    if not token and mask.is_floating_point():  # it is added to scores
        padding = -torch.inf
    tokens = mask == (1 if token else 0)
    other = mask[~tokens & (mask != padding)]
    if len(other):
        raise ValueError(f"{name} must hold {int(token)} and {padding:g}, got {other[0].item():g}: {MAKE}, and {OFF}")
    return tokens


def _without_cached(mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The mask of the tokens of which there are states."""
    ids = next((inputs[name] for name in ("input_ids", "inputs_embeds") if isinstance(inputs.get(name), Tensor)), None)
    cached = any(inputs.get(name) is not None for name in CACHES)
    if not cached or ids is None or ids.shape[1] >= mask.shape[1]:
        return mask
    return mask[:, -ids.shape[1] :]
