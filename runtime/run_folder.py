"""The run folder: what a training run leaves behind, and how it is kept consistent.

args.json, metrics.jsonl, validation_epoch_N.json, last.pt, previous.pt, best.pt: each is complete at any
moment, whenever the process is killed.
"""

from runtime.start import ROOT, SIGNALS

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version

import torch
from tqdm import tqdm

from runtime import devices, distributed, ranks
from runtime.cli import note, output_folder
from runtime.errors import Stopped, UserError
from runtime.files import lock, remove_unfinished, torch_bytes, write_atomic, write_json

LAST, PREVIOUS, CORRUPT, BEST = "last.pt", "previous.pt", "damaged.pt", "best.pt"

# What --overwrite removes: a run's own files, never what else is in the folder. The checkpoints come
# first: if the process is killed meanwhile, the old run must not be resumed as the new one.
RUN_FILES = [LAST, PREVIOUS, CORRUPT, BEST, "args.json", "metrics.jsonl", "curves.png"]
RUN_FILES += ["validation_epoch_*.json", "predictions_*.json", "evaluation_*.json", "gallery*.html"]


def check(output, resume, overwrite, dry_run=False):
    """Return the run folder's path. Raises UserError if it holds a run that neither flag is about."""
    folder = output_folder(output, "--output")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    holds_a_run = any(path.name != ".lock" for path in folder.glob("*"))
    if holds_a_run and not (resume or overwrite or dry_run):
        raise UserError(
            f"--output {folder} already holds a run: continue it with --resume, replace it with"
            " --overwrite, or name another folder"
        )
    return folder


@contextmanager
def locked(folder, resume, overwrite, dry_run=False):
    """Keep every other train.py out of the folder. Raises UserError if one is running in it."""
    if dry_run or ranks.rank():
        yield
        return
    with lock(folder, f"another train.py is running in {folder}: wait for it, or stop it first"):
        check(folder, resume, overwrite)  # again: a run may have begun and ended meanwhile
        remove_unfinished(folder)
        yield


def write_args(folder, args, overwrite, device, **facts):
    """Clear the folder under --overwrite, and record flags, versions and hardware in args.json."""
    if ranks.rank():
        return
    if overwrite:
        for path in (p for pattern in RUN_FILES for p in folder.glob(pattern)):
            path.unlink()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    facts = {
        "args": args,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "processes": ranks.world_size(),
        "device": devices.describe(device),
        **facts,
    }
    write_json(folder / "args.json", facts)


class Run:
    """An open run folder: its log, checkpoints written in the background, and signals that stop it.

    step: of the checkpoint that the run continues from, or 0; total: steps of the whole run;
    dashboard: a `Dashboard`. Use as a context manager around the training loop.
    """

    def __init__(self, folder, step, total, dashboard):
        self.folder = folder
        self.log = Log(folder, step, total, dashboard)
        self.writer, self.stop = Writer(), Stop()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.writer.close(error)
        finally:
            self.log.close()
        if error is None:
            self.stop.restore()  # everything is saved: a signal now ends the script as usual

    def save(self, state):
        """Write last.pt, after the log lines that it counts on."""
        self.log.sync()
        self.writer.write(self.folder / LAST, state)

    def save_best(self, state):
        self.writer.write(self.folder / BEST, state)

    def stopping(self):
        """The number of the signal that asked any of the processes to stop, or 0."""
        return distributed.maximum(self.stop.signal)

    @contextmanager
    def evaluating(self):
        """Around an evaluation: everything is on the disk, so a signal ends it at once."""
        self.writer.wait()
        self.stop.saved = True
        if self.stop.signal:
            raise Stopped(self.stop.signal)
        yield
        self.stop.saved = False


class Log:
    """Progress on stderr, and the same as lines of metrics.jsonl and on a dashboard.

    Opening it drops the lines of steps that the checkpoint, at `step`, does not contain. Of several
    processes only rank 0 logs.
    """

    def __init__(self, folder, step, total, dashboard):
        self.folder, self.start_time, self.quiet = folder, time.perf_counter(), ranks.rank() > 0
        self.dashboard = dashboard
        if self.quiet:
            return
        kept = truncate_log(folder / "metrics.jsonl", step)
        self.skipped = sum("skipped" in json.loads(line) for line in kept)
        self.metrics = open(folder / "metrics.jsonl", "a")  # noqa: SIM115 (closed in `close`)
        self.bar = tqdm(total=total, initial=step, unit="step", smoothing=0.1)

    def close(self):
        if self.quiet:
            return
        for file in (self.metrics, self.bar, self.dashboard):
            file.close()
        if self.skipped:
            note(f"steps skipped: {self.skipped}, see {self.folder / 'metrics.jsonl'}")

    def sync(self):
        if not self.quiet:
            os.fsync(self.metrics.fileno())

    def step(self, step, epoch, lr, loss, norm, tokens, ids, data_seconds):
        """loss: summed over `tokens` caption tokens of the clips `ids`; norm: before clipping;
        epoch: from 0; data_seconds: the part of the step's `seconds` spent waiting for data."""
        if self.quiet:
            return
        seconds, self.start_time = time.perf_counter() - self.start_time, time.perf_counter()
        mean = loss / tokens
        entry = {
            "step": step,
            "epoch": epoch + 1,
            "loss": mean if math.isfinite(mean) else None,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
            "clips_per_second": round(len(ids) / seconds, 2),
        }
        if entry["loss"] is None or entry["grad_norm"] is None:
            entry["skipped"] = ids
            self.skipped += 1
            some = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            self.print(f"step {step} skipped: no finite loss or gradient (clips {some})")
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()
        shown = ("loss", "lr", "grad_norm", "clips_per_second", "data_seconds")
        self.dashboard.log(step, {f"train/{k}": entry[k] for k in shown if entry[k] is not None})
        text = f"loss {mean:.3f}, lr {lr:.1e}, {len(ids) / seconds:.0f} clip/s"
        text += f", data {100 * data_seconds / seconds:.0f} %"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def evaluation(self, step, epoch, loss, result, samples):
        """Write validation_epoch_N.json. epoch: from 1; samples: captions to look at."""
        if self.quiet:
            return
        head = {"epoch": epoch, "step": step, "loss": loss}
        path = self.folder / f"validation_epoch_{epoch}.json"
        write_json(path, head | result | {"samples": samples})
        values = {"loss": loss} if loss is not None else {}
        self.dashboard.log(
            step, {f"validation/{k}": v for k, v in (values | result["metrics"]).items()}
        )
        values |= {
            k: v for k, v in result["metrics"].items() if k in ("CIDEr", "template_accuracy")
        }
        text = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        self.print(f"epoch {epoch}: validation {text}")
        self.start_time = time.perf_counter()

    def print(self, text):
        self.bar.write(text, file=sys.stderr)


def truncate_log(path, step):
    """Keep the complete lines of steps up to `step`; returns them."""

    def belongs(line):
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # what a crash of the machine left of a line
            return False

    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    kept = list(filter(belongs, lines))
    write_atomic(path, "".join(kept))
    return kept


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP let the step finish (`signal` is set); a second one stops at once.

    But not under torchrun: it sends its processes the signal again that they may have had already, and
    kills them after 30 s. `saved`: nothing would be lost by stopping at the first.
    """

    def __init__(self):
        self.signal, self.saved = 0, False
        self.before = {
            number: signal.signal(number, self.request)
            for number in SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN  # such as SIGHUP under nohup
        }

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number, frame):
        self.signal = int(number)
        for other in self.before:
            signal.signal(other, signal.SIG_IGN if ranks.launched() else signal.SIG_DFL)
        if self.saved:
            raise Stopped(self.signal)
        if ranks.rank() == 0:  # not by `print`, which may be in the middle of a line
            os.write(2, b"\nfinishing this step, then saving; a second signal stops at once\n")


class Writer:
    """Writes checkpoints in a thread: training waits until they are serialised, not for the disk.

    One at a time and in order; an error of the disk is raised by `check`, `write`, `wait` or `close`. Of
    several processes only rank 0 writes.
    """

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def close(self, error=None):
        """Finish the last write. error: the exception that ends the run, which its own must not hide."""
        self.thread.shutdown()
        if not error:
            self.wait()
        elif self.pending and self.pending.exception() not in (None, error):
            note(f"the last checkpoint was not written: {self.pending.exception()}")

    def check(self):
        """Raise the error of a write that has ended: there is no point in training on to the next."""
        if self.pending and self.pending.done():
            self.pending.result()

    def wait(self):
        if self.pending:
            self.pending.result()

    def write(self, path, state):
        """`state` is serialised now, so later changes to its tensors are not in the file."""
        if ranks.rank():
            return
        self.wait()
        self.pending = self.thread.submit(replace_checkpoint, path, torch_bytes(state))


def replace_checkpoint(path, data):
    """Write a checkpoint; the old last.pt becomes previous.pt once the new one is on the disk."""
    write_atomic(path, data, keep=path.with_name(PREVIOUS) if path.name == LAST else None)
