"""The run folder: the files that a training run writes, and the lock and signal handlers around them.

The files are args.json, metrics.jsonl, validation_epoch_N.json, last.pt, previous.pt and best.pt. If the
process is killed at any time, they stay valid.
"""

from runtime.start import SIGNALS

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime import devices, distributed, ranks, start
from runtime.cli import ANNOTATIONS, FEATURES, drop_closed_streams, note, output_folder
from runtime.errors import Stopped, UserError
from runtime.files import lock, read_json, remove_unfinished, torch_bytes, write_atomic, write_json
from runtime.names import visible
from runtime.provenance import provenance
from runtime.run_log import Log

LAST, PREVIOUS, CORRUPT, BEST = "last.pt", "previous.pt", "damaged.pt", "best.pt"

# The files that --overwrite replaces. Other files in the folder are kept. Checkpoints come first: after a
# kill in between, --resume must not continue the old run with the new flags.
RUN_FILES = [LAST, PREVIOUS, CORRUPT, BEST, "args.json", "metrics.jsonl", "curves.png"]
RUN_FILES += ["validation_epoch_*.json", "predictions_*.json", "evaluation_*.json", "versus_*.json"]
RUN_FILES += ["samples_*.json", "settings_*.json", "gallery*.html"]
RUN_FILES += ["report_id.json", "tensorboard/events.*"]  # of dashboards
TRAINERS = ("train.py", "probe.py", "retrieve.py")
REPLACED = ".replaced"  # the old run, until the run that replaces it has saved a checkpoint


def check(output, resume, overwrite, dry_run=False):
    """Return the run folder's path.

    Raises UserError if the folder is in use and no flag allows that, or a file of the run is a folder.
    """
    folder = output_folder(output, "--output")
    if resume and overwrite:
        raise UserError("--resume and --overwrite are mutually exclusive")
    has_run = bool(visible(folder))
    if has_run and not (resume or overwrite or dry_run):
        raise UserError(
            f"--output {folder} already contains a run: continue it with --resume, replace it with"
            " --overwrite, or choose another folder"
        )
    script, own = read_args(folder).get("script"), start.program()
    if not dry_run and script in TRAINERS and own in TRAINERS and script != own:
        raise UserError(f"--output {folder} contains a run of {script}; choose another folder")
    for path in find(folder, RUN_FILES):
        if path.is_dir() and not overwrite:
            raise UserError(f"{path} is a folder, but must be a file; move it away")
    return folder


@contextmanager
def locked(folder, resume, overwrite, dry_run=False):
    """Lock the run folder for the block. Raises UserError if another process is training in it."""
    if dry_run or ranks.rank():
        yield
        return
    with lock(folder, f"another process is training in {folder}: wait for it, or stop it first"):
        # check again, because a run may have started and ended in the meantime
        check(folder, resume, overwrite)
        remove_unfinished(folder)
        yield


@contextmanager
def recorded(folder, args, overwrite, device, finished=False, **facts):
    """Record flags, versions and hardware in args.json, and train in the block.

    finished: whether no step is left; args.json then stays as it is.
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
        if not (finished and (folder / "args.json").exists()):
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
    facts = {
        "script": start.program(),
        "args": args,
        **provenance(),
        "processes": ranks.world_size(),
        "device": devices.describe(device),
        **facts,
    }
    write_json(folder / "args.json", facts)


def read_args(folder):
    """Return the content of args.json, {} if it is missing or not valid."""
    try:
        facts = read_json(folder / "args.json", "args")
    except UserError:
        return {}
    return facts if isinstance(facts, dict) else {}


def fill_paths(args, checkpoint=None):
    """Set --features and --annotations, if they were not given, to those of a run, or else the defaults.

    checkpoint: the run folder or a file in it, or None. Folders that no longer exist are not used.
    """
    path = Path(checkpoint or "")
    known = (
        read_args(path if os.path.isdir(path) else path.parent).get("args") if checkpoint else {}
    )
    for name, default in (("features", FEATURES), ("annotations", ANNOTATIONS)):
        if getattr(args, name, "") is None:
            folder = known.get(name) if isinstance(known, dict) else None
            usable = isinstance(folder, str) and os.path.isdir(folder)
            if isinstance(folder, str) and not usable:
                note(f"note: --{name} {folder} of that run does not exist; using {default}")
            setattr(args, name, folder if usable else default)


def trained_runs(parent="results"):
    """Return the folders of finished or stopped runs of train.py, as in the default of --output."""
    folders = [path.parent for path in Path(parent).glob(f"*/{BEST}")]
    args = {folder: read_args(folder).get("args") for folder in sorted(folders)}
    return [f for f, found in args.items() if isinstance(found, dict) and "num_blocks" in found]


def find(folder, patterns):
    return [path for pattern in patterns for path in folder.glob(pattern)]


def set_aside(folder):
    """Move the files of a run to a hidden folder. If an older run is still there, delete them instead."""
    replaced, is_first = folder / REPLACED, not (folder / REPLACED).exists()
    replaced.mkdir(exist_ok=True)
    for path in find(folder, RUN_FILES):
        if is_first:
            move(path, folder, replaced)
        else:  # they are from a run that was killed before it saved a step
            path.unlink()


def move(path, folder, other):
    """Move a file in `folder` to the same place in another folder."""
    target = other / path.relative_to(folder)
    target.parent.mkdir(exist_ok=True)
    path.replace(target)


def undo(folder):
    """Delete the files of a run, and move back those of the run that it should have replaced."""
    for path in find(folder, RUN_FILES):
        path.unlink()
    with suppress(OSError):  # there is none, or it has other files
        (folder / "tensorboard").rmdir()
    # checkpoints last, see RUN_FILES
    for path in reversed(find(folder / REPLACED, RUN_FILES)):
        move(path, folder / REPLACED, folder)


def replaced_scores(path, result):
    """Return the content of an evaluation file that `result` will replace, or {} if there is none.

    Prints a note if it has the scores of other clips, or of another file of captions.
    """
    if not path.exists():
        return {}
    before = read_json(path, "evaluation")
    if not (isinstance(before, dict) and isinstance(before.get("settings"), dict)):
        return {}
    clips, files = before["settings"].get("clips"), before.get("checkpoint")
    if clips and clips != result["settings"].get("clips"):
        note(f"note: {path} had the scores of other clips, which are replaced")
    elif files and files != result.get("checkpoint"):
        names = ", ".join(map(str, files)) if isinstance(files, list) else files
        note(f"note: {path} had the scores of {names}, which are replaced")
    return before


def delete_replaced(folder):
    if (folder / REPLACED).exists():
        shutil.rmtree(folder / REPLACED)


@contextmanager
def resumable(step):
    """Context manager for a block before which everything up to `step` was saved.

    If a signal stops the block, it prints how to continue.
    """
    try:
        yield
    except Stopped:
        note(stopped_after(step))
        raise


def stopped_after(step):
    return f"stopped after step {step:,}; use --resume to continue"


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
    def evaluating(self, step):
        """Context manager for the evaluation after a step that is saved. A signal stops it at once."""
        with resumable(step):
            self.writer.wait()
            self.stop.saved = True
            if self.stop.signal:
                raise Stopped(self.stop.signal)
            yield
        self.stop.saved = False


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
