"""What a release must pass, from its files and in environments of their own: ``make release``.

The files of ``dist`` are built and checked. Each is installed far from the checkout with the oldest and the newest
torch, on every supported Python that is at hand (others are skipped by name), where a user's first steps run; so do
they with the oldest of all that the package asks for; and the fast tests run against the wheel and the oldest torch.
"""

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
PYTHONS = nox.project.python_versions(nox.project.load_toml(ROOT / "pyproject.toml"))  # of the classifiers
TORCH = {"oldest": ("torch==2.8.*", "torchvision==0.23.*"), "newest": ("torch", "torchvision")}


def built(kind):
    """The file of this kind, "wheel" or "sdist", in ``dist``."""
    (file,) = (ROOT / "dist").glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return file


def install(session, kind, extra, *others):
    """A file of ``dist`` with an extra, beside other requirements."""
    session.install(f"odenets{extra} @ {built(kind).as_uri()}", *others)


def first_steps(session, *parts):
    """Of a user, in another folder, who sees nothing of the checkout."""
    shutil.copy(ROOT / "tests" / "smoke.py", folder := tempfile.mkdtemp())
    with session.chdir(folder):
        session.run("python", "-I", "smoke.py", *parts)


@nox.session(python=False)
def build(session):
    """The sdist, the wheel from it, and what PyPI would refuse of them."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run(sys.executable, "-m", "build")
    session.run(sys.executable, "-m", "twine", "check", "--strict", built("wheel"), built("sdist"))


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [nox.param(name, id=name) for name in TORCH])
@nox.parametrize("kind", [nox.param(kind, id=kind) for kind in ("wheel", "sdist")])
def smoke(session, kind, torch):
    """First steps with what comes by itself, then with the extras; examples take models of torchvision."""
    line, models = TORCH[torch]
    for extra, part in (("", "core"), ("[command]", "command"), ("[training]", "training")):
        install(session, kind, extra, line)
        first_steps(session, part)
    install(session, kind, "[all]", line, models)
    first_steps(session, "doctests")


@nox.session(python=PYTHONS[0])
def lowest(session):
    """First steps with the oldest of all that is asked for."""
    install(session, "wheel", "[all]", "torchvision>=0.23", "--resolution", "lowest-direct")
    first_steps(session, "core", "command", "training", "doctests")


@nox.session(python=PYTHONS[0])
def suite(session):
    """The fast tests, as the sdist holds them, of the installed wheel with the oldest torch."""
    install(
        session, "wheel", "[dev]", *TORCH["oldest"], "--compile-bytecode"
    )  # or syntax warnings of others are errors
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(built("sdist")) as packed:
            packed.extractall(folder, filter="data")
        (tree,) = Path(folder).iterdir()
        (packages,) = Path(session.virtualenv.location).glob("lib/python*/site-packages")
        for name in ("odenets", "solvers"):
            shutil.rmtree(tree / name)
            (tree / name).symlink_to(packages / name)
        with session.chdir(tree):
            session.run("pytest", "-q", "-n", "auto", "--dist", "worksteal", "tests", *session.posargs)
