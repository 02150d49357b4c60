"""Draw the curves of a training run: loss, CIDEr, gradient norm and learning rate.

    python -m viz.curves results/ssv2     (train.py does this after each evaluation)

Reads metrics.jsonl and validation_epoch_N.json of the run folder and writes curves.png into it. Needs
matplotlib: pip install -e '.[viz]'.
"""

import runtime.start

import io
from functools import cache

from metrics import is_number
from runtime import cli
from runtime.cli import note
from runtime.errors import UserError
from runtime.files import parse_json_lines, read_json, write_atomic
from viz.draw_text import require

# Colours that colour-blind readers can distinguish (Okabe and Ito 2008)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#9a9a9a"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run folder of train.py")
    return parser.parse_args(argv)


def main(argv=None):
    print(write(cli.output_folder(parse_args(argv).run, "RUN")))


def update(folder):
    """Write curves.png during training. If this fails, it is reported once and training continues."""
    try:
        write(folder)
    except Exception as error:  # matplotlib may be missing or broken
        report_once(str(error))


@cache
def report_once(why):
    note(f"no curves.png: {why}")


def write(folder):
    """Write curves.png and return its path.

    Raises UserError if matplotlib is missing or `folder` is not a run folder.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is not a run folder of train.py: it has no metrics.jsonl")
    require("matplotlib")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's settings
        picture = draw(*read(folder))
    write_atomic(folder / "curves.png", picture)
    return folder / "curves.png"


def read(folder):
    """Read metrics.jsonl and all validation_epoch_N.json files. Both are returned in order."""
    evaluations = {}
    for path in folder.glob("validation_epoch_*.json"):
        evaluation = read_json(path, "scores")
        if not is_evaluation(evaluation):
            raise UserError(f"{path} was not written by train.py")
        evaluations[evaluation["epoch"]] = evaluation
    return read_steps(folder / "metrics.jsonl"), [evaluations[n] for n in sorted(evaluations)]


def read_steps(path):
    """Read the steps from metrics.jsonl. Invalid lines, which a crash may leave, are skipped."""
    return [e for e in parse_json_lines(path.read_bytes()) if has_numbers(e, "step", "lr")]


def has_numbers(entry, *names):
    """Return True if `entry` is a dict with these numbers and a loss, which is a number or None."""
    return (
        isinstance(entry, dict)
        and all(is_number(entry.get(name)) for name in names)
        and (entry.get("loss", "") is None or is_number(entry.get("loss")))
    )


def is_evaluation(value):
    """Return True for the content of a validation_epoch_N.json."""
    if not has_numbers(value, "epoch", "step"):
        return False
    scores, controls = value.get("metrics"), value.get("controls")
    sets = [scores, *(controls.values() if isinstance(controls, dict) else [None])]
    return all(isinstance(s, dict) and is_number(s.get("CIDEr", 0)) for s in sets)


def draw(steps, evaluations):
    """Draw the curves and return PNG bytes.

    steps: lines of metrics.jsonl. evaluations: contents of validation_epoch_N.json, ordered by epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, norms, bottom = figure.subplots(4, sharex=True, height_ratios=(3, 3, 1.5, 1.5))

    finite = [s for s in steps if s["loss"] is not None]
    numbers, losses = [s["step"] for s in finite], [s["loss"] for s in finite]
    top.plot(numbers, losses, color=GREY, linewidth=0.6, alpha=0.6, label="training, per step")
    top.plot(numbers, smooth(losses), color=BLUE, label="training, running mean")
    styles = sorted({name for s in finite for name in s if name.startswith("loss_")})
    for name, line in zip(styles, ("--", ":"), strict=False) if len(styles) > 1 else ():
        found = [s for s in finite if is_number(s.get(name))]
        means, at = smooth([s[name] for s in found]), [s["step"] for s in found]
        style = name.removeprefix("loss_")
        top.plot(at, means, line, color=BLUE, linewidth=1, label=f"training, {style}s")
    points(top, evaluations, lambda e: e["loss"], ORANGE, "s", "validation, labels")
    top.set(ylabel="loss per caption token")
    shown = [value for value in (*losses, *(e["loss"] for e in evaluations)) if value]
    if shown and max(shown) > 4 * min(shown):
        logarithmic(top, (1, 2, 5))
    points(middle, evaluations, lambda e: e["metrics"].get("CIDEr"), GREEN, "o", "validation")
    shuffled = {e["step"]: e["controls"].get("shuffled", {}).get("CIDEr") for e in evaluations}
    points(middle, evaluations, lambda e: shuffled[e["step"]], GREY, "x", "predictions shuffled")
    middle.set(ylabel="CIDEr (0 to 10)")
    middle.set_ylim(0, 1.08 * max(middle.dataLim.ymax, 0.1) if evaluations else 10)
    dot = "." if len(steps) == 1 else None  # a line of one point is invisible
    gradients = [(s["step"], s["grad_norm"]) for s in steps if is_number(s.get("grad_norm"))]
    if gradients:
        norms.plot(*zip(*gradients, strict=True), color=BLUE, linewidth=0.6, marker=dot)
        logarithmic(norms, (1, 3))
    norms.set(ylabel="gradient norm")
    bottom.plot([s["step"] for s in steps], [s["lr"] for s in steps], color=BLUE, marker=dot)
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for panel in (top, middle, norms, bottom):
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


def logarithmic(panel, digits):
    """Make the y axis logarithmic, with labels at these digits."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set(yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=digits))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())


def points(panel, evaluations, value, colour, marker, label):
    known = [(e["step"], value(e)) for e in evaluations if value(e) is not None]
    if known:
        panel.plot(*zip(*known, strict=True), color=colour, marker=marker, label=label)


def smooth(values):
    """Compute a running mean over about 1/80 of the run, with the bias correction of Adam."""
    keep, mean, result = 1 - 1 / max(1, len(values) / 80), 0.0, []
    for n, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        result.append(mean / (1 - keep**n))
    return result


if __name__ == "__main__":
    cli.run(main)
