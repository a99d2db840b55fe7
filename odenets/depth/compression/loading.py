"""load_compressed: the compressed network of a file, made of the whole one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odenets.adapting import AdaptedModel
from odenets.checkpoints import CHANGES, load_tensors, restore_structure, warn_of_structure
from odenets.depth.compression.changes import OF_CONFIG, weights_of_whole
from odenets.depth.compression.indices import NAMES
from odenets.depth.compression.kinds import KINDS
from odenets.modes import device_of
from odenets.weight_files import read_file

__all__ = ["load_compressed"]

KEYS = ("at", "config", "flows", "root", "weights")
"""What a file says of each compression."""


def load_compressed(model: nn.Module, path: str | Path) -> nn.Module:
    """The compressed network that :func:`odenets.save_weights` wrote, made of the whole one as the code builds it.

    Nothing is unpickled: the file says as JSON which blocks have gone and what stands in their places, of a few kinds
    that are known here.

    Args:
        model: the whole network, built as the one that was compressed, with any weights; what is kept of it goes into
            the result, in its precision and on its device, and it is not to be used any more.
        path: the file, of :func:`compress`'s model, healed or not.

    Returns:
        The compressed network, in the mode of the whole one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no compressed network or is damaged, or the model is not built as the whole one was.
        TypeError: no module.
        ModuleNotFoundError: safetensors is not installed, ``pip install 'odenets[training]'``.

    Warns:
        UserWarning: a flow gets another depth or other step sizes than it was made with.

    >>> import tempfile, odenets
    >>> from odenets.depth import compress
    >>> def build():
    ...     return odenets.models.small_network(solver="euler", h=1.0, depth=4)
    >>> x = torch.rand(60, 1, 8, 8)
    >>> small = compress(build(), [x], remove=2).model.eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = odenets.save_weights(small, f"{folder}/small.safetensors")
    ...     again = load_compressed(build(), path).eval()
    >>> torch.equal(again(x), small(x))
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, the whole network, got {type(model).__name__}")
    tensors, described = read_file(path)
    changes = described.get("changes")
    if not changes:
        raise ValueError(f"{path} holds no compressed network: odenets.load_weights(network, path)")
    if not isinstance(changes, list) or any({*KEYS} - {*change} for change in changes):
        raise ValueError(_unknown(path, "it lacks parts"))
    if isinstance(model, AdaptedModel):
        model = model.model
    holder = nn.Module()
    holder.model = model
    with _understood(path):
        if not _is_adapted(changes, tensors, model):
            changes = [{**change, "at": f"model.{change['at']}".rstrip(".")} for change in changes]
            tensors = {f"model.{name}": value for name, value in tensors.items()}
            described = {key: _prefixed(described.get(key, {})) for key in ("structure", "versions")}
        floating = {value.dtype for value in model.state_dict().values() if _is_floating(value)}
        dtype, device = floating.pop() if len(floating) == 1 else None, device_of(model)
        for change in changes:
            _change(holder, change, path)
        restore_structure(holder, described["structure"])
        _check(holder, tensors, path)
        for name, layer in holder.named_modules():
            for key, value in layer._parameters.items():
                if value is not None and value.is_meta and device.type != "meta":
                    like = {"device": device, "dtype": dtype or tensors[f"{name}.{key}"].dtype}
                    layer._parameters[key] = nn.Parameter(torch.empty(value.shape, **like), value.requires_grad)
        load_tensors(holder, tensors, described)
    network: nn.Module = holder.model
    setattr(network, CHANGES, [{**change, "at": change["at"].partition(".")[2]} for change in changes])
    return network


@contextmanager
def _understood(path: str | Path) -> Iterator[None]:
    """Errors of what a file says, where it is of other kinds than this package writes, are those of the file."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(_unknown(path, f"{type(error).__name__}: {error}")) from error


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_adapted(changes: list[Any], tensors: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether a file is of the compressed network in an adapted one."""
    names = [*tensors, *(f"{change['at']}." for change in changes)]
    return "model" not in model._modules and all(name.startswith("model.") for name in names)


def _prefixed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.{name}".rstrip("."): value for name, value in values.items()}


def _change(holder: nn.Module, change: Mapping[str, Any], path: str | Path) -> None:
    """Compress a part of what is held as a ``change`` of a file says.

    Raises:
        ValueError: it is another network than the one that was compressed, or the file is damaged.
    """
    try:
        whole = holder.get_submodule(change["at"])
    except AttributeError as error:
        at = change["at"].partition(".")[2]
        raise ValueError(f"model must have a part {at!r}, which is compressed in {path}: build it as it was") from error
    warn_of_structure(whole, change["flows"], f"{path}: ", stacklevel=3)
    restore_structure(whole, change["flows"])
    _check_whole(whole, change["weights"], path)
    try:
        new = _Restoring(whole, change["root"]).restore(change["root"], "")
        _configure(new, change["config"])
        holder.set_submodule(change["at"], new)
    except (RuntimeError, ValueError) as error:
        raise ValueError(_unknown(path, f"{type(error).__name__}: {error}")) from error


def _configure(model: nn.Module, changed: Mapping[str, Any]) -> None:
    """Give a model a configuration of its own with what has ``changed``: other models may be made of that it has."""
    shared: Any = getattr(model, "config", None)
    config = copy.deepcopy(shared)
    for key, value in changed.items():
        if key in OF_CONFIG and hasattr(config, key):
            setattr(config, key, value)
    for part in model.modules():
        if shared is not None and vars(part).get("config") is shared:
            vars(part)["config"] = config


def _unknown(path: str | Path, why: str) -> str:
    return (
        f"{path} says of a compressed network what this version of odenets does not understand: save it again, with "
        f"this version ({why})"
    )


def _check_whole(whole: nn.Module, saved: Mapping[str, list[int]], path: str | Path) -> None:
    """That a network has the weights that the one had that was compressed."""
    _compare(
        weights_of_whole(whole), saved, f"model must be built as the network that was compressed to {path} was, with"
    )


def _check(holder: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """That a network that has been compressed has the weights of the file."""
    saved = {name.removeprefix("model."): [*value.shape] for name, value in tensors.items()}
    own = {name.removeprefix("model."): shape for name, shape in weights_of_whole(holder).items()}
    _compare(own, saved, f"model must be changed as the compressed network was before it was saved to {path}, to")


def _compare(own: Mapping[str, list[int]], saved: Mapping[str, list[int]], remedy: str) -> None:
    """That weights have the names and shapes that are ``saved``.

    Raises:
        ValueError: they have not.
    """
    wrong = [f"{name!r} of the shape {(*shape,)}, got {_shape(own.get(name))}" for name, shape in saved.items()
             if own.get(name) != shape]  # fmt: skip
    wrong += [f"no {name!r}" for name in own if name not in saved]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{remedy} {'; '.join(wrong[:3])}{more}")


def _shape(shape: list[int] | None) -> str:
    return "none" if shape is None else f"{(*shape,)}"


class _Restoring:
    """Modules of descriptions, those of :func:`~odenets.depth.compression.changes.write_changes`.

    Args:
        whole: the network that they come from.
        root: the description of the compressed one.
    """

    def __init__(self, whole: nn.Module, root: Mapping[str, Any]) -> None:
        self.training = whole.training
        self.modules = dict(whole.named_modules(remove_duplicate=False))
        self.copies = {one["whole"]: copy.deepcopy(self.modules[one["whole"]]) for one in _all(root) if "copy" in one}
        self.built: dict[str, nn.Module] = {}

    def restore(self, described: Mapping[str, Any], place: str) -> nn.Module:
        """The module at a ``place`` of the compressed network."""
        if "same" in described:
            return self.built[described["same"]]
        make = self._new if "kind" in described else self._of_whole
        self.built[place] = make(described, place)
        return self.built[place]

    def _of_whole(self, described: Mapping[str, Any], place: str) -> nn.Module:
        origin = described["whole"]
        module = copy.deepcopy(self.copies[origin]) if "copy" in described else self.modules[origin]
        for name, part in described.get("parts", {}).items():
            if name not in module._modules:
                raise KeyError(f"{origin} has no part {name}")
            module._modules[name] = self.restore(part, f"{place}.{name}".lstrip("."))
        if "bias" in described:
            weight: Any = module.weight
            outputs = weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
            bias = torch.empty(outputs, dtype=weight.dtype, device="meta")
            module._parameters["bias"] = nn.Parameter(bias, weight.requires_grad)
        for name, number in described.get("numbers", {}).items():
            if name not in NAMES or not isinstance(number, int):
                raise ValueError(f"{origin} has no index {name}")
            setattr(module, name, number)
        return module

    def _new(self, described: Mapping[str, Any], place: str) -> nn.Module:
        kind, settings = KINDS[described["kind"]], dict(described["settings"])
        if isinstance(settings.get("like"), str):
            settings["like"] = self.modules[settings["like"]]
        parts = {name: self.restore(part, f"{place}.{name}".lstrip(".")) for name, part in described["parts"].items()}
        module = kind.make(parts, settings)
        module.training = self.training
        for part in module.children():
            if not any(part is one for one in parts.values()):
                part.training = self.training  # lists that a flow or a network makes
        return module


def _all(described: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A description and those of its parts."""
    yield described
    for part in described.get("parts", {}).values():
        yield from _all(part)
