"""What a user can get wrong, as one line on the standard error and an exit code, never a traceback."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import typer

__all__ = ["FAILED", "USAGE", "Mistake", "near", "one_line", "require", "told"]

FAILED, USAGE = 1, 2
LONGEST = 2000
"""Letters of what another library says."""


class Mistake(Exception):
    """Something to be told in one line.

    Args:
        message: what is wrong, and what would be right.
        code: exit code; 2 for arguments that are wrong, 1 for what fails with right ones.
    """

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def told() -> Iterator[None]:
    """Around a subcommand: a :class:`Mistake` becomes a line and an exit code, a warning a line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield
    except Mistake as mistake:
        _say("Error", str(mistake), typer.colors.RED)
        raise typer.Exit(mistake.code) from mistake
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):  # what odenets.errors.needs says
            raise
        _say("Error", str(error), typer.colors.RED)
        raise typer.Exit(FAILED) from error


def _show(message: Warning | str, *_: Any) -> None:
    _say("Warning", one_line(message), typer.colors.YELLOW)


def _say(kind: str, text: str, color: str) -> None:
    typer.echo(f"{typer.style(f'{kind}:', fg=color, bold=True)} {text}", err=True)


def one_line(message: object) -> str:
    """A message of another library without its line breaks, and not too long."""
    text = " ".join(str(message).split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def near(name: str, names: Iterable[str]) -> str:
    """A question for what is meant, if names are near."""
    matches = get_close_matches(name, sorted(set(names)), n=4, cutoff=0.6)
    return f": did you mean {' or '.join(matches)}?" if matches else ""


def require(library: str, line: str, purpose: str) -> None:
    """Refuse early what a library that is not installed is needed for.

    Raises:
        Mistake: it is not.
    """
    if find_spec(library) is None:
        raise Mistake(f"{purpose} needs {library}, which is not installed: {line}", FAILED)
