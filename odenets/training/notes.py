"""Notes on errors: in which batch they come, and what shape its inputs have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from odenets.inputs import samples_in, tensors_in

__all__ = ["BatchNotes"]


class BatchNotes:
    """Says of an error which batch of an epoch it came from, and where that has another shape than the first.

    Args:
        name: of the data.
    """

    def __init__(self, name: str) -> None:
        self.name, self.number = name, 0
        self.first: list[tuple[int, ...]] = []

    @contextmanager
    def next(self, inputs: Any) -> Iterator[None]:
        """What is done with the next batch."""
        self.number += 1
        shapes = [tuple(x.shape[1:]) for x in tensors_in(inputs)]
        self.first = self.first or shapes
        try:
            yield
        except Exception as error:
            kinds = {str(x.dtype) for x in tensors_in(inputs) if not x.is_floating_point()}
            whole = f" with {' and '.join(sorted(kinds))}, where inputs come before targets" if kinds else ""
            other = f", and those of the first {self.first}" if shapes != self.first else ""
            error.add_note(
                f"in batch {self.number} of {self.name}, of {samples_in(inputs)} samples {shapes}{whole}{other}"
            )
            raise
