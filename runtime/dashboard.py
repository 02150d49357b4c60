"""--report-to: send the values of metrics.jsonl to a dashboard, as train/… and validation/…

A resumed run continues its curve. It logs the steps since its checkpoint again, with the same values:
TensorBoard drops the old points, wandb ignores the new ones, and trackio shows both.
"""

import importlib
import secrets
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

from runtime import ranks
from runtime.errors import FAILED, UserError
from runtime.files import read_json, write_json

NAMES = ("none", "tensorboard", "trackio", "wandb")
PROJECT = "video-captioner"
ID_FILE = "report_id.json"  # the run's id on the dashboard, to continue its curve


def check(name):
    """Raise UserError if the library for `--report-to name` is not installed."""
    spec = find_spec(name) if name != "none" else None
    if name != "none" and (spec is None or spec.origin is None):  # a plain folder has no origin
        raise UserError(f"--report-to {name} needs the package: pip install {name}")


class Dashboard:
    """An object with `log(step, {name: number})` and `close()`. By default both do nothing."""

    def __init__(self, log=lambda step, values: None, close=lambda: None):
        self.log, self.close = log, close


def connect(name, folder, step, config):
    """Return a `Dashboard` for a run that continues after `step`. Only rank 0 reports.

    config: the run's flags. Raises UserError if the dashboard cannot be opened.
    """
    if ranks.rank() or name == "none":
        return Dashboard()
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides points that a killed run logged after its last checkpoint
        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

        def log(step, values):
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return Dashboard(log, writer.close)
    library, run_id = importlib.import_module(name), known_id(folder)
    run_settings = {"name": run_id}
    if name == "wandb":
        run_settings = {"name": folder.name, "id": run_id, "dir": str(folder)}
    failures = library.errors.Error if name == "wandb" else OSError
    try:
        with redirect_stdout(sys.stderr):  # stdout is for results
            run = library.init(project=PROJECT, **run_settings, resume="allow", config=config)
    except failures as error:
        hint = "; run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"--report-to {name}: {error}{hint}", code=FAILED) from None
    write_json(folder / ID_FILE, run_id)

    def close():
        with redirect_stdout(sys.stderr):
            library.finish()

    return Dashboard(lambda step, values: run.log(values, step=step), close)


def known_id(folder):
    """Return the dashboard id of the run in this folder, or a new unique one."""
    path = folder / ID_FILE
    if not path.is_file():
        return f"{folder.name}-{secrets.token_hex(4)}"
    run_id = read_json(path, "run id")
    if not isinstance(run_id, str):
        raise UserError(f"run id {path} must contain a JSON string; delete the file for a new id")
    return run_id
