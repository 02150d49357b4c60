"""The run folder: what a training run leaves behind, and how it continues exactly.

args.json, metrics.jsonl, losses.txt, validation_epoch_N.json, metrics.csv, curves.png, last.pt; each
is whole at any moment.
"""

from runtime.start import ROOT

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dataset import STYLES, check_same_settings
from runtime import devices, distributed, ranks
from runtime.cli import note, output_folder
from runtime.errors import Stopped, UserError
from runtime.files import lock, read_json, remove_unfinished, torch_bytes, write_atomic, write_json
from viz import curves

LAST, PREVIOUS, DAMAGED = "last.pt", "previous.pt", "damaged.pt"

# Flags that do not change what is learned, so that a resumed run may have others
MAY_CHANGE = {"annotations", "device", "features", "lm", "output", "overwrite", "resume"} | {
    "save_every",
    "workers",
    "dry_run",
    "no_meteor",
    "allow_missing",
    "report_to",
    "export",
}

# Flags that --resume lets change if their product, the clips per step, stays the same
SPLIT = ("batch_size", "grad_accum")

# What --overwrite removes: a run's own files, never what else lies in the folder.
# The checkpoints first: a kill meanwhile must not leave an old run to be resumed as the new one.
OURS = [LAST, PREVIOUS, DAMAGED, "best.pt", "args.json", "metrics.jsonl", "losses.txt"]
OURS += ["validation_epoch_*.json", "predictions_*.json", "evaluation_*.json", "gallery*.html"]
OURS += ["metrics.csv", "curves.png"]


def claim(args):
    """Return the run folder's path. Raises UserError where a run is there already, unless told."""
    folder = output_folder(args.output, "--output")
    holds_a_run = any(path.name != ".lock" for path in folder.glob("*"))
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if not args.dry_run and not args.resume and not args.overwrite and holds_a_run:
        raise UserError(
            f"--output {folder} already holds a run: continue it with --resume, replace it with"
            " --overwrite, or name another folder"
        )
    return folder


@contextmanager
def held(folder, args):
    """Keep every other train.py out of the folder. Raises UserError if one is in it."""
    if args.dry_run or ranks.rank():
        yield
        return
    with lock(folder, f"another train.py is at work in {folder}: wait for it, or stop it first"):
        claim(args)  # again: a run may have begun and ended while this one was reading
        remove_unfinished(folder)
        yield


def newest(folder, dry_run):
    """The checkpoint to continue from, or None where there is none yet.

    last.pt, or the one before it if last.pt is damaged, which is then said and set aside. Raises
    UserError if neither can be used.
    """
    from captioner import Damaged, read_checkpoint

    paths = [path for path in (folder / LAST, folder / PREVIOUS) if path.is_file()]
    state, damaged = None, []
    for path in paths:
        try:
            state = read_checkpoint(path, "--resume")
            break
        except Damaged as error:
            damaged.append(path)
            note(f"WARNING: {error}")
    if len(set(distributed.all_gather(state and state["step"]))) > 1:
        raise UserError(f"--resume: the processes do not see the same {folder / LAST}", code=1)
    if state is None and (paths or (folder / "best.pt").exists()):
        raise UserError(
            f"--resume: {folder} holds a run and no checkpoint to continue it from; start over with"
            " --overwrite",
            code=1,
        )
    if state is None:
        note(f"--resume: there is no {folder / LAST}, starting from the first step")
    elif path.name != LAST:
        note(f"WARNING: continuing from {path}, at step {state['step']:,}: {LAST} is lost")
        if damaged and not dry_run and ranks.rank() == 0:
            # or the next save would put it in the place of the good one
            os.replace(damaged[0], folder / DAMAGED)
    return state


def start(folder, args, device, **counts):
    """Clear the folder under --overwrite, and write down what runs with what, on what."""
    from importlib.metadata import version

    import torch

    if ranks.rank():
        return
    if args.overwrite:
        for path in (p for pattern in OURS for p in folder.glob(pattern)):
            path.unlink()
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    facts = {
        "args": vars(args),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "threads": torch.get_num_threads(),
        "git_commit": commit,
        "processes": ranks.world_size(),
        "device": devices.describe(device),
        **counts,
    }
    write_json(folder / "args.json", facts)


class Log:
    """Progress on stderr, and the same as lines of metrics.jsonl and losses.txt.

    Opening it drops the lines of steps that the checkpoint, at `step`, does not contain. Of several
    processes rank 0 alone has one. reporter: the `Reporter` that is told too.
    """

    def __init__(self, folder, step, total, reporter):
        from tqdm import tqdm

        self.folder, self.began, self.quiet = folder, time.perf_counter(), ranks.rank() > 0
        self.reporter = reporter
        if self.quiet:
            return
        kept = cut(folder / "metrics.jsonl", step, lambda line: json.loads(line)["step"])
        cut(folder / "losses.txt", step, lambda line: int(line.split("\t")[0]))
        self.skipped = sum("skipped" in json.loads(line) for line in kept)
        self.metrics = open(folder / "metrics.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
        self.losses = open(folder / "losses.txt", "a")  # noqa: SIM115
        self.bar = tqdm(total=total, initial=step, unit="step", smoothing=0.1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.quiet:
            return
        for file in (self.metrics, self.losses, self.bar, self.reporter):
            file.close()
        if self.skipped:
            note(f"steps skipped: {self.skipped}, see {self.folder / 'metrics.jsonl'}")

    def sync(self):
        """On the disk before the checkpoint that counts on these lines."""
        if not self.quiet:
            os.fsync(self.metrics.fileno()), os.fsync(self.losses.fileno())

    def step(self, step, epoch, lr, loss, norm, tokens, ids, data_seconds):
        """loss: summed over `tokens` caption tokens of the clips `ids`; norm: before clipping.

        data_seconds: the part of the step's `seconds` in which this process waited for data.
        """
        if self.quiet:
            return
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
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
            self.bar.write(
                f"step {step} skipped: no finite loss or gradient (clips {some})", file=sys.stderr
            )
        self.metrics.write(json.dumps(entry) + "\n")
        self.losses.write(f"{step}\t{mean:.6f}\n")
        self.metrics.flush(), self.losses.flush()
        reported = ("loss", "lr", "grad_norm", "clips_per_second", "data_seconds")
        self.report(step, "train", {k: entry[k] for k in reported})
        shown = f"loss {mean:.3f}, lr {lr:.1e}, {len(ids) / seconds:.0f} clip/s"
        shown += f", data {100 * data_seconds / seconds:.0f} %"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()

    def epoch(self, step, epoch, loss, result, predictions, records):
        """Write validation_epoch_N.json, with the first captions to look at, and the curves."""
        if self.quiet:
            return
        samples = [
            {"id": r["id"], "reference": r["label"], "prediction": predictions[r["id"]]}
            for r in records[:20]
        ]
        head = {"epoch": epoch, "step": step, "loss": loss}
        path = self.folder / f"validation_epoch_{epoch}.json"
        write_json(path, head | result | {"samples": samples})
        curves.update(self.folder)
        self.report(step, "validation", {"loss": loss, **result["metrics"]})
        shown = {k: v for k, v in result["metrics"].items() if k in ("CIDEr", "template_accuracy")}
        if loss is not None:
            shown = {"loss": loss, **shown}
        text = ", ".join(f"{k} {v:.3f}" for k, v in shown.items())
        self.bar.write(f"epoch {epoch}: validation {text}", file=sys.stderr)
        self.began = time.perf_counter()

    def report(self, step, what, values):
        self.reporter.log(step, {f"{what}/{k}": v for k, v in values.items() if v is not None})


def cut(path, step, step_of):
    """Keep the whole lines of steps up to `step`; returns them."""

    def belongs(line):
        try:
            return line.endswith("\n") and step_of(line) <= step
        except (ValueError, KeyError, TypeError):  # what a crash of the machine left of a line
            return False

    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []
    kept = list(filter(belongs, lines))
    write_atomic(path, "".join(kept))
    return kept


class Stop:
    """Ctrl-C and SIGTERM let the step finish (`signal` is set); a second one leaves at once.

    But not under torchrun: it repeats to its processes the signal that they may have had already,
    and after 30 s it kills them by itself. `saved`: nothing would be lost by leaving at the first.
    """

    def __init__(self):
        self.signal, self.saved = 0, False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.request) for number in numbers}

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
            os.write(2, b"\nfinishing this step, then saving; a second signal leaves at once\n")


class Writer:
    """Writes checkpoints in a thread: training waits for their bytes, not for the disk.

    One at a time and in order; an error of the disk surfaces in `check`, `write` and at the end. Of
    several processes rank 0 alone writes.
    """

    def __init__(self):
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        self.thread.shutdown()
        if not error:
            self.wait()
        elif self.writing and self.writing.exception() not in (None, error):
            note(f"the last checkpoint was not written: {self.writing.exception()}")

    def check(self):
        """Raise what went wrong in a write that has ended: no need to train on to the next."""
        if self.writing and self.writing.done():
            self.writing.result()

    def wait(self):
        """Until the last write is done; raises what went wrong in it."""
        if self.writing:
            self.writing.result()

    def write(self, path, state):
        """`state` is serialised now, so what training does to its tensors later is not in the file."""
        if ranks.rank():
            return
        self.wait()
        self.writing = self.thread.submit(replace, path, torch_bytes(state))


def replace(path, data):
    """Write a checkpoint; the last.pt before it becomes previous.pt, once this one is on the disk."""
    write_atomic(path, data, keep=path.with_name(PREVIOUS) if path.name == LAST else None)


def identity(args, records):
    """What must be the same to continue: the flags, the training clips and their captions."""
    text = json.dumps([(r["id"], r["label"], r["paraphrases"]) for r in records])
    return {"args": flags(args), "data": hashlib.sha256(text.encode()).hexdigest()[:16]}


def restore(state, frozen, ours, args, total, model, optimizer):
    """Continue from a state of a run of `total` steps; ours: its `identity`.

    Returns what `learn` counts: (step, scored, bad, best). Raises UserError naming what differs. No
    random state: order, captions and dropout are functions of seed, epoch, step and clip.
    """
    from captioner import load_weights, read_checkpoint

    kinds = {"optimizer": dict, "args": dict, "data": str, "best": float}
    kinds |= {"scored": int, "bad": int}
    if not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"--resume: {args.output}/{LAST} is no state of a run (a copy of best.pt?)")
    now, then = ours["args"], state["args"]
    if then.get("dtype") == "auto":  # runs from before it was stored resolved
        then = then | {"dtype": now["dtype"]}
    may_differ = set()
    if clips_a_step(now) == clips_a_step(then):
        may_differ = set(SPLIT)
        old, new = (" x ".join(str(args[key]) for key in SPLIT) for args in (then, now))
        if old != new:
            note(
                f"--resume: a step is now {new} clips instead of {old}: the clips are the same, but the"
                " dropout masks differ"
            )
    for key in sorted((now.keys() | then.keys()) - may_differ):
        if now.get(key) != then.get(key):
            keys = SPLIT if key in SPLIT else [key]  # the two make a step together
            flags_then = " ".join(f"--{k.replace('_', '-')} {then.get(k)}" for k in keys)
            raise UserError(
                f"--resume: the run in {args.output} was started with {flags_then},"
                f" not {' x '.join(str(now.get(k)) for k in keys)}"
            )
    settings = [m["manifest"]["settings"] for m in (state, frozen)]
    check_same_settings(*settings, f"the cache {args.features}")
    if state["lm"]["fingerprint"] != frozen["lm"]["fingerprint"]:
        raise UserError(f"--resume: --lm {args.lm} is not the model that the run began with")
    if state["data"] != ours["data"] or state["styles"] != STYLES:
        raise UserError("--resume: the training clips or their captions have changed")
    if state["step"] > total:
        raise UserError(f"--resume: {args.output}/{LAST} is at step {state['step']} of {total}")
    load_weights(model.qformer, state["qformer"])
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--resume: the optimizer's state is not of this run: {error}") from None
    before, device = device_of(args.output), devices.describe(model.device)
    if before and before != device:
        note(f"--resume: the run began on {before}, this is {device}: results may differ slightly")
    best, scored = state["best"], state["scored"]
    if best > -math.inf:
        try:
            read_checkpoint(Path(args.output, "best.pt"), "--resume")
        except UserError as error:
            note(f"WARNING: {error}")
            note(
                "WARNING: the best score so far is lost with it; the best from here on replaces it"
            )
            best, scored = -math.inf, 0
    return state["step"], scored, state["bad"], best


def device_of(folder):
    """The device that a run folder's args.json names, or None."""
    try:
        return read_json(Path(folder, "args.json"), "args").get("device")
    except (UserError, AttributeError):
        return None


def clips_a_step(args):
    """The clips per step of a run with these flags, or None if the flags are not valid."""
    sizes = [args.get(key) for key in SPLIT]
    return math.prod(sizes) if all(type(size) is int for size in sizes) else None


def flags(args):
    return {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
