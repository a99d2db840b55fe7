"""What is said of libraries that are not there, or are not as they should be."""

import sys
from types import ModuleType

import pytest

from odenets.errors import needs

REMEDY = "pip install 'odenets[transport]'"  # quoted: zsh takes brackets for a pattern


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library with one name, and a part that needs another library, which is not there."""
    (tmp_path / "optional_library").mkdir()
    (tmp_path / "optional_library" / "__init__.py").write_text("name = 1")
    (tmp_path / "optional_library" / "part.py").write_text("import its_own_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("optional_library")]:
        del sys.modules[name]


def test_what_is_there_is_imported(library):
    with needs("transport"):
        import optional_library
    assert optional_library.name == 1


def test_the_library_that_is_lacking_is_named(library):
    """Not the one that imports it, which is there."""
    with pytest.raises(ModuleNotFoundError) as raised, needs("transport"):
        import optional_library.part  # noqa: F401
    assert str(raised.value) == f"its_own_dependency is needed here and not installed: {REMEDY}"
    assert raised.value.name == "its_own_dependency"
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_one_that_is_hidden_is_lacking(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "optional_library", None)
    with pytest.raises(ModuleNotFoundError, match="optional_library is needed here and not installed"), needs("plot"):
        import optional_library.part  # noqa: F401


def test_one_that_is_too_old_raises_its_own_error_with_a_note(library):
    with pytest.raises(ImportError, match="cannot import name 'new_name' from 'optional_library'") as raised:  # noqa: SIM117
        with needs("transport"):
            from optional_library import new_name  # noqa: F401
    assert type(raised.value) is ImportError
    assert raised.value.__notes__ == [
        f"{REMEDY.replace('install', 'install --upgrade')} brings the versions that this needs"
    ]


def test_a_stand_in_without_a_spec_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "optional_stand_in", ModuleType("optional_stand_in"))
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'optional_stand_in\.part'"), needs("transport"):
        import optional_stand_in.part  # noqa: F401
