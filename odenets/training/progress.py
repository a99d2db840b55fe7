"""Progress: a bar on the screen, and the numbers of an epoch in Fabric's loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from odenets.errors import needs

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["counting", "log_row", "progress_bar"]


@contextmanager
def progress_bar(label: str | None, epochs: int, done: int) -> Iterator[Callable[[dict[str, Any]], object]]:
    """What shows an epoch's row in a bar; nothing without a label.

    Raises:
        TypeError: the label is no string.
    """
    if label is None:
        yield lambda row: None
        return
    if not isinstance(label, str):
        raise TypeError(f'progress must be the label of a bar, such as progress="label", got {label!r}')
    with needs("training"):
        from tqdm import tqdm

    def show(row: dict[str, Any]) -> None:
        bar.update()
        shown = (name for name in row if name in ("module", "train_loss", "depth") or name.startswith("validation_"))
        bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if isinstance(row[name], int | float)})

    with tqdm(total=epochs, initial=done, desc=label, unit="epoch", leave=False) as bar:
        yield show


@contextmanager
def counting(label: str | None, unit: str) -> Iterator[Callable[[int, int], object]]:
    """What shows how many of all things are done in a bar; nothing without a label.

    Raises:
        TypeError: the label is no string.
    """
    if label is None:
        yield lambda done, total: None
        return
    if not isinstance(label, str):
        raise TypeError(f'progress must be the label of a bar, such as progress="label", got {label!r}')
    with needs("training"):
        from tqdm import tqdm

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with tqdm(desc=label, unit=unit, leave=False) as bar:
        yield show


def log_row(fabric: Fabric, row: dict[str, Any]) -> None:
    """Give an epoch's numbers to the loggers of a Fabric, which write them at once."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "epoch"}
    fabric.log_dict(numbers, step=row["epoch"])
    if fabric.is_global_zero:
        for logger in fabric.loggers:
            logger.save()
