"""Exit codes, and the errors that a user reads as one sentence. Standard library only."""

import errno
import os
import signal

DONE, FAILED, USAGE, PARTIAL = 0, 1, 2, 3  # PARTIAL: finished, but some clips failed
SIGNALLED = 128  # plus the signal's number, as shells do: 130 for Ctrl-C, 143 for SIGTERM
INTERRUPTED, TERMINATED = SIGNALLED + signal.SIGINT, SIGNALLED + signal.SIGTERM


class UserError(Exception):
    """A mistake that the user can fix: printed as one sentence, without a traceback."""

    def __init__(self, message, code=USAGE):
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP, raised where it arrives so that `finally` blocks run."""


class VideoError(Exception):
    """One clip cannot be used; the message is a sentence.

    `reason`: unreadable, empty (no byte or no frame), no_video, truncated (the window asked for is in
    the missing part), timeout, crashed, or non_finite (the encoder returned NaN or infinity).
    """

    def __init__(self, reason, message):
        super().__init__(reason, message)  # both are args, so that the error survives pickling
        self.reason = reason

    def __str__(self):
        return self.args[1]


def explain(error):
    """User-facing message for out-of-disk, out-of-memory and out-of-files errors, else None."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.filename or 'while writing'}); existing files are intact: free"
            " some space and run the same command again"
        )
    if out_of_files(error):
        return "too many open files; raise the limit with `ulimit -n 4096` in this shell, or lower --workers"
    if out_of_memory(error):
        return (
            "out of memory; halve --batch-size (in train.py also double --grad-accum: the clips per step"
            " stay the same, and --resume accepts it), or lower --workers"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a process that reads features failed: {text.strip().splitlines()[-1]}. If memory or"
            " /dev/shm is too small, use --workers 0 or a larger --shm-size of the container."
        )
    return None


def out_of_memory(error):
    """True for Python's MemoryError and for torch's, of a GPU and of a CPU, also from a worker."""
    words = (
        "can't allocate memory",
        "not enough memory",
        "unable to mmap",
        "Cannot allocate memory",
    )
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
        or (isinstance(error, OSError | RuntimeError) and any(w in str(error) for w in words))
    )


def out_of_files(error):
    """True if this process or one of its workers has reached the limit of open files."""
    # a worker's error arrives as text; the second one is torch's when it cannot receive a descriptor
    words = (os.strerror(errno.EMFILE), "received 0 items of ancdata")
    return getattr(error, "errno", None) == errno.EMFILE or (
        isinstance(error, OSError | RuntimeError) and any(w in str(error) for w in words)
    )
