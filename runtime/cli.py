"""Shared by all scripts: `run`, which handles errors and signals, and the common flags."""

import argparse
import difflib
import multiprocessing
import os
import re
import select
import signal
import stat
import sys
from decimal import Decimal
from pathlib import Path

from runtime import ranks, start
from runtime.errors import (
    DONE,
    FAILED,
    SIGNALLED,
    USAGE,
    WRONG_KIND,
    Stopped,
    UserError,
    explain,
)
from runtime.stop_signals import StopSignals

# Defaults that several scripts share, for Something-Something-V2
LABELS, VIDEOS = "data/labels", "data/20bn-something-something-v2"
ANNOTATIONS, FEATURES = "data/annotations", "data/features"
ENCODER, LM = "facebook/vjepa2-vitl-fpc64-256", "Qwen/Qwen2-1.5B"
CHECKPOINT = "results/ssv2/best.pt"
TOP_P, TEMPERATURE = 0.95, 0.7  # as in LaViLa's narrator (Zhao et al. 2022, arXiv:2212.04501)
CHECKPOINT_KINDS = "file, run folder, exported folder or Hub id"

# What the help calls the value of a flag, unless the flag or its type says otherwise
METAVARS = {
    "DIR": "annotations charades data examples features labels models output pretrained runs videos",
    "FILE": "captions lists predictions versus",
    "MODEL": "encoder lm",
    "NAME": "device split splits",
    "PATH": "checkpoint init paraphrases probe",
    "SECONDS": "max_seconds stride timeout window",
}
METAVARS = {name: metavar for metavar, names in METAVARS.items() for name in names.split()}


def note(*text):
    """Print to stderr, on rank 0 only. Results go to stdout, everything else goes through here."""
    if ranks.rank() == 0:
        print(*map(printable, text), file=sys.stderr, flush=True)


def printable(text, keep="\n"):
    """Escape the control characters in `text`, except for those in `keep`.

    File names and text from files go through here before they are printed.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def run(main):
    """Run `main()` and exit with its code. A `UserError` is printed as `train.py: message` on stderr.

    If a signal was received, the exit code says so, even if `main` returned or raised another error.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be invalid UTF-8
    if ranks.rank():  # only rank 0 shows results and progress; every rank shows its errors
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until exit)
    signals = StopSignals()
    number = 0
    try:
        with signals:
            code = exit_code(main, signals)
    except Stopped as error:
        number = error.args[0]
    finally:
        kill_children()
    if number := signals.number or number:
        drop_closed_streams()
        fail(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        code = SIGNALLED + number
    sys.exit(code)


def exit_code(main, signals):
    """Run `main()`, print its error if there is one, and return the exit code."""
    try:
        code = main() or DONE
        sys.stdout.flush()
        return code
    except UserError as error:
        fail(error)
        return error.code
    except BrokenPipeError:
        # After `infer.py … | head` the exit code is 0, because `head` has read all it needs. If stderr is
        # closed too (`train.py 2>&1 | head`), the run was cut short, which is a failure.
        code = FAILED if is_closed(2) else DONE
        drop_closed_streams()
        return code
    except Exception as error:
        why = explain(error)
        if why is None and not signals.number:  # a bug in this project, so show the traceback
            raise
        if why is not None:
            fail(why)
        return USAGE if isinstance(error, (*WRONG_KIND, PermissionError)) else FAILED


def fail(why):
    name = f"[rank {ranks.rank()}] {start.program()}" if ranks.rank() else start.program()
    print(printable(f"{name}: {why}"), file=sys.stderr, flush=True)


def is_closed(descriptor, wait=0):
    """Return True if `descriptor` is a pipe whose reading end is closed, or is closed within `wait` s."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(1000 * wait))


def drop_closed_streams(wait=0):
    """Redirect stdout and stderr to the null device if they are pipes that nobody reads any more.

    wait: seconds in which the reader may still end.
    """
    for descriptor in (2, 1):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            if is_closed(descriptor, wait):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
            wait = 0


def kill_children():
    """Kill worker processes that are left after a failure. Otherwise Python would wait for them at exit."""
    if hasattr(signal, "SIGCHLD"):  # torch's SIGCHLD handler raises when a worker is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that expands a leading `~` in all values, which shells do not in --output=~/run.

    No value may be a URL, because all data and models are read from disk, or empty, because an empty path
    would be the working directory; otherwise it raises UserError. A mistake is one line, and for an unknown
    flag it names the most similar one, or the path to give if a file has this name.
    """

    def parse_args(self, args=None, namespace=None):
        namespace, rest = self.parse_known_args(args, namespace)
        flag = next((text.partition("=")[0] for text in rest if text.startswith("-")), None)
        if flag:
            meant = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            if os.path.exists(flag):
                meant = [f"./{flag}"]
            self.error(f"unknown flag {flag}{f'; did you mean {meant[0]}?' if meant else ''}")
        if rest:
            self.error(f"unexpected argument {rest[0]}")
        return namespace

    def error(self, message):
        end = "" if message.endswith("?") else f"; {self.prog} --help lists the flags"
        print(printable(f"{self.prog}: {message}{end}"), file=sys.stderr)
        sys.exit(USAGE)

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if value == "" or (isinstance(value, list) and "" in value):
                flags = [
                    f for f, action in self._option_string_actions.items() if action.dest == name
                ]
                self.error(f"{[*flags, name][0]} is empty; is a shell variable not set?")
            refuse_url(value)
            setattr(namespace, name, expand_home(value))
        return namespace, rest

    def refuse_given(self, args, names, why):
        """End the script with a usage error if a flag of these names does not have its default value.

        A flag that has no effect would otherwise be ignored silently.
        """
        given = [name for name in names if getattr(args, name) != self.get_default(name)]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            self.error(f"{flags} {why}")


def refuse_url(value):
    """Raise UserError if a value of a flag, or one in a list of values, is a URL."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
            raise UserError(
                f"{text} is a URL, and URLs are not read: download it first and give the path of the file"
                " or folder"
            )


def expand_home(value):
    if isinstance(value, list):
        return [*map(expand_home, value)]
    is_path = isinstance(value, str) and (value == "~" or "/" in value)
    return os.path.expanduser(value) if is_path else value


def parser(doc):
    """Create an ArgumentParser whose help is `doc`, the script's docstring, and all flags with defaults."""

    return Parser(
        prog=start.program(), description=doc, formatter_class=Formatter, allow_abbrev=False
    )


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, and short names for the values."""

    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if nothing or "(default" in action.help:
            return action.help
        return f"{action.help} (default: {in_words(action.default)})".replace("%", "%%")

    def _get_default_metavar_for_optional(self, action):
        known = METAVARS.get(action.dest) or getattr(action.type, "metavar", None)
        return known or super()._get_default_metavar_for_optional(action)


def in_words(value):
    """Return the default of a flag as a user would type it."""
    if isinstance(value, list | tuple):
        return " ".join(map(in_words, value))
    return f"{Decimal(str(value)):f}" if isinstance(value, float) else str(value)


def add_common(parser, workers=4, limit=True):
    """Add the flags that several scripts share. limit: whether the script has --limit."""
    group = parser.add_argument_group("common")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="dtype in which the frozen models compute; auto means bfloat16 on CUDA and float32 on CPU",
    )
    add_workers(group, workers)
    if limit:
        group.add_argument("--limit", type=whole(1), help="use only the first N clips")
    group.add_argument("--seed", type=seed, default=0, help="random seed")


def add_cached(add):
    """Add --features and --annotations. If they are not given, `run_folder.fill_paths` sets them."""
    text = "{} (default: that of the run that is scored or searched, else {})"
    add("--features", help=text.format("feature cache written by preprocess_ssv2.py", FEATURES))
    text = text.format("folder written by prepare_annotations.py", ANNOTATIONS)
    add("--annotations", help=text)


def add_models(group):
    """Add the flags that name a checkpoint and the models it was trained with."""
    group.add_argument("--checkpoint", default=CHECKPOINT, help=CHECKPOINT_KINDS)
    group.add_argument(
        "--encoder", help="folder of the checkpoint's video encoder, if it has moved"
    )
    group.add_argument("--lm", help="folder of the checkpoint's language model, if it has moved")


def add_generation(group):
    """Add the flags of caption generation."""
    text = "beams of beam search; 1 is greedy search"
    group.add_argument("--num-beams", type=whole(1), default=1, help=text)
    text = (
        "maximum length of a caption, in tokens (default: 50, or more if the checkpoint was trained"
    )
    text += " on longer captions)"
    group.add_argument("--max-new-tokens", type=whole(1), help=text)


def add_sampling(group, text):
    """Add the flags of sampling. text: the help of --sample."""
    add, share = group.add_argument, number(above=0, most=1)
    add("--sample", type=whole(1), help=text)
    text = "sample from the likeliest tokens that together have this probability"
    add("--top-p", type=share, default=TOP_P, help=text)
    add("--temperature", type=number(above=0), default=TEMPERATURE, help="sampling temperature")


def add_workers(group, most, least=0):
    """Add --workers to a group of flags. The default is `most`, or the number of CPUs if lower."""
    text = f"worker processes (default: %(default)s, the smaller of {most} and the number of CPUs)"
    group.add_argument("--workers", type=whole(least), default=min(most, cpus()), help=text)


def cpus():
    """Return the number of CPUs available to this process, an equal share of them under torchrun."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS, Windows
        count = os.cpu_count() or 1
    return max(1, count // ranks.local_world_size())


def whole(least, most=None):
    """Return an argparse type for integers from `least` to `most`, inclusive."""

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

    parse.metavar = "N"
    return parse


seed = whole(0, 2**32 - 1)


def number(least=None, above=None, below=None, most=None):
    """Return an argparse type for finite floats that are >= `least`, > `above`, < `below` and <= `most`."""

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
        if most is not None and not value <= most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return value

    parse.metavar = "X"
    return parse


def shard(text):
    """Parse part i (from 0) of n, written i/n. This is an argparse type."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n")
    return int(part), int(parts)


shard.metavar = "I/N"


def existing(path, what, hint):
    """Return `path` as a Path. Raises UserError if it does not exist, with `hint` on what to do next."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what} not found: {path}. {hint}")
    return path


def output_folder(path, flag):
    """Return `path` as a Path, without creating it. Raises UserError if it cannot be written to."""
    path = Path(path)
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {parent} is not writable; choose another folder")
    return path
