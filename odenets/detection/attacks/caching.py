"""Adversarial images on disk: a folder per attack, a file per batch, so that none is computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odenets.errors import needs
from odenets.files import write_atomically

__all__ = ["BatchFolder", "key_of"]


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of named parts in their order, in hexadecimal; tensors by shape, dtype and bytes, the rest as JSON."""
    digest = hashlib.sha256()
    for name, part in parts.items():
        tensor = isinstance(part, Tensor)
        head = [name, list(part.shape), str(part.dtype)] if tensor else [name, part]
        digest.update(json.dumps(head, sort_keys=True).encode())
        if tensor:
            data = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()


class BatchFolder:
    """Batches of tensors in a folder, beside a description ``attack.json``; with ``None`` nothing is written."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about

    def read(self, batches: int) -> dict[int, dict[str, Tensor]]:
        """Those of the first ``batches`` batches that are there and intact, by number."""
        if self.folder is None or not self.folder.is_dir():
            return {}
        with needs("detection"):
            from safetensors import SafetensorError
            from safetensors.torch import load_file

        tensors = {}
        for i in range(batches):
            with suppress(FileNotFoundError, SafetensorError):
                tensors[i] = load_file(self._path(i))
        return tensors

    def write(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a batch, atomically."""
        if self.folder is None:
            return
        with needs("detection"):
            from safetensors.torch import save

        about = self.folder / "attack.json"
        if not about.exists():
            write_atomically(about, (json.dumps(dict(self.about), indent=2) + "\n").encode())
        write_atomically(self._path(i), save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def _path(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"batch-{i:05d}.safetensors"
