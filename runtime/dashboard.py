"""--report-to: a run's figures go to a dashboard too, under train/… and validation/…

metrics.jsonl has them in any case. A resumed run goes on in its curve; the steps that it repeats,
with the same figures, TensorBoard drops, wandb ignores, and trackio shows twice.
"""

import importlib.util
import secrets
import sys
from contextlib import redirect_stdout

from runtime.errors import UserError
from runtime.files import read_json, write_json

NAMES = ("none", "tensorboard", "trackio", "wandb")
PROJECT = "video-captioner"
ID_FILE = "report_id.json"  # so that a resumed run goes on in its own curve


def check(name):
    """Raises UserError where the library that `--report-to name` needs is not installed."""
    spec = importlib.util.find_spec(name) if name != "none" else None
    if name != "none" and (spec is None or spec.origin is None):  # a mere folder of that name
        raise UserError(f"--report-to {name} needs its library: pip install {name}")


class Reporter:
    """`log(step, {name: number})` to the dashboard `name`, of a run that continues after `step`.

    config: the run's flags. With "none" it does nothing. Raises UserError if it cannot be opened, and
    then leaves nothing behind.
    """

    def __init__(self, name, folder, step, config):
        self.log, self.close = lambda step, values: None, lambda: None
        if not step:  # a new run, if in the place of an old one
            for path in (folder / ID_FILE, *folder.glob("tensorboard/events.*")):
                path.unlink(missing_ok=True)
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # later points of a run that was killed are drawn no more
            writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
            self.log = lambda step, values: [
                writer.add_scalar(k, v, step) for k, v in values.items()
            ]
            self.close = writer.close
        elif name == "trackio":
            import trackio

            begin, name = quietly(trackio.init), run_id(folder)
            run = begin(PROJECT, name=name, config=config, resume="allow")
            write_json(folder / ID_FILE, name)
            self.log = lambda step, values: run.log(values, step=step)
            self.close = quietly(trackio.finish)
        elif name == "wandb":
            import wandb

            name = run_id(folder)
            settings = {"project": PROJECT, "name": folder.name, "id": name, "dir": str(folder)}
            try:
                run = wandb.init(**settings, resume="allow", config=config)
            except wandb.errors.Error as error:
                raise UserError(
                    f"--report-to wandb: {error}; run `wandb login`, or set WANDB_MODE=offline",
                    code=1,
                ) from None
            write_json(folder / ID_FILE, name)
            self.log = lambda step, values: run.log(values, step=step)
            self.close = run.finish


def quietly(function):
    """`function` with what it prints on stderr: stdout is for results."""

    def call(*args, **kwargs):
        with redirect_stdout(sys.stderr):
            return function(*args, **kwargs)

    return call


def run_id(folder):
    """A name that no other run has, the same whenever this one goes on."""
    path = folder / ID_FILE
    if path.is_file():
        return read_json(path, "name of the run")
    return f"{folder.name}-{secrets.token_hex(4)}"
