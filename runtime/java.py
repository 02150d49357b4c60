"""Run the Java programs in pycocoevalcap: PTBTokenizer and METEOR."""

import os
import shutil
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pycocoevalcap

JAVA_LIMIT = 600  # seconds for one run of Java; SSv2's validation split takes about 15
# METEOR reads and prints numbers in the locale's format, and hangs on a decimal comma.
LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")

_running, _cancelled = set(), threading.Event()  # processes of run_java; see java_thread


class JavaError(Exception):
    """Raised if Java returns no usable result. The message gives the reason in a few words."""


def jar(*path):
    """Return the path of a file in the pycocoevalcap package, e.g. jar("meteor", "meteor-1.5.jar")."""
    return Path(pycocoevalcap.__path__[0], *path)


def run_java(arguments, lines, time_limit):
    """Run `java *arguments` with `lines` on its stdin and return the lines of its stdout.

    time_limit: seconds. Raises JavaError if Java is missing, fails or takes too long.
    """
    java = shutil.which("java")
    if java is None:
        raise JavaError("java not found")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        # a new session, so that a wrapper script named java and its children are killed together
        process = subprocess.Popen([java, *LOCALE, *arguments], start_new_session=True, **pipes)
    except OSError as error:
        raise JavaError(f"java cannot be started: {error}") from None
    text = "".join(f"{line}\n" for line in lines)
    with process:
        _running.add(process)
        try:
            if _cancelled.is_set():
                raise JavaError("cancelled")
            out, errors = process.communicate(text.encode(), time_limit)
        except subprocess.TimeoutExpired:
            raise JavaError(f"java took longer than {time_limit:g} s") from None
        finally:
            _running.discard(process)
            _kill(process)
    if process.returncode:
        reason = errors.decode(errors="replace").strip().split("\n")[-1]
        raise JavaError(f"java exited with code {process.returncode}: {reason[:200]}")
    # not splitlines(), which also splits at U+2028 and the like
    return out.decode(errors="replace").replace("\r\n", "\n").removesuffix("\n").split("\n")


def _kill(process):
    """Kill a run of Java with all its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def java_thread():
    """Context manager for a thread that calls `run_java`.

    An exception in the block, such as Ctrl-C, kills the Java process. Otherwise the executor would wait
    for its thread, possibly until Java's time limit.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            try:
                yield thread
            except BaseException:
                _cancelled.set()  # for a run that is about to start
                for process in list(_running):
                    _kill(process)
                raise
    finally:
        _cancelled.clear()
