"""Exit codes, and the exceptions that are shown to the user as one line. Standard library only."""

import errno
import os
import sys

LONGEST = 2000  # characters of a message, which may quote what a file contains
DONE, FAILED, USAGE, PARTIAL = 0, 1, 2, 3  # PARTIAL: finished, but some clips failed
SIGNALLED = 128  # plus the signal's number, as shells do: 130 for Ctrl-C, 143 for SIGTERM
# a folder instead of a file, or the reverse; mkdir raises the last one
WRONG_KIND = (IsADirectoryError, NotADirectoryError, FileExistsError)


class UserError(Exception):
    """A mistake that the user can fix. Its message is printed without a traceback."""

    def __init__(self, message, code=USAGE):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        super().__init__(message)
        self.code = code


def refuse(problems, what):
    """Raise UserError if there are problems, with the first three, and their number if there are more."""
    if problems:
        first = "; ".join(str(p)[:160] for p in problems[:3])
        more = f"; … ({len(problems):,} in all)" if len(problems) > 3 else ""
        raise UserError(f"{what}: {first}{more}. No file was written.")


def refuse_file(path, what):
    """Raise UserError if `path` is a file. what: the flag or name of the folder that is expected."""
    if os.path.isfile(path):
        raise UserError(f"{what} {path} is a file, but must be a folder")


class Stopped(BaseException):
    """Raised by the handlers of SIGINT (Ctrl-C), SIGTERM and SIGHUP, so that `finally` blocks run."""


class VideoError(Exception):
    """Raised if a clip cannot be used. The message is shown to the user.

    `reason` is one of: unreadable, empty (no bytes or no frames), no_video, truncated (the requested
    window is in the missing part), corrupt (damage within the file), timeout, crashed, or non_finite (the
    encoder returned NaN or infinity).
    """

    def __init__(self, reason, message):
        super().__init__(reason, message)  # pickling an exception keeps only its args
        self.reason = reason

    def __str__(self):
        return self.args[1]


def explain(error):
    """Return the user-facing message for errors that are no bugs of this project, else None.

    They are: a full disk, no memory, too many open files, no permission, and a folder instead of a file or
    the reverse.
    """
    text = str(error)
    if isinstance(error, IsADirectoryError):
        return f"{error.filename} is a folder, but must be a file; move it away"
    if isinstance(error, WRONG_KIND):
        return f"{error.filename} needs a folder, but there is a file in its place; move it away"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: permission denied; change the permissions, or give another path"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.filename or 'while writing'}); existing files are intact. Free"
            " some space and run the same command again, with --resume or --skip-done if it has such a flag"
        )
    if isinstance(error, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
        return (
            f"the file name {error.object!r:.100} cannot be written in this locale's encoding"
            f" ({sys.getfilesystemencoding()}); run `export PYTHONUTF8=1` and the same command again"
        )
    if out_of_files(error):
        return "too many open files; raise the limit with `ulimit -n 4096` in this shell or lower --workers"
    if out_of_memory(error):
        return (
            "out of memory; halve --batch-size (in train.py also double --grad-accum, which keeps the"
            " number of clips per step and is accepted by --resume; in retrieve.py halve --micro-batch"
            " instead), or lower --workers"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return (
            f"a feature-reading worker process failed: {text.strip().splitlines()[-1]}. If memory or"
            " /dev/shm is too small, use --workers 0 or start the container with a larger --shm-size."
        )
    return None


def out_of_memory(error):
    """Return True for out-of-memory errors of Python and torch (GPU or CPU), also from a worker."""
    words = (
        "can't allocate memory",
        "not enough memory",
        "unable to mmap",
        "Cannot allocate memory",
        "CUDA error: out of memory",  # when torch starts, or pins memory, on a full card
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
        or (isinstance(error, OSError | RuntimeError) and any(w in str(error) for w in words))
    )


def out_of_files(error):
    """Return True if this process or one of its workers has reached the limit on open files."""
    # A worker's error arrives as text. torch raises the second message when it cannot receive a descriptor.
    words = (os.strerror(errno.EMFILE), "received 0 items of ancdata")
    return getattr(error, "errno", None) == errno.EMFILE or (
        isinstance(error, OSError | RuntimeError) and any(w in str(error) for w in words)
    )
