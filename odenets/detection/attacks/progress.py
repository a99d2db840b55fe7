"""Progress bars of attacks, which take minutes to hours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["with_progress"]

T = TypeVar("T")


def with_progress(items: Sequence[T], label: str | None, unit: str, *, done: int = 0) -> Iterable[T]:
    """The items, with a bar that counts them after those already done; without a label the items alone."""
    if label is None:
        return items
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("progress bars need tqdm: pip install odenets[detection]", name="tqdm") from error
    return tqdm(items, label, total=done + len(items), initial=done, unit=unit, leave=False)
