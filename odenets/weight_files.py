"""Files of weights: tensors, and what is said of them as JSON, in one ``.safetensors`` with a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from odenets.errors import needs
from odenets.files import write_atomically

__all__ = ["read_file", "write_file"]


def write_file(path: str | Path, tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> Path:
    """Write tensors and what is said of them, atomically.

    Args:
        path: of the file; folders are made.
        tensors: by name.
        described: what JSON holds, by name.

    Returns:
        The path.

    Raises:
        ValueError: the path is that of a folder.
        ModuleNotFoundError: safetensors is not installed, ``pip install 'odenets[training]'``.
    """
    with needs("training"):
        from safetensors.torch import save

    if Path(path).is_dir():
        raise ValueError(f"path must name a file, such as {path}/weights.safetensors, got a folder")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in described.items()}
    data = save(tensors, metadata=metadata | {"checksum": _checksum(tensors, metadata)})
    return write_atomically(path, data)


def read_file(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file that :func:`write_file` wrote, and what is said of them.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not from this package, or damaged.
        ModuleNotFoundError: safetensors is not installed, ``pip install 'odenets[training]'``.
    """
    with needs("training"):
        from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and no file that odenets.save_weights writes: {_within(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no file that odenets.save_weights writes, .safetensors: {error}") from error
    with opened as file:
        metadata = file.metadata() or {}
        if "structure" not in metadata:
            raise ValueError(f"{path} holds no flow structure: it was not written by odenets.save_weights")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    checksum = metadata.pop("checksum", None)  # older files have none
    if checksum is not None and checksum != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged, its checksum is another: delete it, and save or copy it again")
    metadata.pop("format", None)
    try:
        return tensors, {key: json.loads(value) for key, value in metadata.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, what it says of its tensors is no JSON: save or copy it again") from error


def _within(folder: Path) -> str:
    """What may be meant by a folder."""
    if (folder / "config.json").is_file():
        return "from_pretrained loads what save_pretrained wrote"
    files = sorted(one.name for one in folder.glob("*.safetensors"))
    return f"in it {'are ' + ', '.join(files[:3]) if files else 'is none'}"


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of the tensors of a file and of what it says of them."""
    kinds = {name: [tuple(x.shape), str(x.dtype)] for name, x in sorted(tensors.items())}
    value = zlib.crc32(repr((kinds, sorted(metadata.items()))).encode())
    for _, x in sorted(tensors.items()):
        value = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
