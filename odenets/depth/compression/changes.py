"""What compression has changed in a network, as JSON can hold it: what is kept of the whole one, and what is new."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from odenets.checkpoints import CHANGES, changes_of, structure
from odenets.depth.compression.indices import NAMES
from odenets.depth.compression.kinds import KINDS, kind_of
from odenets.depth.compression.origins import forget_origins, origin_of
from odenets.flow import Flow

__all__ = ["OF_CONFIG", "known_to_hugging_face", "weights_of_whole", "write_changes"]

OF_CONFIG = ("num_hidden_layers", "layer_types")
"""What lists of layers that are closed change in the configuration."""

Description = dict[str, Any]


def write_changes(model: nn.Module, whole: nn.Module) -> None:
    """Write into a compressed ``model`` how it is made of the ``whole`` network.

    :func:`odenets.checkpoints.changes_of` tells it.

    A module is described by

    - ``{"whole": name}``, that of the whole network, with "parts" of it that are others; "copy", where another one
      stands for it too; "bias", where a linear map got one; and "numbers", the indices of blocks;
    - ``{"same": place}``, one that stands at another place before;
    - ``{"kind": ..., "settings": ..., "parts": ...}``, a new one of those in
      :data:`~odenets.depth.compression.kinds.KINDS`.

    Args:
        model: whose modules know their origins; they forget them.
        whole: the network that was compressed.
    """
    earlier = changes_of(whole)
    change: dict[str, Any] = {"at": "", "weights": weights_of_whole(whole), "flows": structure(whole)}
    try:
        change["root"] = _Describing(whole).describe(model, "")
    except _Unknown as error:
        change["unknown"] = str(error)
    change["config"] = _of_config(model, whole)
    forget_origins(model)
    for module in model.modules():
        vars(module).pop(CHANGES, None)
    setattr(model, CHANGES, [*earlier, json.loads(json.dumps(change))])  # with lists as a file has them


def weights_of_whole(whole: nn.Module) -> dict[str, list[int]]:
    """The shapes of the weights and buffers of a network, by name."""
    return {name: [*value.shape] for name, value in whole.state_dict().items() if isinstance(value, Tensor)}


def _of_config(model: nn.Module, whole: nn.Module) -> dict[str, Any]:
    """What the configuration of a compressed model says otherwise than that of the whole."""
    configs: tuple[Any, Any] = (getattr(model, "config", None), getattr(whole, "config", None))
    new, old = ({key: getattr(one, key, None) for key in OF_CONFIG} for one in configs)
    return {key: value for key, value in new.items() if value != old[key]}


class _Unknown(Exception):
    """A module of which a file cannot say how it is made."""


class _Describing:
    """Descriptions of modules, in the order in which they are asked for.

    Args:
        whole: the network that they come from.
    """

    def __init__(self, whole: nn.Module) -> None:
        self.names = {id(module): name for name, module in whole.named_modules()}  # the first of each
        self.modules = dict(whole.named_modules(remove_duplicate=False))
        self.seen: dict[int, Description] = {}
        self.taken: set[str] = set()

    def describe(self, module: nn.Module, place: str) -> Description:
        """What stands at a ``place`` of the compressed network."""
        if id(module) in self.seen:
            return self.seen[id(module)]
        origin = self._origin(module, place)
        return self._new(module, place) if origin is None else self._of_whole(module, place, origin)

    def _origin(self, module: nn.Module, place: str) -> str | None:
        """The name in the whole of what a module is; a container that makes itself anew when copied is known by it."""
        origin = origin_of(module)
        if origin is None and kind_of(module) is None and type(self.modules.get(place)) is type(module):
            origin = self.names[id(self.modules[place])]
        if origin is not None and {*module._modules} != {*self.modules[origin]._modules}:
            return None
        return origin

    def _of_whole(self, module: nn.Module, place: str, origin: str) -> Description:
        copied, own = origin in self.taken, self.modules[origin]
        self.taken.add(origin)
        self.seen[id(module)] = {"same": place} if copied else {"whole": origin}
        parts = {}
        for name, part in _parts(module):
            described = self.describe(part, _join(place, name))
            if copied or described != {"whole": self.names[id(own._modules[name])]}:
                parts[name] = described
        numbers = {name: vars(module)[name] for name in NAMES if isinstance(vars(module).get(name), int)}
        marks = {
            "parts": parts,
            "copy": copied,
            "bias": module._parameters.get("bias") is not None and own._parameters.get("bias", 0) is None,
            "numbers": {name: number for name, number in numbers.items() if number != getattr(own, name, None)},
        }
        return {"whole": origin} | {key: value for key, value in marks.items() if value}

    def _new(self, module: nn.Module, place: str) -> Description:
        kind = kind_of(module)
        if kind is None:
            raise _Unknown(f"{place!r}, {type(module).__name__},")
        self.seen[id(module)] = {"same": place}
        settings = {name: getattr(module, name) for name in KINDS[kind].settings}
        if isinstance(module, Flow):
            settings |= self._of_flow(module, place)
        parts = {name: self.describe(part, _join(place, name)) for name, part in _parts(module)}
        return {"kind": kind, "settings": settings, "parts": parts}

    def _of_flow(self, flow: Flow, place: str) -> dict[str, Any]:
        """The flow of the whole whose steps a new one takes, and whether it is of no class of the user's."""
        for part in flow.modules():
            name = origin_of(part) or ""
            while name and not isinstance(self.modules[name], Flow):
                name = name.rpartition(".")[0]
            like = self.modules[name]
            if isinstance(like, Flow) and type(flow) in (Flow, type(like)):
                return {"like": name, "plain": type(flow) is Flow}
        raise _Unknown(f"{place!r}, {type(flow).__name__},")


def _parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in module._modules.items() if part is not None]


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def known_to_hugging_face(model: nn.Module) -> bool:
    """Whether a compressed ``model`` of Hugging Face is what its class makes of its configuration."""
    pending = [change.get("root", {}) for change in changes_of(model)]
    while pending:
        one = pending.pop()
        if one.get("bias") or one.get("kind", "ModuleList") != "ModuleList":
            return False
        pending += one.get("parts", {}).values()
    return True
