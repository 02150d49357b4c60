"""The first import of every script: checks Python and the packages, and blocks signals.

This file and ranks.py use only the standard library and a syntax that old Python versions can parse.
Importing torch and transformers takes seconds. A Ctrl-C during that time is delivered once `cli.run` can
handle it, so it does not print a traceback from the middle of an import.
"""

import os
import re
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from runtime import ranks

ROOT = Path(__file__).resolve().parent.parent  # of the repository
DOCTOR = "python -m tools.doctor"  # needs no packages, and reports which are missing
NEEDED = ("torch", "numpy", "transformers", "tqdm", "pycocoevalcap")
# The signals that stop a run. A signal that is ignored on entry stays ignored: `nohup` starts a process
# with SIGHUP ignored, and a shell without job control starts `train.py &` with SIGINT ignored.
SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
SIGNALS = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def program():
    """Return the command that started this process, such as `train.py` or `python -m worlds.demo`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def environment():
    """Return environment variables for a child process, so that it can import this repository."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def check_python():
    if sys.version_info < (3, 11):  # noqa: UP036 (an old Python fails later with an obscure error)
        found = f"{sys.version.split()[0]}, {sys.executable}"
        sys.exit(f"{program()}: Python 3.11 or newer is needed; this is {found}")


def check_packages():
    """Exit with code 2 and a one-line message if a package that every script imports is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        text = f"{program()}: not installed in {sys.executable}: {', '.join(missing)}."
        print(text, f"Run: {install_command(ROOT / '.venv')}", file=sys.stderr)
        sys.exit(2)


def install_command(venv):
    """Return the shell command that makes the packages available. venv: the environment of `make`."""
    if venv.is_dir() and Path(sys.prefix).resolve() != venv.resolve():
        return ". .venv/bin/activate"
    command = "python -m pip install -c constraints.txt -e ."
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        # in the system's own Python, many distributions forbid pip to install
        command = f"python3 -m venv .venv && . .venv/bin/activate && {command}"
    return command


def is_script():
    """Return True if the process runs a script or module of this repository, which calls `cli.run`.

    A user's own script in the same folder may import this file too, but would not release the signals.
    """
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
    if not path.is_relative_to(ROOT) or len(path.relative_to(ROOT).parts) > 2 or not path.is_file():
        return False  # the last condition: `python < script.py` runs the file "<stdin>"
    return "cli.run(main" in path.read_text(encoding="utf-8", errors="replace")


def open_standard_streams():
    """Open stdin, stdout and stderr on the null device if they are closed, as with `>&-` in a shell.

    Otherwise the next file that is opened would get the number of a standard stream, and whatever a
    library prints would be written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, that of the stream
            os.set_inheritable(null, True)  # otherwise it would be closed in child processes
            setattr(sys, name, open(null, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


class Lines:
    """A stream for a file or pipe, in which each update of a progress bar is a line.

    A finished bar is drawn once more when it is closed, which does not repeat the line.
    """

    def __init__(self, stream):
        self.stream, self.at_start, self.bar = stream, True, None

    def write(self, text):
        if "\r" in text or "\033[A" in text:
            bars = [part.strip() for part in re.split("\r|\033\\[A", text)]
            text = "".join(bar + "\n" for bar in bars if bar and bar != self.bar)
            text = "\n" + text if text and not self.at_start else text
            self.bar = bars[-1] or self.bar
        elif self.at_start and not text.strip("\n"):  # where a bar ends
            text = ""
        if text:
            self.stream.write(text)
            self.at_start = text.endswith("\n")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def set_progress_bars():
    """Show the progress in the first process of torchrun only, and as a line every 10 s in a file.

    tqdm reads these variables when it is imported.
    """
    if ranks.rank():
        os.environ["TQDM_DISABLE"] = "1"
    elif not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
        sys.stderr = Lines(sys.stderr)


def hold_signals():
    """Block the signals that stop a run, until `release_signals`."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release_signals():
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


check_python()
if is_script():
    open_standard_streams()
    if program() != DOCTOR:
        check_packages()
    set_progress_bars()
    hold_signals()
