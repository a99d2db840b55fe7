"""Runs an experiment that is killed once a training has logged an epoch: ``killed.py NAME SCRIPT ARGUMENTS``.

NAME is how the folder of that training begins.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from lab.runs import Run


def main(name, script):
    log = Run.log

    def log_and_die(run, rows):
        log(run, rows)
        if run.folder.name.startswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = log_and_die
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    name, *sys.argv = sys.argv[1:]
    main(name, sys.argv[0])
