"""``odenets info``: versions, libraries of the extras, devices and kernels."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
import typer

import odenets
from odenets.command.devices import available, system
from odenets.command.kernels import ALWAYS, PLAIN, kernels_on, triton
from odenets.command.speed.solves import PEERS

__all__ = ["facts", "show"]

EXTRAS = ("training", "detection", "transport", "plot", "images", "command")
BESIDE = {"timm": "pip install timm", **PEERS}
"""Libraries that are used where they are there, and no extra brings."""
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_HOME")


def show(as_json: bool) -> None:
    """Print it."""
    typer.echo(json.dumps(facts(), indent=1) if as_json else _text(facts()))


def facts() -> dict[str, Any]:
    """What is here, as plain values; memory in bytes, None for a library that is not installed."""
    devices = available()
    versions = {name: _version(name) for name in _libraries(None)}
    return {
        "odenets": odenets.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": system(),
        "versions": versions | {"triton": triton()},
        "cuda": torch.version.cuda,
        "compiler": shutil.which(os.environ.get("CXX") or "g++"),
        "extras": {
            extra: {name: _version(name) for name in _libraries(extra)} for extra in EXTRAS if _libraries(extra)
        },
        "beside": {name: _version(name) for name in BESIDE},
        "devices": devices,
        "kernels": {one["device"]: kernels_on(torch.device(one["device"])) for one in devices},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _libraries(extra: str | None) -> list[str]:
    """What the installed package needs, or one of its extras."""
    try:
        lines = requires("odenets") or []
    except PackageNotFoundError:  # run from its sources
        return ["torch", "numpy"] if extra is None else []
    wanted = {}
    for line in lines:
        of = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if (of[1] if of else None) == extra:
            wanted[re.split(r"[^\w.-]", line, maxsplit=1)[0]] = None
    return list(wanted)


def _text(told: dict[str, Any]) -> str:
    lines = [f"odenets {told['odenets']}", f"Python {told['python']}, {told['system']}"]
    lines.append(", ".join(f"{name} {number or 'missing'}" for name, number in told["versions"].items()))
    lines.append(f"CUDA of torch: {told['cuda'] or 'none'}")
    lines.append(f"C++ compiler for torch.compile: {told['compiler'] or 'none'}")
    lines += [f"{name}={value}" for name, value in told["environment"].items()]
    lines += ["", "Extras"]
    for extra, libraries in told["extras"].items():
        missing = [name for name, number in libraries.items() if number is None]
        remedy = f"; missing {', '.join(missing)}: pip install 'odenets[{extra}]'" if missing else ""
        present = ", ".join(f"{name} {number}" for name, number in libraries.items() if number) or "nothing"
        lines.append(f"  {extra}: {present}{remedy}")
    if not told["extras"]:
        lines.append("  unknown: the package runs from its sources and is not installed")
    beside = [
        f"{name} {number}" if number else f"no {name} ({BESIDE[name]})" for name, number in told["beside"].items()
    ]
    lines += [f"  beside them: {', '.join(beside)}", "", "Devices"]
    lines += [f"  {_device(one)}" for one in told["devices"]]
    if len(told["devices"]) == 1:
        lines.append("  no CUDA device, no MPS")
    lines += ["", "Kernels of solvers.reductions"]
    for device, one in told["kernels"].items():
        runs = f" ({one['runs']})" if one["runs"] else ""
        lines += [f"  {device}: {one['kernels']}{runs}", f"    {one['why']}"]
    lines.append(f"  {PLAIN} {ALWAYS}")
    return "\n".join(lines)


def _device(one: dict[str, Any]) -> str:
    parts = [one["name"]]
    if "threads" in one:
        parts.append(f"{os.cpu_count()} processors, {one['threads']} threads of torch")
    if "memory" in one:
        parts.append(f"{one['memory'] / 2**30:.1f} GiB, compute capability {one['capability']}")
    return f"{one['device']}: {', '.join(parts)}"
