"""Run training runs as processes, several at a time, each with one thread."""

from runtime.start import environment

import subprocess
import sys
import time
from contextlib import contextmanager
from unittest import mock

from tqdm import tqdm

from runtime import run_log


def run_commands(commands, logs, finished, jobs):
    """Run modules of this project, `jobs` at a time. Returns the names of those that failed.

    commands: {name: arguments of python}. logs: {name: path of the log}. finished: the number of runs that
    were finished before, for the progress bar.
    """
    waiting, running, failed = list(commands), {}, []
    with tqdm(total=finished + len(commands), initial=finished, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    running[name] = start(commands[name], logs[name])
                time.sleep(0.2)
                for name in [name for name, p in running.items() if p.poll() is not None]:
                    if code := running.pop(name).returncode:
                        bar.write(f"{name}: exit code {code}, see {logs[name]}", sys.stderr)
                        failed.append(name)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    return failed


def start(command, log):
    """Start a run with one thread. Its output goes to the file `log`."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=file, env=environment() | one
        )


@contextmanager
def step_times():
    """Yield a list that collects the processor time of each training step.

    Unlike wall-clock time it does not depend on what else the machine is doing.
    """
    seconds, log = [], run_log.Log.step

    def step(*args):
        nonlocal began
        seconds.append(time.process_time() - began)
        log(*args)
        began = time.process_time()

    began = time.process_time()
    with mock.patch.object(run_log.Log, "step", step):
        yield seconds
