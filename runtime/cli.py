"""What every script shares: exit codes, one-sentence errors, the common flags. Standard library only."""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path

from runtime import distributed

if sys.version_info < (3, 11):  # noqa: UP036 (elsewhere it would be a strange error)
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}, {sys.executable}")

ROOT = Path(__file__).resolve().parent.parent  # of the repository

DONE, FAILED, USAGE, PARTIAL = 0, 1, 2, 3  # PARTIAL: finished, but some clips failed
CHECKPOINT = "file, run folder, exported folder or Hub id"
SIGNALLED = 128  # plus the signal's number: the shell's codes, 130 for Ctrl-C and 143 for SIGTERM
INTERRUPTED, TERMINATED = SIGNALLED + signal.SIGINT, SIGNALLED + signal.SIGTERM


class UserError(Exception):
    """A mistake that the user can mend: printed as one sentence, without a traceback."""

    def __init__(self, message, code=USAGE):
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, raised where it arrives so that `finally` blocks run."""


def note(*text):
    """Print to stderr: everything that is not a result. Of several processes only rank 0 does."""
    if distributed.rank() == 0:
        print(*map(printable, text), file=sys.stderr, flush=True)


def printable(text, keep="\n"):
    """Text from a file or of its name, with what would steer the terminal spelt out."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def run(main):
    """Run `main()` and exit with its code; a `UserError` becomes `script.py: sentence` on stderr."""

    def on_signal(handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def stop(number, frame):
        on_signal(signal.SIG_DFL)  # a second one leaves at once
        raise Stopped(number)

    on_signal(stop)
    script = program()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no valid text
    if distributed.rank():  # results and progress are rank 0's to show; errors are everybody's
        script = f"[rank {distributed.rank()}] {script}"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
        os.environ["TQDM_DISABLE"] = "1"

    def fail(why):
        print(printable(f"{script}: {why}"), file=sys.stderr, flush=True)

    try:
        code = main() or DONE
        sys.stdout.flush()
    except UserError as error:
        fail(error)
        code = error.code
    except Stopped as error:
        name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[error.args[0]]
        fail(f"stopped by {name}")
        code = SIGNALLED + error.args[0]
    except BrokenPipeError:
        # `infer.py … | head`: nobody wants more, which is no failure; but a run whose stderr is gone
        # (`train.py 2>&1 | head`) was ended in the middle
        code = FAILED if is_closed(sys.stderr) else DONE
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except Exception as error:
        why = explain(error)
        if why is None:  # a bug of ours: its traceback is what helps
            raise
        fail(why)
        code = FAILED
    finally:
        on_signal(signal.SIG_DFL)  # all is done: Python's own exit is no place to raise
        kill_children()
    sys.exit(code)


def is_closed(stream):
    """True for a pipe that nobody reads any more."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def explain(error):
    """The sentence for what a machine runs out of, or None."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.filename or 'while writing'}); earlier files are whole: make"
            " room and start again where it stopped"
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


def kill_children():
    """End worker processes that a failure left behind: Python's own exit would wait for them."""
    if "multiprocessing" in sys.modules:
        if hasattr(signal, "SIGCHLD"):  # torch would raise at the sight of a killed worker
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()


def parser(doc):
    """An ArgumentParser whose help is the script's docstring, with every default shown."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # "(default: None)" tells nobody anything
            if action.default is None or action.default is False:
                return action.help
            return super()._get_help_string(action)

    return argparse.ArgumentParser(
        prog=program(), description=doc, formatter_class=Formatter, allow_abbrev=False
    )


def environment():
    """The environment of a child process that finds the code from whatever folder the user is in."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def program():
    """What the user typed to start this process: train.py, or python -m worlds.demo."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def add_common(parser, workers=4):
    """Add the flags that mean the same in every script."""
    group = parser.add_argument_group("common")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype of the frozen models; auto is bfloat16 on CUDA and float32 on CPU",
    )
    add_workers(group, workers)
    group.add_argument("--limit", type=whole(1), help="only the first N clips")
    group.add_argument("--seed", type=whole(0), default=0, help="seed of every random choice")


def add_workers(group, most, least=0):
    """Add --workers to a group of flags: by default `most`, but no more than there are CPUs."""
    text = f"worker processes: {most}, or one per available CPU if there are fewer"
    group.add_argument("--workers", type=whole(least), default=min(most, cpus()), help=text)


def cpus():
    """CPUs available to this process: under torchrun, its share of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        count = os.cpu_count() or 1
    return max(1, count // distributed.local_count())


def whole(least, most=None):
    """argparse type: an integer of at least `least`, and at most `most`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is above {most}")
        return value

    return parse


def number(least=None, above=None, below=None):
    """argparse type: a finite float with `value >= least`, `value > above`, `value < below`."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"{text} must be above {above}")
        if (below is not None and not value < below) or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text} must be below {below or 'infinity'}")
        return value

    return parse


def shard(text):
    """argparse type: part i (from 0) of n, written i/n."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n")
    return int(part), int(parts)


def existing(path, what, hint):
    """Return `path` as a Path. Raises UserError with `hint` (what to run next) if it is not there."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} not found: {path}. {hint}")
    return path


def output_folder(path, flag):
    """Return `path` as a Path to write into, not yet made. Raises UserError if it cannot be."""
    path = Path(path)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"{flag} {path}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {there} cannot be written to; name another folder")
    return path
