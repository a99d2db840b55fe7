"""Arguments of networks by the names that they have in torchvision and elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from odenets.errors import renamed

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["refusing_other_names"]

_PRETRAINED = "of trained networks: odenets.adapt(torchvision.models.resnet18(weights='DEFAULT')) takes one"
_OTHER_NAMES = {
    **dict.fromkeys(("num_classes", "n_classes", "out_features", "outputs"), "classes"),
    **dict.fromkeys(("input_channels", "num_channels", "in_chans"), "in_channels"),
    **dict.fromkeys(("pretrained", "weights", "progress"), _PRETRAINED),
    "norm_layer": "norm",
}


def refusing_other_names(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function names its arguments where they have others' names, those in common and these.

    >>> refusing_other_names(width="features")(lambda features=8: features)(width=4)
    Traceback (most recent call last):
        ...
    TypeError: <lambda>() takes no 'width': that is features
    """
    return renamed(**_OTHER_NAMES | names)
