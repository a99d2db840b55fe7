"""``from solvers import ...`` offers whatever its functions take and return."""

import ast
import importlib
import inspect
import pkgutil

import pytest

import solvers

PUBLIC = [getattr(solvers, name) for name in solvers.__all__]
DEFINED = {
    name: module.__name__
    for info in pkgutil.iter_modules(solvers.__path__, "solvers.")
    for module in [importlib.import_module(info.name)]
    for name in getattr(module, "__all__", ())
}


def annotations(value):
    """The annotations of a function, or of a class, its fields and its public methods, as text."""
    if inspect.isclass(value):
        yield from vars(value).get("__annotations__", {}).items()
        for name, member in inspect.getmembers(value):
            if (not name.startswith("_") or name == "__call__") and inspect.isfunction(inspect.unwrap(member)):
                yield from annotations(inspect.unwrap(member))
    elif inspect.isfunction(value):
        yield from value.__annotations__.items()


def names_in(annotation):
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)} if text else set()


@pytest.mark.parametrize("value", PUBLIC, ids=solvers.__all__)
def test_what_a_signature_names_is_exported(value):
    named = {name for key, text in annotations(value) if not key.startswith("_") for name in names_in(text)}
    assert {name for name in named if name in DEFINED} <= set(solvers.__all__)


def test_signatures_name_types_of_the_package():
    named = {name for value in PUBLIC for _, text in annotations(value) for name in names_in(text)}
    assert {"Solution", "Step", "Field", "Tolerance", "Status", "Interpolant", "SampleStatistics"} <= named
