"""The network that a name stands for: torchvision's, timm's, one of ours, or what a function returns."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odenets import models
from odenets.adapting import AdaptedModel, adapt
from odenets.command.mistakes import FAILED, Mistake, near, one_line
from odenets.command.weights import load_file
from odenets.errors import needs
from odenets.recording import is_recorder

__all__ = ["Model", "build", "function_of", "parsed", "recorder"]

OURS = tuple(name for name in models.__all__ if name != "Normalize")


@dataclass(frozen=True)
class Model:
    """A network, and how its images are prepared.

    Attributes:
        network: as it is built, with its weights.
        name: as it is called.
        weights: which, in words.
        prepare: makes the function from a PIL image to a tensor ``(C, H, W)``, for a size ``(H, W)`` or the usual one;
            None where nobody says how.
        prepared_as: for which weights that is, in words.
    """

    network: nn.Module
    name: str
    weights: str
    prepare: Callable[[tuple[int, int] | None], Callable[[Any], torch.Tensor]] | None = None
    prepared_as: str = ""


def build(name: str, weights: str | None, options: Sequence[str]) -> Model:
    """The model of a name, with weights.

    Args:
        name: torchvision's, timm's, one of :mod:`odenets.models`, or ``package.module:function``.
        weights: "DEFAULT", "none", a name of torchvision's, or a file; "DEFAULT" where there are any if not given.
        options: arguments, ``name=value`` each.

    Raises:
        Mistake: nothing has this name, or it cannot be built, or the weights cannot be loaded.
    """
    arguments = parsed(options)
    if Path(name).is_file():
        raise Mistake(
            f"MODEL must be the name of a network, got the file {name}: a file holds weights and not the code of a "
            f"network, odenets record resnet18 IMAGES --weights {name}"
        )
    if weights is not None and _is_file(weights) and not Path(weights).is_file():
        raise Mistake(f"--weights: no file {weights}")
    library, _, rest = name.rpartition(":")
    visual = _visual()
    if library in ("", "torchvision") and rest in visual.list_models(module=visual):
        return _torchvision(rest, weights, arguments)
    if library == "" and rest in OURS:
        return _ours(name, getattr(models, name), weights, arguments)
    if library in ("", "timm") and _timm_knows(rest):
        return _timm(rest, weights, arguments)
    if library not in ("", "torchvision", "timm"):
        return _ours(name, function_of(name, "MODEL"), weights, arguments)
    raise Mistake(f"MODEL {name} is neither torchvision's nor timm's nor one of odenets.models{_meant(rest)}")


def _visual() -> Any:
    """torchvision's models."""
    with needs("images"):
        from torchvision import models as visual
    return visual


def _is_file(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix != "" or Path(weights).is_file()


def _meant(name: str) -> str:
    visual = _visual()
    names, hint = [*visual.list_models(module=visual), *OURS], "; for timm's names: pip install timm"
    try:
        timm = import_module("timm")
        names, hint = [*names, *timm.list_models(), *timm.list_pretrained()], ""
    except ModuleNotFoundError:
        pass
    return near(name, names) + hint


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """Arguments ``name=value`` with Python's numbers, strings, tuples and so on; any other value is a string.

    >>> parsed(["depth=3", "solver=bs23"])
    {'depth': 3, 'solver': 'bs23'}

    Raises:
        Mistake: one is not ``name=value``, or two have one name.
    """
    arguments = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise Mistake(f"--option must be name=value, such as num_classes=10, got {option}")
        if name in arguments:
            raise Mistake(f"--option must name {name} once, got it again: {option}")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def function_of(path: str, what: str) -> Callable[..., Any]:
    """The object of ``package.module:name``; modules of the working folder are found, too.

    Raises:
        Mistake: there is no such module, or nothing of that name in it, or it cannot be called.
    """
    module, _, name = path.rpartition(":")
    if not module:
        raise Mistake(f"{what} must be package.module:function, got {path}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        loaded = import_module(module)
    except Exception as error:  # whatever a module of the user's raises
        raise Mistake(f"{what} {path}: {module} does not load: {type(error).__name__}: {one_line(error)}") from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise Mistake(f"{what} {path}: {module} has no function {name}{near(name, vars(loaded))}")
    return function


def _built(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        network = function(**arguments)
    except Exception as error:  # whatever a function of the user's raises
        call = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        raise Mistake(f"{call} cannot be built: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise Mistake(f"MODEL {name} must return a network, a torch module, got {type(network).__name__}")
    return network


def _with_file(
    name: str, network: nn.Module, weights: str | None, its: str = "random weights"
) -> tuple[nn.Module, str]:
    """The network with the weights of a file, or ``its`` own; and which, in words."""
    if weights is None or weights.lower() == "none":
        return network, its
    return load_file(network, Path(weights), name), f"weights of {weights}"


def _pretrained(name: str, build: Callable[[], nn.Module], plain: Callable[[], nn.Module]) -> nn.Module:
    """The network with weights that are downloaded unless they lie here.

    Raises:
        Mistake: they cannot be had; or the network cannot be built without them either.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells of every try
    try:
        return build()
    except Exception as error:  # of the network, of the hub, of the file
        plain()
        raise Mistake(
            f"the weights of {name} are not here and cannot be downloaded or do not fit "
            f"({type(error).__name__}: {one_line(error)}): --weights none takes random ones, --weights FILE those of "
            "a file",
            FAILED,
        ) from error


def _ours(name: str, function: Callable[..., Any], weights: str | None, arguments: Mapping[str, Any]) -> Model:
    if weights is not None and weights.lower() != "none" and not Path(weights).is_file():
        raise Mistake(f"--weights must be a file or none, since nobody offers weights of {name}, got {weights}")
    if arguments and isinstance(function, nn.Module):
        raise Mistake(
            f"--option is for a function that returns a network; {name} is a network already: leave out "
            f"{', '.join(arguments)}, or name the function"
        )
    network = function if isinstance(function, nn.Module) else _built(name, function, arguments)
    own = name not in OURS
    network, words = _with_file(name, network, weights, "the weights that it has" if own else "random weights")
    return Model(network, name, words)


def _torchvision(name: str, weights: str | None, arguments: Mapping[str, Any]) -> Model:
    visual = _visual()
    offered: Any = visual.get_model_weights(name)

    def plain() -> nn.Module:
        return _built(name, lambda **options: visual.get_model(name, weights=None, **options), arguments)

    usual = offered.DEFAULT
    if weights is None or weights.upper() == "DEFAULT" or weights in offered.__members__:
        usual = usual if weights is None or weights.upper() == "DEFAULT" else offered[weights]
        network = _pretrained(name, lambda: visual.get_model(name, weights=usual, **arguments), plain)
        words = f"weights {usual.name} of torchvision"
    elif weights.lower() != "none" and not Path(weights).is_file():
        known = ", ".join(one.name for one in offered)
        raise Mistake(f"--weights must be DEFAULT, none, {known} or a file, got {weights}")
    else:
        network, words = _with_file(name, plain(), weights)

    def prepare(size: tuple[int, int] | None) -> Callable[[Any], torch.Tensor]:
        if size is None:
            return usual.transforms()
        preset = usual.transforms(crop_size=max(size), resize_size=max(size))
        preset.crop_size = [*size]
        return preset

    return Model(network, name, words, prepare, f"{usual.name} of torchvision")


def _timm_knows(name: str) -> bool:
    try:
        timm = import_module("timm")
    except ModuleNotFoundError:
        return False
    plain, _, tag = name.partition(".")
    return timm.is_model(plain) and (not tag or name in timm.list_pretrained(f"{plain}.*"))


def _timm(name: str, weights: str | None, arguments: Mapping[str, Any]) -> Model:
    timm, data = import_module("timm"), import_module("timm.data")

    def plain() -> nn.Module:
        return _built(name, lambda **options: timm.create_model(name, pretrained=False, **options), arguments)

    if weights is None or weights.upper() == "DEFAULT":
        network = _pretrained(name, lambda: timm.create_model(name, pretrained=True, **arguments), plain)
        words = "weights of timm"
    elif weights.lower() != "none" and not Path(weights).is_file():
        raise Mistake(
            f"--weights must be DEFAULT, none or a file for {name}, got {weights}; timm has others under a name of "
            f"their own, as {name.partition('.')[0]}.TAG"
        )
    else:
        network, words = _with_file(name, plain(), weights)
    settings = data.resolve_model_data_config(network)

    def prepare(size: tuple[int, int] | None) -> Callable[[Any], torch.Tensor]:
        own = settings if size is None else settings | {"input_size": (3, *size), "crop_pct": 1.0}
        return data.create_transform(**own, is_training=False)

    return Model(network, name, words, prepare, f"{name} of timm")


def recorder(model: Model, blocks: str | None, x: Tensor) -> Any:
    """The network as one that records its steps: its blocks as they are found in the program of images.

    The layers of a chain, which adds nothing, are its steps.

    Args:
        model: the network, on the device of the images.
        blocks: their names, with commas between them, instead of what is found.
        x: images ``(B, C, H, W)``.

    Raises:
        Mistake: blocks of one that records its own; or what :func:`odenets.adapt` says.
    """
    network = model.network
    if isinstance(network, AdaptedModel) and blocks is not None:
        network = network.model
    if is_recorder(network):
        if blocks is not None:
            raise Mistake(f"--blocks is for networks that are adapted; {model.name} records its own steps")
        return network
    names = None if blocks is None else [name.strip() for name in blocks.split(",") if name.strip()]
    try:
        adapted = adapt(network, blocks=names)
        adapted.find(x)
        return adapted
    except (ValueError, TypeError) as error:
        if names is None and "displacement=True" in str(error):  # the remedy for a chain
            return adapt(network, displacement=True)
        hint = " (--blocks layer1.0,layer1.1 names them here)" if names is None else ""
        raise Mistake(f"{model.name}: {one_line(error)}{hint}", FAILED) from error
