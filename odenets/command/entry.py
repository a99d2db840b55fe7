"""Where the command begins."""

from __future__ import annotations

import sys

from odenets.errors import needs

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process; what it lacks is told in a line."""
    try:
        with needs("command"):
            import rich  # noqa: F401
            import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}")
    from odenets.command.application import app

    app(prog_name="odenets")
