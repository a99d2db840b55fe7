"""What a user does first with an installed package, far from its sources.

    python -I smoke.py core command training doctests

``core`` needs nothing but the package, ``command`` and ``training`` the extras of these names, ``doctests`` all.
"""

import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path

PACKAGES = ("odenets", "solvers")


def modules(command=False):
    """Every module of both packages, imported; those of the command, which has an extra, where they are wanted."""
    for package in map(importlib.import_module, PACKAGES):
        yield package
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and (command or not module.name.startswith("odenets.command.")):
                yield importlib.import_module(module.name)


def core():
    """Every module imports from the environment, and README's first lines run."""
    import odenets

    for module in modules():
        assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__
    assert odenets.__version__ == metadata.version("odenets")
    page = metadata.metadata("odenets").get_payload() or metadata.metadata("odenets")["Description"]
    exec(compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "README.md", "exec"), {})


def command():
    """``odenets info`` tells the version that is installed."""
    told = subprocess.run(
        [Path(sys.executable).with_name("odenets"), "info"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert metadata.version("odenets") in told.stdout, told.stdout


def training():
    """A training on digits; its weights are in a file that is read without pickle and gives the same network."""
    import torch

    import odenets
    from odenets.training import Batches, evaluate, fit, load

    train, test = load("digits")
    torch.manual_seed(0)
    network = odenets.models.small_network(solver="bs23", depth=3)
    fit(network, Batches(train, 64, seed=0), epochs=3, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    accuracy = evaluate(network, Batches(test, 500)).accuracy
    assert accuracy > 0.5, accuracy
    with tempfile.TemporaryDirectory() as folder:
        odenets.save_weights(network, Path(folder) / "weights")
        file = Path(folder) / "weights"
        file = file if file.exists() else next(Path(folder).iterdir())
        data = file.read_bytes()
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the head of a safetensors file
        again = odenets.models.small_network(solver="bs23", depth=3)
        unpickled = []
        sys.addaudithook(lambda event, details: unpickled.append(details) if event == "pickle.find_class" else None)
        odenets.load_weights(again, file)
        assert not unpickled, unpickled
    x = test.x[:100]
    assert torch.equal(again.eval()(x), network.eval()(x))


def doctests():
    """Every example in the packages."""
    import torch

    attempted = 0
    for module in modules(command=True):
        torch.manual_seed(0)
        result = doctest.testmod(module)
        assert not result.failed, module.__name__
        attempted += result.attempted
    assert attempted > 100, attempted


if __name__ == "__main__":
    for part in sys.argv[1:]:
        {"core": core, "command": command, "training": training, "doctests": doctests}[part]()
        print(f"{part}: works with odenets {metadata.version('odenets')}, torch {metadata.version('torch')}")
