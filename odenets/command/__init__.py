"""The ``odenets`` command: what is installed, the path of images through a network, the speed of solvers here.

``odenets --help``, or ``python -m odenets --help`` where the command is not on the path.
"""

from odenets.command.entry import main

__all__ = ["main"]
