"""Runs that train heads on cached features (probe.py, retrieve.py): their state and their checkpoints.

best.pt is a dict of tensors and plain types: "weights" and "sizes" of one head, the "manifest" of its
features, how it was "chosen", and entries that the script adds. last.pt has all heads and the optimizer.
"""

import hashlib
import math
import os
from pathlib import Path

import torch

from runtime import start
from runtime.cli import note
from runtime.errors import UserError, out_of_memory
from runtime.feature_cache import Manifest
from runtime.files import json_line, read_torch, torch_bytes
from runtime.run_folder import BEST, CORRUPT, LAST, PREVIOUS, replace_checkpoint

DIVERGED = -math.inf, -math.inf  # quality of a head whose output is not finite


class HeadRun:
    """The state of a run, which `save` writes to last.pt.

    heads: the modules that are trained, by one optimizer. fixed: the entries of the checkpoints that stay
    the same, as plain types. identity: what must be the same to resume a run, a JSON value. what: what
    `identity` contains besides flags, for the error message.
    """

    def __init__(self, heads, optimizer, fixed, identity, what):
        self.heads, self.optimizer, self.fixed, self.what = heads, optimizer, fixed, what
        self.identity = hashlib.sha256(json_line(identity).encode()).hexdigest()
        self.epoch = self.step = 0  # completed epochs and steps
        self.best = DIVERGED  # quality of best.pt

    def save(self, folder):
        """Write last.pt."""
        value = self.fixed | {"epoch": self.epoch, "best": self.best, "identity": self.identity}
        value |= {"step": self.step, "heads": [head.state_dict() for head in self.heads]}
        value["optimizer"] = self.optimizer.state_dict()
        replace_checkpoint(folder / LAST, torch_bytes(value))

    def save_best(self, folder, head, chosen):
        """Write best.pt with one of the heads. chosen: how it was chosen, a dict of numbers."""
        value = self.fixed | {"weights": head.state_dict(), "chosen": chosen}
        replace_checkpoint(folder / BEST, torch_bytes(value))

    def resume(self, folder):
        """Load last.pt or, if it is corrupt, previous.pt. Returns False if the folder has no checkpoint yet.

        Raises UserError if both are not valid, belong to another run, or are missing beside a best.pt.
        """
        if not any((folder / name).exists() for name in (LAST, PREVIOUS, BEST)):
            note(f"--resume: there is no {folder / LAST}, starting from the first epoch")
            return False
        path, saved = read_last(folder)
        try:
            if saved["identity"] != self.identity:
                raise UserError(f"--resume: flags, {self.what} have changed")
            if saved["manifest"] != self.fixed["manifest"]:
                raise UserError("--resume: the run was started with another feature cache")
            for head, weights in zip(self.heads, saved["heads"], strict=True):
                head.load_state_dict(weights)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.epoch, self.best = int(saved["epoch"]), tuple(map(float, saved["best"]))
            self.step = int(saved.get("step", 0))  # the probe's earlier versions did not store it
        except KeyError:
            raise UserError(f"--resume: {path} was not written by {start.program()}") from None
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"--resume: {path} cannot be used: {error}") from None
        step = f", step {self.step:,}" if self.step else ""
        note(f"resuming after epoch {self.epoch}{step}")
        return True


def read_last(folder):
    """Read last.pt, or previous.pt if last.pt is missing or corrupt. Returns (path, content).

    A corrupt last.pt is renamed, because the next save keeps last.pt as previous.pt. Raises UserError if
    neither can be read.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            saved = read_torch(path)
        except (OSError, ValueError, RuntimeError) as error:
            problems.append(f"{path} cannot be used: {error}")
            continue
        if problems:
            note(f"WARNING: {problems[0]}; resuming from {path}")
            if (folder / LAST).exists():
                os.replace(folder / LAST, folder / CORRUPT)
        return path, saved
    raise UserError(f"--resume: {problems[0]}")


def read_head(path, flag, what, script, check, build):
    """Read and validate the best.pt of a head, or that of a run folder. Returns the dict in it.

    Its "manifest" becomes a `Manifest`. No code in the file is executed, so it may be untrusted. what,
    script: the names of the head and of the script that trains it, for messages. check: a function that
    returns False or raises for a dict that is not valid. build: the class of the head. Raises UserError if
    the file does not exist or is not valid.
    """
    path = Path(path)
    path = path / BEST if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{flag} {path} does not exist: train a {what} with {script}")
    try:
        saved = read_torch(path)
        if not isinstance(saved, dict) or saved.get(f"{what}_version") is None:
            raise ValueError(f"it is not a {what}")
        if not check(saved):
            raise ValueError("an entry is missing or not valid")
        manifest, sizes = Manifest.parse(saved["manifest"]), saved["sizes"]
        settings = manifest.settings
        if (sizes["grid"], sizes["video_width"]) != ([*settings.grid], settings.width):
            raise ValueError("its sizes do not fit its manifest")
        if not all(w.isfinite().all() for w in saved["weights"].values()):
            raise ValueError("its weights contain NaN or infinity")
        with torch.device("meta"):  # untrusted sizes must not allocate memory
            build(**sizes).load_state_dict(dict(saved["weights"]), assign=True)
    except PermissionError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        # the first line of torch's message about weights is generic
        why = str(error).strip().splitlines()[-1].strip() if str(error) else type(error).__name__
        raise UserError(f"{flag} {path} is not a valid {what} ({why})") from None
    return saved | {"manifest": manifest}
