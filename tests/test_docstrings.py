"""Public names say what they are, what they take, return and raise, and show how they are used.

Docstrings are read as the site reads them, by napoleon, for the modules of ``docs/extensions/public_names.py``. Their
examples run as doctests; ``make docs`` checks their references and their reST.
"""

import ast
import importlib
import inspect
import re
import runpy
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sphinx.ext.napoleon import Config, GoogleDocstring

ROOT = str(Path(__file__).parents[1])
SITE = runpy.run_path(f"{ROOT}/docs/extensions/public_names.py")
MODULES, below, function_of = SITE["MODULES"], SITE["below"], SITE["function_of"]
PACKAGES = ("odenets", "solvers")
READING = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)

NO_EXAMPLE = {
    "odenets.detection.Attacked", "odenets.detection.Choice", "odenets.detection.Evasion", "odenets.detection.Parts",
    "odenets.detection.Scores",
    "odenets.module_wise.WorkerLostError", "odenets.module_wise.fit_in_processes", "odenets.training.Instances",
    "odenets.normalization.check_closing_statistics",
    "solvers.ControllerState", "solvers.Interpolant", "solvers.MaxStepsError", "solvers.NonFiniteError",
    "solvers.SampleController", "solvers.SampleInterpolant", "solvers.SampleStates", "solvers.SampleStatistics",
    "solvers.Statistics", "solvers.StepUnderflowError", "solvers.reductions.combination",
    "solvers.reductions.error_ratios",
}  # fmt: skip
"""What is shown with another name, is made by the library alone, or takes more than a few lines."""


NEVER_RAISED = {"Measure.map": {"TypeError"}}
"""Errors of private functions that what calls them cannot bring about."""


class Documented(NamedTuple):
    """A function or method, or a class as what makes its objects, and the docstrings that speak for it."""

    name: str
    function: Any
    texts: tuple[str, ...]

    def sections(self, *kinds: str) -> set[str]:
        """The names in the sections of these kinds, "" in one that has none."""
        found = [field for text in self.texts for field in _fields(text) if field[0] in kinds]
        return {re.sub(r"[\\* ]", "", name) for _, names in found for name in names.split(",")}

    def literals(self) -> set[str]:
        """The words that stand in the text as code."""
        return {word for code in re.findall("``(.+?)``", " ".join(self.texts)) for word in re.findall(r"\w+", code)}

    def parameters(self) -> set[str]:
        """The names of the signature, but for ``**unknown``, which a function refuses."""
        named_tuple = hasattr(self.function, "_fields")
        if inspect.isclass(self.function) and not named_tuple and not _is_ours(self.function.__init__):
            return set()  # torch's, or that of a protocol
        parameters = inspect.signature(self.function).parameters.values()
        refused = [p.name for p in parameters if p.kind is p.VAR_KEYWORD and p.name == "unknown"]
        return {p.name for p in parameters if not p.name.startswith("_")} - {"self", "cls", *refused}

    def raises(self) -> set[str]:
        """The errors that the body makes, or a private function of the same module that the body calls."""
        made = {self.function}
        if inspect.isclass(self.function):
            made = {getattr(self.function, name, None) for name in ("__init__", "__post_init__")}
        made = {f for f in made if _is_ours(f) and f.__code__.co_filename != "<string>"}  # as dataclass writes it
        private = {f.__globals__.get(name) for f in made for name in _parsed(f)[1]}
        made |= {f for f in private if _is_ours(f) and f.__module__ == self.function.__module__}
        return {error for function in made for error in _parsed(function)[0]}


def _is_ours(function: Any) -> bool:
    return inspect.isfunction(function) and function.__module__.startswith(PACKAGES)


@cache
def _fields(text: str) -> list[tuple[str, str]]:
    reST = str(GoogleDocstring(text, READING, what="function"))
    return re.findall(r"^:(param|ivar|raises|returns|Yields)(?: ([^:]*))?:", reST, re.MULTILINE)


@cache
def _parsed(function: Any) -> tuple[set[str], set[str]]:
    """The errors that a function raises, and the private functions that it calls, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    nodes = [*ast.walk(tree)]
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    raised = [node.exc.func for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    errors = {node.id for node in raised if isinstance(node, ast.Name) and node.id[0].isupper()}
    return errors, {name for name in called if name.startswith("_")}


def _text(value: Any) -> str:
    return inspect.cleandoc(value.__doc__ or "")


@cache
def _names() -> dict[str, dict[str, Any]]:
    """The public names of each module, those which an earlier one lists left out."""
    names: dict[str, dict[str, Any]] = {module: {} for module in MODULES}
    seen = set()
    for module, own in names.items():
        loaded = importlib.import_module(module)
        for name in loaded.__all__:
            value = getattr(loaded, name)
            if not inspect.ismodule(value) and id(value) not in seen:
                own[name] = value
                seen.add(id(value))
    return names


def _documented(module: str) -> Iterator[Documented]:
    """The functions of a module, its classes, their public methods, and their calls."""
    for name, value in _names()[module].items():
        value = function_of(value) or value
        if inspect.isfunction(value):
            yield Documented(name, value, (_text(value),))
        if inspect.isclass(value):
            bases = [base for base in value.__mro__ if base.__module__.startswith(PACKAGES)]
            yield Documented(name, value, tuple(map(_text, bases)))
            for key, member in {key: member for base in reversed(bases) for key, member in vars(base).items()}.items():
                over = [vars(base)[key] for base in bases if key in vars(base)]  # which say what it does not say anew
                for attribute in ("fget", "__func__", "func"):  # of properties, class methods, cached properties
                    member = getattr(member, attribute, member)
                if inspect.isfunction(member) and (key == "__call__" or not key.startswith("_")):
                    yield Documented(f"{name}.{key}", member, tuple(map(_text, over)))


each_module = pytest.mark.parametrize("module", MODULES)


@each_module
def test_every_name_has_a_docstring(module):
    assert _text(importlib.import_module(module))
    assert [one.name for one in _documented(module) if not one.texts[0]] == []
    described = {one.name for one in _documented(module)}
    assert [name for name in {*_names()[module]} - described if not below(f"{module}.{name}")] == []


@each_module
def test_every_parameter_is_described(module):
    """In a section where there is one, else in the text, as code."""
    lacking = {}
    for one in _documented(module):
        described = one.sections("param", "ivar") | (set() if one.sections("param") else one.literals())
        lacking[one.name] = one.parameters() - described
    assert {name: names for name, names in lacking.items() if names} == {}


@each_module
def test_nothing_is_described_that_is_not_taken(module):
    stale = {one.name: one.sections("param") - one.parameters() for one in _documented(module)}
    assert {name: names for name, names in stale.items() if names} == {}


@each_module
def test_what_describes_its_parameters_says_what_it_returns(module):
    silent = [
        one.name
        for one in _documented(module)
        if inspect.isfunction(one.function)
        and one.sections("param")
        and not one.sections("returns", "Yields")
        and one.function.__annotations__.get("return") not in (None, "None", "NoReturn")
    ]
    assert silent == []


@each_module
def test_every_error_is_described(module):
    silent = {one.name: one.raises() - one.sections("raises") for one in _documented(module)}
    silent = {name: errors - NEVER_RAISED.get(name, set()) for name, errors in silent.items()}
    assert {name: errors for name, errors in silent.items() if errors} == {}


@each_module
def test_every_class_and_function_is_shown_in_use(module):
    """In an example of its own, of a method, or of its module."""
    texts = dict.fromkeys([one.name.partition(".")[0] for one in _documented(module)], "")
    for one in _documented(module):
        texts[one.name.partition(".")[0]] += one.texts[0]
    overview = "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) .*", _text(importlib.import_module(module)), re.MULTILINE))
    shown = {f"{module}.{name}" for name, text in texts.items() if ">>>" in text or re.search(rf"\b{name}\b", overview)}
    assert {f"{module}.{name}" for name in texts} - shown - NO_EXAMPLE == set()
    assert shown & NO_EXAMPLE == set()


def test_the_reference_has_a_page_for_every_public_module():
    package = importlib.import_module("odenets")
    rooms = {f"odenets.{name}" for name in dir(package) if inspect.ismodule(getattr(package, name))}
    assert rooms | {*PACKAGES} <= set(MODULES)
    listed = re.search(r"```{toctree}\n(.*?)\n```", Path(ROOT, "docs/reference/index.md").read_text(), re.DOTALL)
    assert listed is not None
    assert listed[1].split("\n") == [*MODULES]
