import gc
import os
import random
import sys
from collections import Counter
from itertools import chain
from pathlib import PurePath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# to seed a device that is not there keeps the call and its stack for later: half a millisecond, many times in each test
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None

# neither minds how long anything takes: machines are slow, or busy
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # which takes seconds to load
        torch.compiler.reset()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Seconds of each folder, all workers together: README.md tells how many there may be."""
    seconds = Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[PurePath(report.nodeid.partition("::")[0]).parent.as_posix()] += report.duration
    for folder, total in seconds.most_common() if len(seconds) > 1 else ():
        terminalreporter.write_line(f"{total:6.1f} s {folder}")


def pytest_collection_finish():
    """What is loaded by now stays: to look at it whenever `fit` collects garbage takes half a second each time."""
    gc.freeze()
