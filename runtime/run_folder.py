"""The run folder: the files that a training run writes, and the lock, log and signals around them.

The files are args.json, metrics.jsonl, validation_epoch_N.json, last.pt, previous.pt and best.pt. If the
process is killed at any time, they stay valid.
"""

from runtime.start import ROOT, SIGNALS

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version

import torch
from tqdm import tqdm

from runtime import devices, distributed, ranks
from runtime.cli import drop_closed_streams, note, output_folder
from runtime.errors import Stopped, UserError
from runtime.files import lock, parse_json, remove_unfinished, torch_bytes, write_atomic, write_json
from runtime.names import visible

LAST, PREVIOUS, CORRUPT, BEST = "last.pt", "previous.pt", "damaged.pt", "best.pt"

# The files that --overwrite replaces. Other files in the folder are kept. Checkpoints come first: after a
# kill in between, --resume must not continue the old run with the new flags.
RUN_FILES = [LAST, PREVIOUS, CORRUPT, BEST, "args.json", "metrics.jsonl", "curves.png"]
RUN_FILES += ["validation_epoch_*.json", "predictions_*.json", "evaluation_*.json", "gallery*.html"]
DASHBOARD_FILES = ["report_id.json", "tensorboard/events.*"]
REPLACED = ".replaced"  # the old run, until the run that replaces it has saved a checkpoint


def check(output, resume, overwrite, dry_run=False):
    """Return the run folder's path. Raises UserError if the folder is in use and no flag allows that."""
    folder = output_folder(output, "--output")
    if resume and overwrite:
        raise UserError("--resume and --overwrite are mutually exclusive")
    has_run = bool(visible(folder))
    if has_run and not (resume or overwrite or dry_run):
        raise UserError(
            f"--output {folder} already contains a run: continue it with --resume, replace it with"
            " --overwrite, or choose another folder"
        )
    return folder


@contextmanager
def locked(folder, resume, overwrite, dry_run=False):
    """Lock the run folder for the block. Raises UserError if another train.py is running in it."""
    if dry_run or ranks.rank():
        yield
        return
    with lock(folder, f"another train.py is running in {folder}: wait for it, or stop it first"):
        # check again, because a run may have started and ended in the meantime
        check(folder, resume, overwrite)
        remove_unfinished(folder)
        yield


@contextmanager
def recorded(folder, args, overwrite, device, **facts):
    """Record flags, versions and hardware in args.json, and train in the block.

    If the block fails before a new run has saved a checkpoint of a later step than 0, there is nothing to
    resume. The files of the run are then deleted, so that the same command can be run again. With
    overwrite, the old run is kept until that checkpoint and restored after such a failure.
    """
    if ranks.rank():
        yield
        return
    saved = any((folder / name).exists() for name in (LAST, PREVIOUS, BEST))
    is_new = overwrite or not saved or (folder / REPLACED).exists()
    if overwrite:
        set_aside(folder)
    try:
        write_args(folder, args, device, **facts)
        yield
    except BaseException:
        # the first checkpoint, of step 0, is renamed as soon as the second one is on disk
        if is_new and not (folder / PREVIOUS).exists():
            undo(folder)
            note(f"no step was saved, so {folder} is as it was before")
        raise
    finally:
        delete_replaced(folder)


def write_args(folder, args, device, **facts):
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, encoding="utf-8").stdout.strip() or None
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


def find(folder, patterns):
    return [path for pattern in patterns for path in folder.glob(pattern)]


def set_aside(folder):
    """Move the files of a run to a hidden folder. If an older run is still there, delete them instead."""
    replaced, is_first = folder / REPLACED, not (folder / REPLACED).exists()
    replaced.mkdir(exist_ok=True)
    for path in find(folder, RUN_FILES):
        if is_first:
            path.replace(replaced / path.name)
        else:  # they are from a run that was killed before it saved a step
            path.unlink()


def undo(folder):
    """Delete the files of a run, and move back those of the run that it should have replaced."""
    for path in find(folder, RUN_FILES + DASHBOARD_FILES):
        path.unlink()
    with suppress(OSError):  # there is none, or it has other files
        (folder / "tensorboard").rmdir()
    # checkpoints last, see RUN_FILES
    for path in reversed(find(folder / REPLACED, RUN_FILES)):
        path.replace(folder / path.name)


def delete_replaced(folder):
    if (folder / REPLACED).exists():
        shutil.rmtree(folder / REPLACED)


class Run:
    """A run in progress: its log, the background writer of its checkpoints, and its signal handlers.

    step: the step that the run continues from, or 0. total: the number of steps of the complete run.
    dashboard: a `Dashboard`. Use it as a context manager around the training loop.
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
            self.stop.restore()  # everything is saved, so a signal may now end the script as usual

    def save(self, state):
        """Write last.pt."""
        self.log.sync()  # the log must reach the disk before the checkpoint that refers to it
        self.writer.write(self.folder / LAST, state)
        if (self.folder / PREVIOUS).exists() and not ranks.rank():  # a later step than 0 is on disk
            delete_replaced(self.folder)

    def save_best(self, state):
        self.writer.write(self.folder / BEST, state)

    def stop_signal(self):
        """Return the number of a stop signal that any process has received, or 0.

        All processes must call this at the same point, because they exchange their signals.
        """
        return distributed.maximum(self.stop.signal)

    @contextmanager
    def evaluating(self):
        """Context manager for an evaluation. Everything is saved, so a signal stops it at once."""
        self.writer.wait()
        self.stop.saved = True
        if self.stop.signal:
            raise Stopped(self.stop.signal)
        yield
        self.stop.saved = False


class Log:
    """Logs progress to stderr, metrics.jsonl and the dashboard, on rank 0 only.

    Opening the log deletes the lines of steps after `step`, the step of the checkpoint.
    """

    def __init__(self, folder, step, total, dashboard):
        self.folder, self.start_time, self.quiet = folder, time.perf_counter(), ranks.rank() > 0
        self.dashboard = dashboard
        if self.quiet:
            return
        kept = truncate_log(folder / "metrics.jsonl", step)
        self.skipped = sum("skipped" in json.loads(line) for line in kept)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
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

    def step(self, step, epoch, ids, loss, tokens, by_style, lr, grad_norm, data_seconds):
        """Log one training step.

        epoch: from 0. loss: the sum over `tokens` caption tokens of the clips `ids`. by_style: the mean
        loss per token of each style. grad_norm: before clipping. data_seconds: the part of the step's
        duration spent waiting for data.
        """
        if self.quiet:
            return
        seconds, self.start_time = time.perf_counter() - self.start_time, time.perf_counter()
        mean = loss / tokens
        losses = {"loss": mean} | {f"loss_{style}": value for style, value in by_style.items()}
        entry = {
            "step": step,
            "epoch": epoch + 1,
            **{k: v if math.isfinite(v) else None for k, v in losses.items()},
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
            "clips_per_second": round(len(ids) / seconds, 2),
        }
        if entry["loss"] is None or entry["grad_norm"] is None:
            entry["skipped"] = ids
            self.skipped += 1
            some = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            self.print(f"step {step} skipped: loss or gradient is not finite (clips {some})")
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()
        shown = (*losses, "lr", "grad_norm", "clips_per_second", "data_seconds")
        self.dashboard.log(step, {f"train/{k}": entry[k] for k in shown if entry[k] is not None})
        text = f"loss {mean:.3f}, lr {lr:.1e}, {len(ids) / seconds:.0f} clip/s"
        text += f", data {100 * data_seconds / seconds:.0f} %"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def evaluation(self, step, epoch, loss, result, samples):
        """Log an evaluation and write validation_epoch_N.json.

        epoch: from 1. loss: the validation loss or None. samples: example captions to store.
        """
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
    """Delete all lines except complete ones of steps up to `step`. Returns the remaining lines."""

    def is_kept(line):
        try:
            return line.endswith("\n") and parse_json(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # a line truncated by a crash
            return False

    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if path.is_file()
        else []
    )
    kept = list(filter(is_kept, lines))
    write_atomic(path, "".join(kept))
    return kept


class Stop:
    """Handlers for Ctrl-C, SIGTERM and SIGHUP: finish the current step, then save and stop.

    A first signal sets `signal`, which the training loop checks. A second signal stops at once. Under
    torchrun a second signal is ignored, because torchrun forwards signals that its processes may have
    received already; it kills them after 30 s. While `saved` is true, the first signal stops at once.
    """

    def __init__(self):
        self.signal, self.saved = 0, False
        self.before = {number: signal.signal(number, self.request) for number in SIGNALS}

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def request(self, number, frame):
        self.signal = int(number)
        if self.saved:
            self.restore()
            signal.raise_signal(number)  # `cli.run` raises `Stopped`, again if it is lost
        for other in self.before:
            signal.signal(other, signal.SIG_IGN if ranks.launched() else signal.SIG_DFL)
        if ranks.rank() == 0:
            # `print` is not reentrant, and the signal may interrupt one
            text = b"\nfinishing this step, then saving; a second signal stops at once\n"
            with suppress(OSError):
                os.write(2, text)
            # after Ctrl-C, the `tee` of `train.py 2>&1 | tee log` has gone as well
            drop_closed_streams(wait=0.5)


class Writer:
    """Writes checkpoints in a background thread, one at a time and in order, on rank 0 only.

    Training waits for serialisation but not for the disk. An error in the thread is raised by the next
    call of `raise_if_failed`, `write`, `wait` or `close`.
    """

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def close(self, error=None):
        """Wait for the last write. error: the exception that ended the run, or None."""
        self.thread.shutdown()
        if not error:
            self.wait()
        elif self.pending and self.pending.exception() not in (None, error):
            # raising here would hide the exception that ended the run
            note(f"WARNING: the last checkpoint was not written: {self.pending.exception()}")

    def raise_if_failed(self):
        """Raise the error of a failed write now, rather than at the next checkpoint."""
        if self.pending and self.pending.done():
            self.pending.result()

    def wait(self):
        if self.pending:
            self.pending.result()

    def write(self, path, state):
        """Serialise `state` now and write it to `path` in the background."""
        if ranks.rank():
            return
        self.wait()
        self.pending = self.thread.submit(replace_checkpoint, path, torch_bytes(state))


def replace_checkpoint(path, data):
    """Write a checkpoint. An old last.pt becomes previous.pt once the new one is on disk."""
    write_atomic(path, data, keep=path.with_name(PREVIOUS) if path.name == LAST else None)
