"""Helpers of doctor.py. Standard library only, because the packages may be missing."""

from runtime.start import ROOT, environment

import json
import shlex
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

OK, NOTE, MISSING = "ok", "note", "missing"
LIMIT = 300  # seconds per check; the first import from a network disk may take minutes
INSTALL = f"{shlex.quote(sys.executable)} -m pip install"
PROJECT = "." if Path.cwd() == ROOT else str(ROOT)

Finding = namedtuple("Finding", "state what found fix", defaults=[None])


def in_child(function, *args):
    """Call a function in a child process, because a broken package may crash or hang.

    Returns (the function's result, None), or (None, the last line of the child's stderr).
    """
    module = function.__module__ if function.__module__ != "__main__" else "tools.doctor"
    code = f"import json; from {module} import {function.__name__} as f; print(json.dumps(f(*{args!r})))"
    quiet = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}  # no network
    quiet |= {"MPLCONFIGDIR": tempfile.gettempdir()}  # by default matplotlib creates a folder in ~
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment() | quiet,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return None, f"it took longer than {LIMIT} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return None, lines[-1][:200]
    return json.loads(done.stdout.splitlines()[-1]), None  # packages may print on import
