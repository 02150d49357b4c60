"""Ctrl-C, SIGTERM and SIGHUP raise `Stopped` in the main thread, and again if the exception is lost."""

import signal
import sys
import threading
import weakref

from runtime import ranks, start
from runtime.errors import Stopped

INTERVAL = 0.2  # seconds after which a lost `Stopped` is raised again
# Reminds the main thread of the signal. The system ignores it by default, and it interrupts blocking calls.
REMINDER = getattr(signal, "SIGURG", None)  # not on Windows


class StopSignals:
    """Context manager whose handlers raise `Stopped` on the first of `start.SIGNALS`.

    Python raises it wherever the main thread is. In a finalizer, in a callback of the garbage collector
    or of a C library, and under a bare `except:`, the exception is discarded, and the script would go
    on. A thread therefore reminds the main thread until the block ends, which raises `Stopped` again if
    the last one no longer exists. While that one exists, cleanup is in progress and is not disturbed.
    A second signal ends the process at once. Under torchrun it is ignored, because torchrun forwards
    signals that its processes may have received already.

    number: the signal that was received, or 0.
    """

    def __init__(self):
        self.number, self.last, self.ended = 0, None, threading.Event()
        # held until a signal arrives; not an Event, whose `set` is not safe in a signal handler
        self.received = threading.Lock()
        self.received.acquire()

    def __enter__(self):
        self.hook, sys.unraisablehook = sys.unraisablehook, report_unraisable
        handle(self.stop)
        if REMINDER:
            signal.signal(REMINDER, self.stop_again)
            threading.Thread(target=self.remind, daemon=True).start()
        start.release_signals()
        return self

    def __exit__(self, *_):
        self.ended.set()
        handle(signal.SIG_DFL)  # do not raise `Stopped` while the interpreter shuts down
        sys.unraisablehook = self.hook

    def stop(self, number, frame):
        if self.number or self.ended.is_set():
            return
        self.number = int(number)
        handle(signal.SIG_IGN if ranks.launched() else signal.SIG_DFL)
        self.received.release()
        self.throw()

    def throw(self):
        error = Stopped(self.number)
        self.last = weakref.ref(error)
        try:
            raise error
        finally:
            del error  # otherwise this frame, which is in its traceback, would keep it alive

    def remind(self):
        self.received.acquire()
        while not self.ended.wait(INTERVAL):
            signal.pthread_kill(threading.main_thread().ident, REMINDER)

    def stop_again(self, number, frame):
        if self.last and not self.last() and not self.ended.is_set():
            self.throw()


def handle(handler):
    for number in start.SIGNALS:
        signal.signal(number, handler)


def report_unraisable(unraisable):
    """Print an exception that Python has to discard, unless it is a `Stopped`, which is raised again."""
    if not issubclass(unraisable.exc_type, Stopped):
        sys.__unraisablehook__(unraisable)
