"""--report-to: the figures of metrics.jsonl on a dashboard too, as train/… and validation/…

A resumed run continues its curve. Of the steps that it repeats, with the same figures, TensorBoard drops
the old ones, wandb ignores the new ones, and trackio shows both.
"""

import importlib
import secrets
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

from runtime import ranks
from runtime.errors import UserError
from runtime.files import read_json, write_json

NAMES = ("none", "tensorboard", "trackio", "wandb")
PROJECT = "video-captioner"
ID_FILE = "report_id.json"  # the run's id on the dashboard, to continue its curve


def check(name):
    """Raise UserError if the library that `--report-to name` needs is not installed."""
    spec = find_spec(name) if name != "none" else None
    if name != "none" and (spec is None or spec.origin is None):  # or a mere folder of that name
        raise UserError(f"--report-to {name} needs its library: pip install {name}")


class Dashboard:
    """`log(step, {name: number})` and `close()`; without arguments they do nothing."""

    def __init__(self, log=lambda step, values: None, close=lambda: None):
        self.log, self.close = log, close


def connect(name, folder, step, config):
    """Open the `Dashboard` of a run that continues after `step`; config: the run's flags.

    Raises UserError if it cannot be opened. Of several processes only rank 0 reports.
    """
    if ranks.rank():
        return Dashboard()
    if not step:  # a new run, possibly in the place of an old one
        for path in (folder / ID_FILE, *folder.glob("tensorboard/events.*")):
            path.unlink(missing_ok=True)
    if name == "none":
        return Dashboard()
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: points of a killed run after the checkpoint are no longer shown
        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

        def log(step, values):
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return Dashboard(log, writer.close)
    library, run_id = importlib.import_module(name), known_id(folder)
    where = {"name": run_id}
    if name == "wandb":
        where = {"name": folder.name, "id": run_id, "dir": str(folder)}
    failures = library.errors.Error if name == "wandb" else OSError
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            run = library.init(project=PROJECT, **where, resume="allow", config=config)
    except failures as error:
        hint = "; run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"--report-to {name}: {error}{hint}", code=1) from None
    write_json(folder / ID_FILE, run_id)

    def close():
        with redirect_stdout(sys.stderr):
            library.finish()

    return Dashboard(lambda step, values: run.log(values, step=step), close)


def known_id(folder):
    """The id of the run in this folder, or a new one that no other run has."""
    path = folder / ID_FILE
    return read_json(path, "run id") if path.is_file() else f"{folder.name}-{secrets.token_hex(4)}"
