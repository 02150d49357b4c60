"""Draw a training run from the files of its folder: loss, CIDEr and learning rate.

    python -m viz.curves results/ssv2     (train.py does it at each evaluation)

Writes curves.png and metrics.csv, one row an epoch, into the folder. The picture needs matplotlib:
pip install -e '.[viz]'.
"""

import runtime.start

import csv
import io
import json
from contextlib import suppress
from functools import cache
from pathlib import Path

from runtime import cli
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import read_json, write_atomic

COLUMNS = ("epoch", "step", "lr", "train_loss", "validation_loss", "seconds", "clips_per_second")
STEP = {"step", "epoch", "loss", "lr", "tokens", "seconds", "clips_per_second"}  # of metrics.jsonl
EVALUATION = {"epoch", "step", "loss", "metrics", "controls"}  # of validation_epoch_N.json
SCORES = ("CIDEr", "Bleu_4", "ROUGE_L", "exact_match", "template_accuracy", "placeholder_match")
# Colours that all eyes can tell apart (Okabe and Ito 2008)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9a9a9a"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("run", help="run folder of train.py")
    return parser.parse_args(argv)


def main(argv=None):
    folder = Path(parse_args(argv).run)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run folder of train.py: it has no metrics.jsonl")
    for path in update(folder):
        print(path)


def update(folder):
    """Write metrics.csv and, where matplotlib is there, curves.png; returns their paths."""
    steps, evaluations = read(folder)
    write_atomic(folder / "metrics.csv", table(steps, evaluations))
    try:
        picture = draw(steps, evaluations)
    except (
        Exception
    ) as error:  # whatever other people's code trips over: a picture ends no training
        say_missing(
            "matplotlib is missing, pip install -e '.[viz]'"
            if isinstance(error, ImportError)
            else error
        )
        return [folder / "metrics.csv"]
    write_atomic(folder / "curves.png", picture)
    return [folder / "metrics.csv", folder / "curves.png"]


@cache
def say_missing(why):
    """Once, though every evaluation would."""
    note(f"no curves.png: {why}")


def read(folder):
    """The lines of metrics.jsonl, and the validation_epoch_N.json in the order of their epochs."""
    steps = whole_lines(folder / "metrics.jsonl", STEP)
    evaluations = {}
    for path in folder.glob("validation_epoch_*.json"):
        evaluation = read_json(path, "scores")
        if not isinstance(evaluation, dict) or not evaluation.keys() >= EVALUATION:
            raise UserError(f"{path} was not written by train.py")
        evaluations[evaluation["epoch"]] = evaluation
    return steps, [evaluations[epoch] for epoch in sorted(evaluations)]


def whole_lines(path, keys):
    """The JSON objects with these keys of a file of lines; the last may be cut by a crash."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            found += [entry] if isinstance(entry, dict) and entry.keys() >= keys else []
    return found


def table(steps, evaluations):
    """One row an epoch, as CSV; train_loss is the mean over the epoch's caption tokens."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, *SCORES), lineterminator="\n")
    writer.writeheader()
    for evaluation in evaluations:
        mine = [s for s in steps if s["epoch"] == evaluation["epoch"]]
        sound = [s for s in mine if s["loss"] is not None]
        tokens = sum(s["tokens"] for s in sound)
        seconds = sum(s["seconds"] for s in mine)
        clips = sum(s["seconds"] * s["clips_per_second"] for s in mine)
        row = {
            "epoch": evaluation["epoch"],
            "step": evaluation["step"],
            "lr": mine[-1]["lr"] if mine else None,
            "train_loss": sum(s["loss"] * s["tokens"] for s in sound) / tokens if tokens else None,
            "validation_loss": evaluation["loss"],
            "seconds": round(seconds, 1),
            "clips_per_second": round(clips / seconds, 1) if seconds else None,
        }
        writer.writerow(row | {name: evaluation["metrics"].get(name) for name in SCORES})
    return text.getvalue()


def draw(steps, evaluations):
    """The picture, as the bytes of a PNG. Raises ImportError without matplotlib."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the same picture whatever the user's settings
        return _draw(steps, evaluations)


def _draw(steps, evaluations):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 3, 1.5))

    sound = [s for s in steps if s["loss"] is not None]
    at, losses = [s["step"] for s in sound], [s["loss"] for s in sound]
    top.plot(at, losses, color=GREY, linewidth=0.6, alpha=0.6, label="training, each step")
    top.plot(at, smooth(losses), color=BLUE, label="training, running mean")
    points(top, evaluations, lambda e: e["loss"], ORANGE, "s", "validation, labels")
    top.set(ylabel="loss per caption token")
    shown = [value for value in (*losses, *(e["loss"] for e in evaluations)) if value]
    if shown and max(shown) > 4 * min(shown):
        top.set(yscale="log")
        top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter(NullFormatter())
    points(middle, evaluations, lambda e: e["metrics"].get("CIDEr"), GREEN, "o", "validation")
    shuffled = {e["step"]: e["controls"].get("shuffled", {}).get("CIDEr") for e in evaluations}
    points(middle, evaluations, lambda e: shuffled[e["step"]], GREY, "x", "predictions shuffled")
    middle.set(ylabel="CIDEr (of 10)")
    middle.set_ylim(0, 1.08 * max(middle.dataLim.ymax, 0.1) if evaluations else 10)
    dot = "." if len(steps) == 1 else None  # a line of one point is none
    bottom.plot([s["step"] for s in steps], [s["lr"] for s in steps], color=BLUE, marker=dot)
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for panel in (top, middle, bottom):
        panel.grid(alpha=0.3)
        for evaluation in evaluations:
            panel.axvline(evaluation["step"], color=GREY, linewidth=0.5, linestyle=":")
    for panel in (top, middle):
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.suptitle(
        f"step {steps[-1]['step']:,}; dotted: end of an epoch" if steps else "no step yet"
    )
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def points(panel, evaluations, value, colour, marker, label):
    there = [(e["step"], value(e)) for e in evaluations if value(e) is not None]
    if there:
        panel.plot(*zip(*there, strict=True), color=colour, marker=marker, label=label)


def smooth(values):
    """Running mean over about an eightieth of the run, unbiased at its beginning (as Adam's means)."""
    keep, mean, result = 1 - 1 / max(1, len(values) / 80), 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**n))
    return result


if __name__ == "__main__":
    cli.run(main)
