"""Write the table and figure of bench/ablation.py from the results of its runs."""

import math
import statistics

from runtime.cli import note

SCORES = {  # key of a run: heading, decimals
    "cider": ("CIDEr, validation", 2),
    "cider_objects": ("CIDEr, unseen objects", 2),
    "template_accuracy": ("template accuracy", 3),
    "exact_match": ("exact match", 3),
    "right": ("correct in either style", 3),
}
COMPARED = ("cider", "cider_objects")  # the table shows their difference from the base

TEXT = """\
# Ablation on the toy world

`make ablation`, one core per run ({cpu}, torch {torch}).
{clips:,} training clips of the demo's toy world, scored on its validation splits. Seeds {seeds} set initialisation,
order of the clips and choice of captions; world and language model are the same in all runs. Batches have 16
clips; the learning rate is 2e-3 unless the row names another. K is the number of captions per clip and pass.

Scores are mean ± standard deviation over the seeds; CIDEr is on a 0-10 scale. Seconds are processor time of
training: number of steps times the median step. A caption is "correct in either style" if it equals the clip's
label or one of the sentences that the toy world has for the clip. Noise is the standard deviation of the runs
around their row's mean, pooled over all rows except the original's, whose scores are near zero. A difference from
the base is bold if it exceeds twice the noise.

{table}

{verdicts}

The original's recipe: captions sampled uniformly from the label and all paraphrases, the same prompt for both,
one caption per clip and pass, loss on padding tokens, no positions, no standardisation, an output
gain that starts at 1, a constant learning rate (two were tried), no gradient clipping, fp16 features, 9 passes. It
is scored on labels, as in the original.

The toy world is a small world of moving shapes, and training is short. The results do not carry over to
Something-Something-V2.
"""


def values(row, key):
    return [run[key] for run in row["runs"]]


def mean(row, key):
    return statistics.fmean(values(row, key))


def markdown(results):
    """Format ablation.md: the settings, the table, and which differences exceed the noise."""
    rows, base = results["rows"], results["rows"]["base"]
    several = [row for row in rows.values() if len(row["runs"]) > 1]

    def noise(key):
        rows = [row for row in several if row["change"] != "original"]
        variances = [statistics.variance(values(row, key)) for row in rows]
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
        costs = {"parameters": row["parameters"], "bytes per clip": row["bytes_per_clip"]}
        base_costs = (base["parameters"], base["bytes_per_clip"])
        shown = [c for c, b in zip(costs, base_costs, strict=True) if row is base or costs[c] != b]
        yield ", ".join(f"{costs[c]:,} {c}" for c in shown)

    def verdict(key):
        groups = {"Below the base": [], "Above the base": [], "Within noise": []}
        for row in rows.values():
            if row is not base:
                place = 2 if abs(gap(row, key)) <= 2 * noise(key) else int(gap(row, key) > 0)
                list(groups.values())[place].append(row["text"])
        text = ". ".join(
            f"{group}: {'; '.join(names) or 'none'}" for group, names in groups.items()
        )
        return f"**{SCORES[key][0]}** (noise {noise(key):.2f}). {text}."

    heads = ["one change from the base"]
    for key, (head, _) in SCORES.items():
        heads += [head, *["difference"] * (key in COMPARED)]
    lines = [[*heads, "seconds", "trained, stored"], ["---"] * (len(heads) + 2)]
    lines += [cells(row) for row in rows.values()]
    return TEXT.format(
        cpu=results["processor"],
        torch=results["versions"]["torch"],
        clips=results["clips"],
        seeds=", ".join(
            map(str, sorted({s for row in rows.values() for s in values(row, "seed")}))
        ),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        verdicts="\n\n".join(map(verdict, COMPARED)),
    )


def draw(results, path):
    """Plot validation loss and CIDEr against seconds of training for K = 1, 2 and 4."""
    try:
        import matplotlib
    except ImportError:
        note("no figure: matplotlib is not installed (pip install -e '.[viz]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {  # row: name, colour and marker, distinct for colour-blind readers too
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
        panel.legend(title="captions per clip and pass")
    figure.suptitle(
        "Toy world. Thick: mean over seeds; thin: single seeds; one marker per pass over the clips"
    )
    figure.savefig(path, dpi=110)
    note(f"figure: {path}")


def points(curve, key):
    return [point["seconds"] for point in curve], [point[key] for point in curve]
