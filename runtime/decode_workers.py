"""Decode many clips in worker processes that may hang, crash or be killed at any time.

A worker is `python -m runtime.decode_workers`. It reads pickled calls from stdin and writes pickled
results to stdout, and imports neither the script that started it nor torch, so it stays small.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from runtime import start
from runtime.errors import UserError, VideoError


class WorkerPool:
    """Worker processes, each with pipes of its own and used by one thread at a time.

    workers: 0 runs every call in this process, without a time limit. timeout: seconds for one call; a
    decoder that hangs or crashes costs its own clip only.
    A pool with one shared pipe (pebble, concurrent.futures) stops for good when a worker is killed, for
    example by the kernel for its memory, while it holds the pipe's lock or has sent half a clip.
    """

    def __init__(self, workers, timeout):
        self.workers, self.timeout = workers, timeout
        self.all, self.idle, self.closed, self.lock = [], [], False, threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def map(self, function, jobs, ahead=None):
        """Yield (key, function(path, *arguments) or a VideoError) in the order of the jobs.

        jobs: iterable, read lazily, of (key, path, *arguments). ahead: clips in flight or waiting for
        the caller, by default 2 x workers, so memory is about `ahead` clips.
        The pool is closed afterwards. Closing the generator, as an exception in the caller's loop does,
        kills the workers at once. Raises UserError if no worker can be started.
        """
        if self.workers == 0:
            for key, *job in jobs:
                yield key, attempt(function, *job)
            return
        waiting = deque()
        threads = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            for key, *job in jobs:
                waiting.append((key, threads.submit(self.call, function, *job)))
                if len(waiting) >= (ahead or 2 * self.workers):
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self.close()
            threads.shutdown()

    def call(self, function, path, *arguments):
        """function(path, *arguments), or a VideoError if it hangs, crashes or raises.

        function: one that can be imported by name, such as `video.decode`.
        """
        if self.workers == 0:
            return attempt(function, path, *arguments)
        process = self.idle.pop() if self.idle else self._start(function)
        decided = threading.Lock()  # whether it was in time: taken by whoever comes first

        def expire():
            if decided.acquire(blocking=False):
                process.kill()

        timer = threading.Timer(self.timeout, expire)  # from here: waiting for a worker is free
        timer.start()
        try:
            result, alive = exchange(process, (function, path, *arguments)), True
        except (EOFError, OSError, pickle.UnpicklingError):
            result, alive = None, False
        timer.cancel()
        if not decided.acquire(blocking=False):
            self._end(process)
            return VideoError("timeout", f"{path} took more than {self.timeout:g} s to decode")
        if not alive:
            code = self._end(process)
            return VideoError("crashed", f"{path} made the decoder crash (exit code {code})")
        self.idle.append(process)
        return result

    def _start(self, function):
        with self.lock:
            if self.closed:
                raise RuntimeError("decoding was stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "runtime.decode_workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=start.environment(),
                start_new_session=True,  # Ctrl-C is for this process, which kills its workers
            )
            self.all.append(process)
        try:
            exchange(process, function)  # imports the function: no clip's time limit pays for that
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(
                f"a decoding process could not start (exit code {self._end(process)}); if memory is"
                " short, lower --workers, or decode without processes: --workers 0",
                code=1,
            ) from None
        return process

    def _end(self, process):
        """Wait until a process that has closed its pipe is gone; returns its exit code."""
        with self.lock:
            if process in self.all:
                self.all.remove(process)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
        return discard(process)

    def close(self):
        """Kill all workers."""
        with self.lock:
            self.closed = True
            for process in self.all:
                process.kill()
            for process in self.all:
                discard(process)


def exchange(process, call):
    """Send a call to a worker, and wait for its result."""
    pickle.dump(call, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def discard(process):
    """Wait for a killed process and close its pipes; returns its exit code."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # unsent data has no reader any more
            pipe.close()
    return code


def attempt(function, path, *arguments):
    """function(path, *arguments), in this process; a VideoError if it raises."""
    try:
        return function(path, *arguments)
    except VideoError as error:
        return error
    except (
        Exception
    ) as error:  # one clip that trips over a bug of this project must not end the run
        return VideoError("crashed", f"{path}: {type(error).__name__}: {error}")


# ---- the worker's side ---------------------------------------------------------------------


def serve():
    """Answer calls until the parent process is gone."""
    for number in start.SIGNALS:  # a batch system sends them to every process; the parent acts
        signal.signal(number, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the results
    calls = queue.SimpleQueue()
    threading.Thread(target=read_calls, args=(calls,), daemon=True).start()
    calls.get()  # the function of the first call, which is imported now
    result = "ready"
    while True:
        pickle.dump(result, results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()
        result = attempt(*calls.get())


def read_calls(calls):
    """In a thread of its own, so that a worker ends with its parent even if its decoder hangs."""
    try:
        while True:
            calls.put(pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:  # the parent is gone
        os._exit(0)
