"""Examples of decorated functions and of measures run as well.

doctest looks for the former in the module of the decorator, and for the latter not at all, which are no functions.
"""

import doctest
import inspect
from types import ModuleType
from typing import Any

_is_of = doctest.DocTestFinder._from_module  # type: ignore[attr-defined]  # no public hook


def _is_of_undecorated(self: doctest.DocTestFinder, module: ModuleType, value: Any) -> bool:
    return _is_of(self, module, inspect.unwrap(value) if inspect.isfunction(value) else value)


doctest.DocTestFinder._from_module = _is_of_undecorated  # type: ignore[attr-defined]

_find = doctest.DocTestFinder._find  # type: ignore[attr-defined]  # no public hook


def _find_in_measures(self: doctest.DocTestFinder, tests: Any, value: Any, name: str, module: ModuleType, *rest: Any):
    _find(self, tests, value, name, module, *rest)
    for key, one in vars(value).items() if inspect.ismodule(value) else ():
        function = getattr(one, "function", None)
        if inspect.isfunction(function) and not inspect.isclass(one) and function.__module__ == value.__name__:
            self._find(tests, function, f"{name}.{key}", module, *rest)  # type: ignore[attr-defined]


doctest.DocTestFinder._find = _find_in_measures  # type: ignore[attr-defined]
