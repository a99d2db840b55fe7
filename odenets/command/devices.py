"""The device that is asked for, and those that are there."""

from __future__ import annotations

import platform
from typing import Any

import torch

from odenets.command.mistakes import USAGE, Mistake
from odenets.training.runs import processor

__all__ = ["available", "chosen", "name_of", "system"]


def chosen(name: str) -> torch.device:
    """The device of a name; "auto" is a CUDA device if there is one, or else the CPU.

    Raises:
        Mistake: no device has that name, or it is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Mistake(f"--device must be cpu, cuda, cuda:1, mps or auto, got {name}", USAGE) from error
    known = [each["device"] for each in available()]
    if str(device) not in known and not any(each.startswith(f"{device}:") for each in known):
        raise Mistake(f"--device {name} is not here: there {_are(known)}{_why(device)}", USAGE)
    return device


def _are(names: list[str]) -> str:
    return f"is {names[0]} alone" if len(names) == 1 else f"are {', '.join(names)}"


def _why(device: torch.device) -> str:
    if device.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"; torch {torch.__version__} is built without CUDA"
    return ""


def available() -> list[dict[str, Any]]:
    """The CPU, CUDA devices with their memory in bytes, and MPS."""
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": processor(), "threads": torch.get_num_threads()}]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one = torch.cuda.get_device_properties(i)
        capability = f"{one.major}.{one.minor}"
        devices.append({"device": f"cuda:{i}", "name": one.name, "memory": one.total_memory, "capability": capability})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Metal Performance Shaders"})
    return devices


def name_of(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor() if device.type == "cpu" else device.type


def system() -> str:
    """The operating system with its release, where that says much, and the kind of processor."""
    release = {"Darwin": platform.mac_ver()[0], "Linux": "-".join(platform.libc_ver()).strip("-")}
    name = platform.system()
    return " ".join(part for part in (name, release.get(name, platform.release()), platform.machine()) if part)
