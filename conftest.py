"""Examples of decorated functions run as well: doctest looks for them in the module of the decorator."""

import doctest
import inspect
from types import ModuleType
from typing import Any

_is_of = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]  # no public hook


def _is_of_undecorated(self: doctest.DocTestFinder, module: ModuleType, value: Any) -> bool:
    return _is_of(self, module, inspect.unwrap(value) if inspect.isfunction(value) else value)


doctest.DocTestFinder._from_module = _is_of_undecorated  # type: ignore[attr-defined]
