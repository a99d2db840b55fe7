"""``odenets info``: versions, devices and kernels as they are."""

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from odenets.command import information, kernels
from odenets.training import runs
from solvers.reductions import SMALL, operator
from solvers.reductions.functional import mean_square


@pytest.fixture
def told(run):
    result = run("info", "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_versions_are_those_that_are_installed(told):
    assert told["odenets"] == version("odenets")
    assert told["versions"]["torch"] == version("torch")
    assert told["extras"]["training"]["safetensors"] == version("safetensors")
    assert told["devices"][0] == {"device": "cpu", "name": runs.processor(), "threads": torch.get_num_threads()}


def test_a_library_that_is_missing_comes_with_the_line_that_installs_it(run, monkeypatch):
    monkeypatch.setattr(information, "_version", lambda name: None if name in ("pot", "timm") else "1.0")
    lines = [line.strip() for line in run("info").stdout.splitlines()]
    (transport,) = [line for line in lines if line.startswith("transport: ")]
    assert transport == "transport: scipy 1.0; missing pot: pip install 'odenets[transport]'"
    assert any("no timm (pip install timm)" in line for line in lines)


def test_from_its_sources_the_package_says_that_its_extras_are_unknown(run, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(information, "requires", requires)
    assert "unknown: the package runs from its sources" in run("info").stdout


def test_the_text_tells_the_kernels_and_that_they_run(run):
    text = run("info").stdout
    assert f"for operands of more than {SMALL:,} numbers" in text
    assert "tried, and right" in text


@pytest.mark.parametrize("numbers", [SMALL, SMALL + 1])
def test_the_size_that_decides_is_the_one_that_is_told(numbers, monkeypatch):
    calls = []
    row_moments = operator.row_moments
    monkeypatch.setattr(operator, "row_moments", lambda *args: calls.append(1) or row_moments(*args))
    mean_square(torch.zeros(1, numbers))
    assert bool(calls) == (numbers > SMALL)


def test_without_a_kernel_it_says_why():
    told = kernels.kernels_on(torch.device("meta"))
    assert told == {"kernels": kernels.PLAIN, "why": "there are no kernels for meta", "runs": None}


def test_a_kernel_that_fails_is_told(monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(operator, "row_moments", broken)
    assert kernels.kernels_on(torch.device("cpu"))["runs"] == "fails: RuntimeError: no compiler at all"


@pytest.mark.gpu
def test_a_gpu_is_told_with_its_memory_and_its_kernels(told):
    gpu = told["devices"][1]
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["memory"] == torch.cuda.get_device_properties(0).total_memory
    assert "Triton" in told["kernels"]["cuda:0"]["kernels"]
    assert told["kernels"]["cuda:0"]["runs"] == "tried, and right"
