"""The first import of every script: checks what the other imports need, and holds signals back.

Standard library only, in a syntax that old Pythons can read. Importing torch and transformers takes
seconds; a Ctrl-C in that time is answered by `cli.run`, not by a traceback out of an import.
"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
DOCTOR = "python -m tools.doctor"  # which reports what is missing
NEEDED = ("torch", "numpy", "transformers", "tqdm")
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def program():
    """What the user typed to start this process: train.py, or python -m worlds.demo."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def environment():
    """The environment of a child process: it finds the code from whatever folder the user is in."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def check_python():
    if sys.version_info < (3, 11):  # noqa: UP036 (elsewhere it would be a strange error)
        found = f"{sys.version.split()[0]}, {sys.executable}"
        sys.exit(f"{program()}: Python 3.11 or newer is needed; this is {found}")


def check_packages():
    """Exit with code 2 and one sentence if a package is missing that every script imports."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        fix = "python -m pip install -c constraints.txt -e ."
        if (ROOT / ".venv").is_dir():
            fix = ". .venv/bin/activate"
        text = f"{program()}: not installed in {sys.executable}: {', '.join(missing)}. Run: {fix}"
        print(text, file=sys.stderr)
        sys.exit(2)


def is_script():
    """True if the process was started as one of this repository's files."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
    return path.is_relative_to(ROOT) and len(path.relative_to(ROOT).parts) <= 2


def hold_signals():
    """Block the signals that stop a run, until `release_signals`."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals():
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


check_python()
if is_script():
    if program() != DOCTOR:
        check_packages()
    hold_signals()
