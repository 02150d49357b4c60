"""Decode many clips in worker processes that may hang, die or be stopped at any time."""

import os
import threading
from collections import deque

import video
from runtime.cli import UserError
from video import VideoError


def decode_many(
    jobs, num_frames, workers=4, timeout=60.0, ahead=None, decode=video.decode, crew=None
):
    """Decode clips in worker processes; yield (key, Clip or VideoError) in the order of the jobs.

    jobs: iterable, read lazily, of (key, path) or (key, path, start, end).
    timeout: seconds for one clip, from when a worker takes it up; a decoder that hangs or dies
    costs its own clip only. ahead: clips in flight or waiting for the caller, 2 x workers unless
    given, so memory is about `ahead` clips. workers=0 decodes in this process, without time limit.
    decode: what a worker runs, with the arguments of `decode`; importable by name. crew: a `Crew` to
    use, which is closed in the end.
    Closing the generator, as an exception in the caller's loop does, kills the workers at once.
    Raises UserError if no worker can be started.
    """
    from concurrent.futures import ThreadPoolExecutor

    if workers == 0:
        for key, *job in jobs:
            yield key, attempt(decode, job[0], num_frames, *job[1:])
        return
    crew, waiting = crew or Crew(timeout), deque()
    threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for key, *job in jobs:
            waiting.append((key, threads.submit(crew.ask, decode, job[0], num_frames, *job[1:])))
            if len(waiting) >= (ahead or 2 * workers):
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        crew.close()
        threads.shutdown()


class Crew:
    """Worker processes, one per asking thread, each with a pipe of its own.

    A pool with one shared pipe (pebble, concurrent.futures) comes to a halt when a worker is killed,
    say for memory, while it holds the pipe's lock or has sent half a clip.
    """

    def __init__(self, timeout):
        self.timeout = timeout
        self.all, self.idle, self.closed, self.lock = [], [], False, threading.Lock()

    def ask(self, function, path, *arguments):
        """function(path, *arguments), run by a worker; a VideoError if it hangs, dies or raises."""
        process, pipe = self.idle.pop() if self.idle else self._start()
        try:
            pipe.send((function, path, *arguments))
            if pipe.poll(self.timeout):
                answer = pipe.recv()
                self.idle.append((process, pipe))
                return answer
            error = VideoError("timeout", f"{path} took more than {self.timeout:g} s to decode")
        except (EOFError, OSError):
            process.join(5)
            code = process.exitcode
            error = VideoError("crashed", f"{path} made the decoder die (exit code {code})")
        self._end(process, pipe)
        return error

    def _start(self):
        import multiprocessing

        # spawn: decord crashes in a process forked after CUDA was initialised
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        with self.lock:
            if self.closed:
                raise RuntimeError("decoding was stopped")
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.all.append((process, pipe))
        theirs.close()
        try:
            pipe.recv()  # imports are done: the clip's time limit does not pay for them
        except (EOFError, OSError):
            process.join(5)
            raise UserError(
                f"a decoding process could not start (exit code {process.exitcode}); with too little"
                " memory for it, lower --workers, or decode without processes: --workers 0",
                code=1,
            ) from None
        return process, pipe

    def _end(self, process, pipe):
        with self.lock:
            if (process, pipe) in self.all:
                self.all.remove((process, pipe))
        process.kill()
        process.join()
        pipe.close()

    def close(self):
        with self.lock:
            self.closed = True
            for process, _ in self.all:
                process.kill()
            for process, _ in self.all:
                process.join()


def _serve(pipe):
    import signal

    # both reach the whole process group; the parent acts, and kills
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        pipe.send("ready")
        while True:
            pipe.send(attempt(*pipe.recv()))
    except (EOFError, OSError):  # the parent is gone
        return


def _end_with_the_parent():
    """Also when a decoder hangs: a killed run must not leave a process that works for ever."""
    import multiprocessing

    multiprocessing.parent_process().join()
    os._exit(1)


def attempt(function, path, *arguments):
    """function(path, *arguments), here; a VideoError if it raises."""
    try:
        return function(path, *arguments)
    except VideoError as error:
        return error
    except Exception as error:  # one clip that trips over a bug of ours must not end the run
        return VideoError("crashed", f"{path}: {type(error).__name__}: {error}")
