"""The table and the figure of bench/ablation.py, from what its runs measured. Standard library, matplotlib."""

import math
import platform
import statistics
from pathlib import Path

from runtime.cli import note

SCORES = {  # key of a run: heading, decimals
    "cider": ("CIDEr, validation", 2),
    "cider_objects": ("CIDEr, unseen objects", 2),
    "template_accuracy": ("template accuracy", 3),
    "exact_match": ("exact match", 3),
    "right": ("right in either style", 3),
}
COMPARED = ("cider", "cider_objects")  # these get a difference to the base

TEXT = """\
# Ablation on the toy world

`make ablation`, one core per run ({cpu}, torch {torch}).
{clips:,} training clips of the demo's world and its validation splits; seeds {seeds} of the run
(initialisation, order, captions): one world, one language model, batches of 16 clips, learning rate 2e-3.

Mean ± standard deviation over the seeds, CIDEr of 10. Seconds: processor time of training, steps times
the median step. "Right in either style": the caption is the clip's label or any sentence that the world
has for it, word for word. Noise: the standard deviation of a run around its row's mean, pooled over all
rows but the original's, whose scores are near zero. A difference to the base of more than twice the noise
is bold.

{table}

{verdicts}

The original's recipe: captions drawn uniformly from the label and all paraphrases, one prompt for both, one
caption a pass, pads trained on, no positions, no standardisation, a bare LayerNorm at the end, a constant
learning rate (two were tried) without clipping, fp16 features, 9 passes. It is scored on labels, as the original does.

A tiny world of moving shapes and a short training: no claim about Something-Something-V2.
"""


def values(row, key):
    return [run[key] for run in row["runs"]]


def mean(row, key):
    return statistics.fmean(values(row, key))


def markdown(results):
    """ablation.md: what was run, the table, and which differences are more than noise."""
    rows, base = results["rows"], results["rows"]["base"]
    several = [row for row in rows.values() if len(row["runs"]) > 1]

    def noise(key):
        scattered = [row for row in several if row["change"] != "original"]
        variances = [statistics.variance(values(row, key)) for row in scattered]
        return statistics.fmean(variances) ** 0.5 if variances else math.inf

    def gap(row, key):
        return mean(row, key) - mean(base, key)

    def cells(row):
        def score(key, digits):
            spread = statistics.stdev(values(row, key)) if row in several else 0
            return f"{mean(row, key):.{digits}f} ± {spread:.{digits}f}"

        yield row["text"]
        for key, (_, digits) in SCORES.items():
            yield score(key, digits)
            if key in COMPARED:
                bold = "**" if abs(gap(row, key)) > 2 * noise(key) else ""
                yield "" if row is base else f"{bold}{gap(row, key):+.{digits}f}{bold}"
        yield score("seconds", 0)
        costs = {"parameters": row["parameters"], "bytes a clip": row["bytes_per_clip"]}
        of_base = (base["parameters"], base["bytes_per_clip"])
        shown = [c for c, b in zip(costs, of_base, strict=True) if row is base or costs[c] != b]
        yield ", ".join(f"{costs[c]:,} {c}" for c in shown)

    def verdict(key):
        groups = {"Below the base": [], "Above it": [], "Not told apart from it": []}
        for row in rows.values():
            if row is not base:
                place = 2 if abs(gap(row, key)) <= 2 * noise(key) else int(gap(row, key) > 0)
                list(groups.values())[place].append(row["text"])
        said = ". ".join(
            f"{group}: {'; '.join(names) or 'none'}" for group, names in groups.items()
        )
        return f"**{SCORES[key][0]}** (noise {noise(key):.2f}). {said}."

    heads = ["one change to the base"]
    for key, (head, _) in SCORES.items():
        heads += [head, *["difference"] * (key in COMPARED)]
    lines = [[*heads, "seconds", "trained, stored"], ["---"] * (len(heads) + 2)]
    lines += [cells(row) for row in rows.values()]
    return TEXT.format(
        cpu=results["cpu"],
        torch=results["versions"]["torch"],
        clips=results["clips"],
        seeds=", ".join(
            map(str, sorted({s for row in rows.values() for s in values(row, "seed")}))
        ),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        verdicts="\n\n".join(map(verdict, COMPARED)),
    )


def cpu():
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(results, path):
    """Validation loss and CIDEr against seconds of training for K = 1, 2 and 4, at equal seconds."""
    try:
        import matplotlib
    except ImportError:
        note("no figure: matplotlib is missing, pip install -e '.[viz]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {  # row: its name, a colour and a marker that all eyes can tell apart
        "k1": ("K = 1", "#0072b2", "o"),
        "base": ("K = 2", "#d55e00", "s"),
        "k4": ("K = 4", "#009e73", "^"),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, title in zip(
        panels, ("loss", "cider"), ("loss per token", "CIDEr"), strict=True
    ):
        for name, (label, colour, marker) in lines.items():
            if name not in results["rows"]:
                continue
            curves = values(results["rows"][name], "curve")
            for curve in curves:
                panel.plot(*points(curve, key), color=colour, linewidth=0.7, alpha=0.5)
            average = [
                {k: statistics.fmean(point[k] for point in epoch) for k in ("seconds", key)}
                for epoch in zip(*curves, strict=True)
            ]
            panel.plot(*points(average, key), color=colour, marker=marker, linewidth=2, label=label)
        panel.set(
            xlabel="processor-seconds of training", ylabel=f"validation {title}", xlim=(0, None)
        )
        panel.grid(alpha=0.3)
        panel.legend(title="captions a clip and pass")
    figure.suptitle(
        "Toy world: mean of the seeds, thin: each seed; a marker for each pass over the clips"
    )
    figure.savefig(path, dpi=110)
    note(f"figure: {path}")


def points(curve, key):
    return [point["seconds"] for point in curve], [point[key] for point in curve]
