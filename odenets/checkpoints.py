"""The state of a network as data: its structure, its fingerprint, and its weights with the structure on disk."""

from __future__ import annotations

import hashlib
import math
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odenets.flow import Flow
from odenets.functions import described
from odenets.modes import device_of, dtype_of
from odenets.neural_ode import NeuralODE
from odenets.schemes.scheme import Scheme
from odenets.solve_settings import check_solves, solves
from odenets.weight_files import read_file, write_file
from solvers import LearnedTableau

__all__ = [
    "CHANGES",
    "changes_of",
    "check_methods",
    "fingerprint",
    "is_finite",
    "load_tensors",
    "load_weights",
    "map_state",
    "restore_structure",
    "save_weights",
    "structure",
    "warn_of_structure",
]

CHANGES = "structure_changes"
"""The attribute of a compressed network that says how it is made of the whole one."""


def structure(network: nn.Module) -> dict[str, Any]:
    """What a depth edit and a first input can change, by module name of the flow, and how it takes its steps.

    Its step sizes, and the shape and dtype of its samples; its solver, and how stages share fields.
    """
    return {
        name: {
            "h": list(flow.h),
            "input_shape": list(flow.input_shape) if flow.input_shape else None,
            "dtype": str(dtype_of(flow)).removeprefix("torch."),
            "solver": flow.tableau.name,
            "coefficients": _coefficients(flow),
            "stage_fields": flow.stage_fields,
            "coupling": flow.coupling,
        }
        for name, flow in _flows(network).items()
    }


def restore_structure(network: nn.Module, saved: dict[str, Any]) -> None:
    """Give every flow the blocks and step sizes that :func:`structure` returned.

    Raises:
        ValueError: the network's flows are not those of ``saved``, or have another method.
    """
    flows = _flows(network)
    if set(flows) != set(saved):
        raise ValueError(f"network has flows {sorted(flows)}, the saved one {sorted(saved)}")
    check_methods(network, saved)
    for name, flow in flows.items():
        if saved[name]["input_shape"] is not None:
            dtype = getattr(torch, saved[name]["dtype"]) if "dtype" in saved[name] else dtype_of(network)
            flow.materialize(torch.zeros(1, *saved[name]["input_shape"], dtype=dtype, device=device_of(network)))
        flow.resize(saved[name]["h"], network)


def check_methods(network: nn.Module, saved: dict[str, Any]) -> None:
    """That flows take the steps that they took when :func:`structure` returned ``saved``; older ones say nothing of it.

    Raises:
        ValueError: one has another solver, or another way of sharing fields.
    """
    for name, flow in _flows(network).items():
        before, here = saved.get(name, {}), _coefficients(flow)
        if before.get("coefficients", here) != here:
            solver, own = before["solver"], flow.tableau.name
            got = f"{own} with other coefficients" if solver == own else own
            raise ValueError(f"{_named(name)} must have the solver that it was saved with, {solver}, got {got}")
        if (coupling := before.get("coupling")) != flow.coupling and before:
            raise ValueError(
                f"{_named(name)} must have the coupling that it was saved with, {coupling}, got {flow.coupling}: None "
                "is that of a Flow, a number that of a ReversibleFlow"
            )
        if (fields := before.get("stage_fields", flow.stage_fields)) != flow.stage_fields:
            raise ValueError(
                f"{_named(name)} must have the stage_fields that it was saved with, {fields!r}, got "
                f"{flow.stage_fields!r}"
            )


def warn_of_structure(network: nn.Module, saved: dict[str, Any], place: str, stacklevel: int) -> None:
    """Say which flows :func:`restore_structure` gives another depth or other step sizes.

    Args:
        network: before that.
        saved: what :func:`structure` returned.
        place: of the file, for the warning.
        stacklevel: of the warning.

    Warns:
        UserWarning: some are others.
    """
    changed = [
        f"{_named(name)} has depth={flow.depth}, h={_short(flow.h)}, and gets depth={len(h)}, h={_short(h)}"
        for name, flow in _flows(network).items()
        if name in saved and not _alike(flow.h, h := saved[name]["h"])
    ]
    if changed:
        warnings.warn(
            f"{place}{'; '.join(changed)}, as saved: a network that is made with these is loaded without a warning",
            stacklevel=stacklevel + 1,
        )


def _flows(network: nn.Module) -> dict[str, Flow]:
    return {name: flow for name, flow in network.named_modules() if isinstance(flow, Flow)}


def _named(name: str) -> str:
    return f"flow {name!r}" if name else "the flow"


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(map(math.isclose, one, other))


def _short(h: Sequence[float]) -> str:
    """Step sizes; one where all are the same, and not too many."""
    if _alike(h, [h[0]] * len(h)):
        return f"{h[0]:.4g}"
    return f"({', '.join(f'{one:.4g}' for one in h[:4])}{', ...' * (len(h) > 4)})"


def _coefficients(flow: Flow) -> str:
    """A checksum of those that a step takes; of a learned method they are weights."""
    method: Any = flow.tableau
    if isinstance(method, Scheme):
        return method.settings
    if isinstance(method, LearnedTableau):
        return method.settings
    return f"{zlib.crc32(repr((flow.tableau.c, flow.tableau.a, flow.tableau.b)).encode()):08x}"


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and buffers are finite, as those of a checkpoint must be; waits for each device once.

    Of a sharded network the part that this process holds.

    >>> layer = nn.Linear(2, 2)
    >>> is_finite(layer), is_finite(layer.requires_grad_(False)), is_finite(nn.ReLU())
    (True, True, True)
    """
    finite: dict[torch.device, list[torch.Tensor]] = {}
    for value in (*network.parameters(), *network.buffers()):
        value = value.detach()
        value = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]  # a DTensor
        if value.numel() and (value.is_floating_point() or value.is_complex()):
            ends = torch.view_as_real(value).aminmax() if value.is_complex() else value.aminmax()  # NaN if any is
            finite.setdefault(value.device, []).append(torch.stack([*ends]).isfinite().all())
    return all(bool(torch.stack(values).all()) for values in finite.values())


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of what a network computes with, in hexadecimal; device and mode do not matter.

    It covers the weights, buffers and step sizes, and what the modules print of themselves, where numbers stand that
    are no tensors: a normalization, a readout, the blocks that an adapted model is told (those that are found are not
    among them). Of a neural ODE it covers all settings, and its field, event and norm as
    :func:`~odenets.functions.described` tells functions, by their code.

    Raises:
        ValueError: a flow has not seen an input yet and has no field.
        TypeError: an extra state that is no tensor; a setting of a neural ODE that nothing tells.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
    (True, False)
    """
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("network has a flow without a field: call network(x) once before it is hashed")
    state = _tensors(network)
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        shown = module.extra_repr()
        if isinstance(module, NeuralODE):
            shown = "".join(described(value, key, network.modules()) for key, value in module.settings.items())
        digest.update(f"{name} {type(module).__name__}({shown})\n".encode())
    for name, tensor in sorted(state.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def map_state(leaf: Callable[[str, Any], Any], value: Any, place: str = "state") -> Any:
    """A state, nested dictionaries, lists and tuples, with a function's results for all else in it.

    A ``state_dict`` keeps its ``_metadata``, the versions by which modules know which states to migrate.

    Args:
        leaf: called with the place in the state, such as ``state['rows'][0]``, and what is there.
        value: the state.
        place: of the value.
    """
    if isinstance(value, dict):
        mapped = {map_state(leaf, k, place): map_state(leaf, item, f"{place}[{k!r}]") for k, item in value.items()}
        if (versions := getattr(value, "_metadata", None)) is not None:
            return _with_versions(mapped, map_state(leaf, versions, f"{place}._metadata"))
        return mapped
    if type(value) in (list, tuple):
        return type(value)(map_state(leaf, item, f"{place}[{i}]") for i, item in enumerate(value))
    return leaf(place, value)


def _with_versions(state: dict[str, Any], versions: Any) -> OrderedDict[str, Any]:
    versioned: Any = OrderedDict(state)  # a dict has no attributes
    versioned._metadata = versions
    return versioned


def _tensors(network: nn.Module) -> dict[str, Any]:
    """The state of a network.

    Raises:
        TypeError: some of it is no tensor: the extra state of a module of the user's.
    """
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor to be saved or hashed, got {type(value).__name__}")
    return state


def save_weights(network: nn.Module, path: str | Path) -> Path:
    """Write weights, buffers, blocks and step sizes to one ``.safetensors`` file, atomically.

    Nothing of it is pickled. A file of the same name is replaced once the new one is whole. Of a network that
    :func:`odenets.depth.compress` has made the file says how it is made of the whole one, and
    :func:`odenets.depth.load_compressed` loads it.

    Args:
        network: any module; its flows have seen an input.
        path: of the file; folders are made.

    Returns:
        The path.

    Raises:
        ValueError: a flow has not seen an input yet and has no field, or a compressed network holds what a file cannot
            say.
        TypeError: no module, or a state that is no tensor.
        ModuleNotFoundError: safetensors is not installed, ``pip install 'odenets[training]'``.

    >>> import tempfile, odenets
    >>> flow = odenets.Flow(odenets.MLPField(2), depth=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_weights(flow, f"{folder}/flow.safetensors")
    ...     again = load_weights(odenets.Flow(odenets.MLPField(2), depth=3), path)
    >>> again.depth, fingerprint(again) == fingerprint(flow)
    (3, True)
    """
    _check_module(network, "save_weights(network, path)")
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise ValueError("network has a flow without a field: call network(x) once before saving it")
    described = {"structure": structure(network), "versions": getattr(state := _tensors(network), "_metadata", {})}
    if settings := solves(network):
        described["solves"] = settings
    if changes := changes_of(network):
        if unknown := next((change["unknown"] for change in changes if "unknown" in change), None):
            raise ValueError(
                f"network is compressed, and a file of weights cannot say how {unknown} is made: torch.export.save, or "
                "torch.save where the file is trusted"
            )
        described["changes"] = changes
    return write_file(path, state, described)


def _check_module(network: object, call: str) -> None:
    if not isinstance(network, nn.Module):
        call = "its model" if isinstance(getattr(network, "model", None), nn.Module) else call
        raise TypeError(f"network must be a module, got {type(network).__name__}: {call}")


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load what :func:`save_weights` wrote into a network built by the same code, whatever its depth has become.

    A flow gets the saved depth and step sizes; where it was made with others, a warning names both.

    Args:
        network: built as the saved one was; its flows get the saved blocks and step sizes.
        path: the file.

    Returns:
        The network, whose flows have their fields: an optimizer that was built before its first input, and is to be
        resumed, is built before this too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not from this package, or damaged, or the network has other flows, or with another
            solver, a neural ODE over other times, or one is compressed.
        RuntimeError: its modules are others than the saved ones, as ``load_state_dict`` says.
        TypeError: no module.
        ModuleNotFoundError: safetensors is not installed, ``pip install 'odenets[training]'``.

    Warns:
        UserWarning: a flow gets another depth or other step sizes than it was made with, or a neural ODE is solved in
            another way than the saved one.

    >>> import tempfile
    >>> layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = load_weights(other, save_weights(layer, f"{folder}/layer.safetensors"))
    >>> torch.equal(loaded.weight, layer.weight)
    True
    """
    _check_module(network, "load_weights(network, path)")
    tensors, described = read_file(path)
    own, changes = changes_of(network), described.get("changes", [])
    if changes != own:
        raise ValueError(
            f"{path} holds a compressed network: odenets.depth.load_compressed(network, path), with the whole network "
            "as the code builds it"
            if changes
            else f"network is compressed and {path} holds weights of a whole one: load them before it is compressed"
        )
    check_solves(network, described.get("solves", {}), f"{path}: ", stacklevel=2)
    warn_of_structure(network, described["structure"], f"{path}: ", stacklevel=2)
    restore_structure(network, described["structure"])
    load_tensors(network, tensors, described)
    return network


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> None:
    """Load the tensors of a file into a ``network`` of its structure, as states of the versions ``described``."""
    versions = described.get("versions")
    network.load_state_dict(_with_versions(dict(tensors), versions) if versions else tensors)


def changes_of(network: nn.Module) -> list[dict[str, Any]]:
    """What :func:`odenets.depth.compress` has changed in a network and its parts, in order; it holds what JSON does.

    Each tells as "at" the name of the part that was compressed; :data:`CHANGES` is the attribute that holds them.
    """
    return [
        {**change, "at": ".".join(filter(None, (name, change["at"])))}
        for name, module in network.named_modules()
        for change in getattr(module, CHANGES, ())
    ]
