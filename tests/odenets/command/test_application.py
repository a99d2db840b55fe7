"""The command as a whole: help, version, errors of usage, and a process of its own."""

import subprocess
import sys
from importlib.metadata import version

import pytest

SUBCOMMANDS = {
    "info": ["--json"],
    "record": ["MODEL", "IMAGES", "--weights", "--option", "--blocks", "--measure", "--size", "--gray", "--transform",
               "--device", "--batch-size", "--seed", "--csv", "--figure", "--by-folder"],
    "bench": ["--seconds", "--quick", "--device", "--threads", "--backward", "--json"],
}  # fmt: skip


def test_the_version_is_that_of_the_package(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"odenets {version('odenets')}\n")


def test_help_names_every_subcommand(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in SUBCOMMANDS)


@pytest.mark.parametrize(("name", "options"), SUBCOMMANDS.items())
def test_help_of_a_subcommand_names_every_option(run, name, options):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert all(option in result.stdout for option in options)
    assert run(name, "-h").stdout == result.stdout


@pytest.mark.parametrize(
    "words",
    [["recrd"], ["record"], ["record", "resnet18"], ["info", "--jsn"], ["bench", "--threads", "0"]],
    ids=" ".join,
)
def test_a_wrong_call_is_an_error_of_usage(run, words):
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_help_loads_no_torch_and_is_plain_where_it_is_piped():
    code = "app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    done = python("-c", f"import sys; from odenets.command.application import app; {code}")
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stdout.isascii()


@pytest.mark.slow
def test_python_dash_m_is_the_command(images):
    done = python("-m", "odenets", "record", "resnet18", images, "--weights", "none", "--size", "32")
    assert done.returncode == 0, done.stderr
    assert "layer4.1" in done.stdout
    assert done.stdout.isascii()
    wrong = python("-m", "odenets", "record", "resnet18", images / "none", "--weights", "none")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"Error: IMAGES: no file or folder {images / 'none'}\n"
