"""Weights of a file: what ``odenets.save_weights`` writes, other safetensors, and state dicts of ``torch.save``."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from odenets.adapting import adapt
from odenets.checkpoints import load_weights
from odenets.command.mistakes import FAILED, Mistake, one_line
from odenets.depth import load_compressed
from odenets.errors import needs

__all__ = ["load_file"]

HOLDERS = ("state_dict", "model_state_dict", "model", "network", "model_ema")
"""Keys under which checkpoints keep the state of their network."""
OPTIONS = "--option NAME=VALUE builds it as the saved one was"
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names."""


def load_file(network: nn.Module, file: Path, name: str) -> nn.Module:
    """The network with the weights of a file, of it or of the same adapted.

    Nothing is unpickled but tensors and plain values.

    Raises:
        Mistake: the file holds no weights, or those of another network.
    """
    if _is_safetensors(file):
        state, said = _safetensors(file)
        if "changes" in said:
            return _compressed(network, file, name)
        if "structure" in said:
            return _loaded(network, file, name, state)
    else:
        state = _of_torch(file)
    for prefix in WRAPPERS:
        consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise _misfit(network, state, file, name, error) from error
    return network


def _is_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors do, with the length of what is JSON; or is named so and no archive."""
    with file.open("rb") as opened:
        head = opened.read(9)
    length = int.from_bytes(head[:8], "little")
    return (head[8:] == b"{" and length < file.stat().st_size) or (file.suffix == ".safetensors" and head[:2] != b"PK")


def _safetensors(file: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The tensors of a file, and what it says of them."""
    with needs("training"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise Mistake(f"--weights {file} is no file of safetensors: {one_line(error)}", FAILED) from error


def _compressed(network: nn.Module, file: Path, name: str) -> nn.Module:
    """The compressed network of a file, made of the whole one."""
    try:
        return load_compressed(network, file)
    except ValueError as error:
        raise Mistake(f"--weights {file} does not fit {name}: {one_line(error)}. {OPTIONS}", FAILED) from error


def _loaded(network: nn.Module, file: Path, name: str, state: Mapping[str, Any]) -> nn.Module:
    """The network with what ``odenets.save_weights`` wrote, of it or of the same adapted."""
    own = {key.partition(".")[0] for key, _ in network.named_children()}
    adapted = len(state) > 0 and all(key.startswith("model.") for key in state) and "model" not in own
    try:
        load_weights(adapt(network) if adapted else network, file)
    except (ValueError, RuntimeError) as error:
        raise _misfit(network, state, file, name, error) from error
    return network


def _of_torch(file: Path) -> dict[str, Any]:
    """The state dict in a file of ``torch.save``, by itself or in a checkpoint."""
    try:
        with file.open("rb") as opened:  # by its name torch takes one for safetensors
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise Mistake(
            f"--weights {file} holds no state dict that loads without running code of the file: "
            f"torch.save(network.state_dict(), FILE) writes one ({one_line(error)})",
            FAILED,
        ) from error
    if isinstance(content, dict):
        for key in HOLDERS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise Mistake(f"--weights {file} must hold a state dict, got {type(content).__name__}", FAILED)
    return dict(content)


def _misfit(network: nn.Module, state: Mapping[str, Any], file: Path, name: str, error: Exception) -> Mistake:
    """What does not fit, in a line."""
    expected = network.state_dict()
    shapes = [
        f"{key} is {tuple(value.shape)} in the file and {tuple(expected[key].shape)} in the network"
        for key, value in state.items()
        if key in expected and isinstance(value, Tensor) and value.shape != expected[key].shape
    ]
    parts = [
        *_some("the file lacks", [key for key in expected if key not in state]),
        *_some("the network lacks", [key for key in state if key not in expected]),
        *_some("", shapes),
    ]
    what = "; ".join(parts) or one_line(error)
    return Mistake(f"--weights {file} does not fit {name}: {what}. {OPTIONS}", FAILED)


def _some(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{what} {', '.join(names[:2])}{more}".strip()] if names else []
