"""The reference: a page for each public module, made from its ``__all__``; references to names by any of their paths.

An object has one home, the first public module that lists it: ``odenets.flow.Flow`` and a plain ``Flow`` in a docstring
both point at ``odenets.Flow``. What is not public stays plain text, and a reference that leads nowhere fails the
build.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from textwrap import indent
from types import FunctionType, ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

MODULES = (
    "odenets", "odenets.fields", "odenets.models", "odenets.schemes", "odenets.fixup", "odenets.measures",
    "odenets.recording", "odenets.adapting", "odenets.training", "odenets.least_action", "odenets.penalties",
    "odenets.maximum_principle", "odenets.depth", "odenets.module_wise", "odenets.detection", "odenets.transport",
    "odenets.analysis", "odenets.plotting", "odenets.normalization", "odenets.errors", "solvers",
    "solvers.reductions", "solvers.torchdiffeq",
)  # fmt: skip

ABBREVIATIONS = {
    "Array": "numpy.ndarray", "Axes": "matplotlib.axes.Axes", "Callbacks": "odenets.training.callbacks.Callbacks",
    "Collate": "odenets.training.sources.Collate", "DataFrame": "pandas.DataFrame", "Fabric": "lightning_fabric.Fabric",
    "Figure": "matplotlib.figure.Figure", "Interval": "odenets.training.optimization.Interval",
    "LRScheduler": "torch.optim.lr_scheduler.LRScheduler",
    "MakeLRScheduler": "odenets.training.optimization.MakeLRScheduler",
    "MakeOptimizer": "odenets.training.optimization.MakeOptimizer",
    "MetricFunction": "odenets.training.metrics.MetricFunction", "Optimizer": "torch.optim.Optimizer",
    "Path": "pathlib.Path", "Precision": "lightning_fabric.plugins.Precision",
    "Site": "odenets.adapting.program.places.Site",
    "Source": "odenets.training.sources.Source", "Tensor": "torch.Tensor", "TypeIs": "typing_extensions.TypeIs",
    "ndarray": "numpy.ndarray", "np.ndarray": "numpy.ndarray",
}  # fmt: skip


def _objects(module: str) -> Iterator[tuple[str, Any]]:
    """Public names of a module, and what they stand for; modules have pages of their own."""
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if not isinstance(value, ModuleType):
            yield name, value


@cache
def homes() -> dict[int, str]:
    """Full public names of functions and classes, by identity."""
    found: dict[int, str] = {}
    for module in MODULES:
        for name, value in _objects(module):
            if _has_home(value):
                found.setdefault(id(value), f"{module}.{name}")
    return found


def _has_home(value: object) -> bool:
    return callable(value) and hasattr(value, "__module__")


def page(module: str) -> str:
    """The page of a module, in reST."""
    rows, entries = [], []
    for name, value in _objects(module):
        full = f"{module}.{name}"
        home = homes()[id(value)] if _has_home(value) else full
        rows.append(f"   {name if home == full else '~' + home}")
        if home == full:
            entries.append(_entry(full, value))
    head = [module, "=" * len(module), "", f".. automodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
    return "\n".join([*head, *rows, "", *entries])


def _entry(full: str, value: object) -> str:
    if inspect.isclass(value):
        options = ["members:", "inherited-members:", "special-members: __call__"]
        options += ["show-inheritance:"] * (_shown(value.__bases__) != [])
        return "\n   :".join([f".. autoclass:: {full}", *options]) + "\n"
    if inspect.isfunction(value):
        return f".. autofunction:: {full}\n"
    if (function := function_of(value)) is not None:
        text = indent(str(GoogleDocstring(inspect.getdoc(function) or "", what="function")), "   ")
        signature, (module, _, name) = signature_of(function), full.rpartition(".")
        head = f".. py:function:: {name}{stringify_signature(signature, unqualified_typehints=True)}"
        return f"{head}\n   :module: {module}\n\n{text}\n"
    return f".. autodata:: {full}\n   :no-value:\n"


def _shown(bases: Iterable[type]) -> list[type]:
    """The bases that a reader knows: public ones and those of other libraries, behind what is not public."""
    shown: list[type] = []
    for base in bases:
        ours = base.__module__.partition(".")[0] in ("odenets", "solvers")
        shown += _shown(base.__bases__) if ours and id(base) not in homes() else [base] * (base is not object)
    return list(dict.fromkeys(shown))


def show_bases(app: Sphinx, name: str, value: type, options: object, bases: list[type]) -> None:
    """Show the bases that a reader knows."""
    bases[:] = _shown(value.__bases__)


def function_of(value: object) -> FunctionType | None:
    """The function that a measure is made of."""
    function = getattr(value, "function", None)
    return function if isinstance(function, FunctionType) and not inspect.isclass(value) else None


def write_pages(app: Sphinx) -> None:
    """Write the pages that changed."""
    folder = Path(app.srcdir) / "reference"
    for module in MODULES:
        path, text = folder / f"{module}.rst", page(module)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: nodes.TextElement
) -> nodes.reference | nodes.TextElement | None:
    """A reference by another path than the public one; plain text for what exists and is not in the reference."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"]).partition("[")[0]
    domain = env.domains.python_domain
    for prefix in (node.get("py:class"), node.get("py:module"), *MODULES, None):
        name = _find(f"{prefix}.{target}" if prefix else ABBREVIATIONS.get(target, target))
        if name is None:
            continue
        for full in (name, name.rpartition(".")[0]):  # an attribute may be written up with its class
            if full in domain.objects:
                return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, contents)
        return contents
    return None


@cache
def _find(path: str) -> str | None:
    """The public name of what a dotted path leads to, or the path itself; None where it leads nowhere."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        name = ".".join(parts[:n])
        for part in parts[n:]:
            fields = {**getattr(value, "__annotations__", {}), **getattr(value, "__dataclass_fields__", {})}
            if not hasattr(value, part) and part not in fields:
                return None
            value = getattr(value, part, None)
            name = homes().get(id(value), f"{name}.{part}") if _has_home(value) else f"{name}.{part}"
        return name
    return None


def skip(app: Sphinx, what: str, name: str, member: object, skipped: bool, options: object) -> bool | None:
    """Leave out what a class has from another library, and the fields of tuples, which it describes itself."""
    if str(getattr(member, "__doc__", "")).startswith("Alias for field number"):
        return True
    owner = getattr(member, "__objclass__", getattr(member, "fget", None))  # of what is written in C, of a property
    module = getattr(member, "__module__", None) or getattr(owner, "__module__", None)
    return True if module and module.partition(".")[0] not in ("odenets", "solvers") else None


def describe(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """What is written below a constant, where it is defined, and in the function of a measure."""
    if what == "data" and (written := below(name)):
        lines[:] = written
    if (function := function_of(value)) is not None:
        lines[:] = [*(inspect.getdoc(function) or "").splitlines(), ""]


def below(full: str) -> list[str]:
    """The lines below a constant, which a package may import from the module that defines it."""
    module, _, name = full.rpartition(".")
    analyzer = ModuleAnalyzer.for_module(module)
    if written := analyzer.find_attr_docs().get(("", name)):
        return written
    imports = [node for node in ast.parse(analyzer.code).body if isinstance(node, ast.ImportFrom)]
    sources = [node.module for node in imports if any(alias.name == name for alias in node.names)]
    return below(f"{sources[0]}.{name}") if sources else []


def shorten(
    app: Sphinx, what: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A default that each instance has of its own, in a form that can be parsed."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", write_pages, priority=100)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-bases", show_bases)
    app.connect("autodoc-process-docstring", describe, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
