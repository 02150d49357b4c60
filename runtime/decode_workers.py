"""Decode clips in worker processes, any of which may hang, crash or be killed.

A worker is `python -m runtime.decode_workers`. It reads pickled calls from stdin and writes pickled
results to stdout. To save memory it imports neither torch nor the script that started it.
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
from runtime.errors import FAILED, UserError, VideoError


class WorkerPool:
    """Worker processes, each with its own pipes and used by one thread at a time.

    workers: the number of threads of `map`, each with a process. A `call` from another thread may start one
    more. 0 runs every call in this process, without a time limit.
    timeout: seconds allowed per call. If the decoder hangs or crashes, only that clip fails.

    Why not pebble or concurrent.futures: their workers share one pipe. If a worker is killed while it
    holds the pipe's lock or is sending a result (by the kernel's OOM killer, for example), the whole pool
    hangs.
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

        jobs: iterable of (key, path, *arguments), consumed lazily. ahead: the maximum number of clips
        that are being decoded or waiting for the caller, 2 x workers by default. It bounds the memory.
        The pool is closed afterwards. If the generator is closed early, for example by an exception in
        the caller's loop, the workers are killed at once. Raises UserError if a worker cannot start.
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
        """Return function(path, *arguments), or a VideoError if the call hangs, crashes or raises.

        function: must be importable by name, such as `video.decode`.
        """
        if self.workers == 0:
            return attempt(function, path, *arguments)
        process = self.idle.pop() if self.idle else self._start(function)
        # Either the timer or the result acquires this lock first, which decides if the call timed out.
        decided = threading.Lock()

        def expire():
            if decided.acquire(blocking=False):
                process.kill()

        timer = threading.Timer(self.timeout, expire)  # does not count the time to start a worker
        timer.daemon = True  # after a signal, the script does not wait for it
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
            return VideoError("crashed", f"{path} crashed the decoder (exit code {code})")
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
                start_new_session=True,  # Ctrl-C reaches only this process, which kills its workers
            )
            self.all.append(process)
        try:
            exchange(process, function)  # import the function now, outside any clip's time limit
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(
                f"a decoding process could not start (exit code {self._end(process)}); if the machine is"
                " low on memory, lower --workers, or use --workers 0 to decode in the main process",
                code=FAILED,
            ) from None
        return process

    def _end(self, process):
        """Wait for a process that has closed its pipe to end, and return its exit code."""
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
    """Send a call to a worker and return its result. Only this process and its worker use the pipes."""
    pickle.dump(call, process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def discard(process):
    """Wait for a killed process, close its pipes and return its exit code."""
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # closing flushes unsent data to a pipe that has no reader
            pipe.close()
    return code


def attempt(function, path, *arguments):
    """Return function(path, *arguments), called in this process, or a VideoError if it raises."""
    try:
        return function(path, *arguments)
    except VideoError as error:
        return error
    except Exception as error:  # a clip that triggers a bug in this project must not end the run
        return VideoError("crashed", f"{path}: {type(error).__name__}: {error}")


# ---- the worker's side ---------------------------------------------------------------------


def serve():
    """Answer calls until the parent process ends."""
    for number in start.SIGNALS:  # batch systems signal every process; the parent handles it
        signal.signal(number, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print to stdout, which would corrupt the results
    calls = queue.SimpleQueue()
    threading.Thread(target=read_calls, args=(calls,), daemon=True).start()
    calls.get()  # unpickling the first message has imported the function
    result = "ready"
    while True:
        pickle.dump(result, results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()
        result = attempt(*calls.get())


def read_calls(calls):
    """Queue calls from stdin, in a thread, so that even a worker that hangs ends with its parent."""
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
    except BrokenPipeError:  # the parent has ended
        os._exit(0)
