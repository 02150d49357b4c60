"""Format the results of `make tabletop`, bench/tabletop.py and bench/free_prompts.py as one page."""

import statistics

from dataset import VALIDATION
from worlds import tabletop_demo

COLUMNS = {  # heading: split, metric, decimals
    "CIDEr": (VALIDATION, "CIDEr", 2),
    "template": (VALIDATION, "template_accuracy", 3),
    "objects": (VALIDATION, "placeholder_match", 3),
    "exact": (VALIDATION, "exact_match", 3),
    "shuffled": (VALIDATION, "shuffled", 2),
    "unseen pairs": ("validation_pairs", "CIDEr", 2),
    "unseen objects": ("validation_objects", "CIDEr", 2),
    "unseen background": ("validation_background", "CIDEr", 2),
}
TEXT = """\
# Tabletop world

The language model (SmolLM2-135M-Instruct, dequantised from Q4_1) and the encoder (MobileNetV2) are pretrained, except in
the controls, and frozen in all runs. The clips are rendered: the scores do not carry over to Something-Something-V2.
See [docs/tabletop.md](../docs/tabletop.md).

CIDEr is on a 0-10 scale. "template" is template accuracy, "objects" the share of objects that are named, and "exact"
the share of captions that equal the label.

## Scores

`make tabletop`, {runs}. The seed determines world, initialisation and order of the clips.{spread}

{scores}

## Controls and changes

`python -m bench.tabletop` (torch {torch}, transformers {transformers}). Each run trains on the labels of {clips:,} clips,
for {steps} steps of 8 clips, with a learning rate of {lr}, one block and 16 queries, unless the row says otherwise. These
runs are shorter than those above, so their scores are lower. K is the number of captions per clip: the label and K - 1
sentences. "shuffled" and the "unseen" columns are CIDEr, too. With several seeds, scores are mean ± standard deviation.
"loss" is the validation loss on 100 clips after the last epoch.

{table}

## Upper bound

`python -m bench.free_prompts`: if each clip has its own {free[num_queries]} soft prompts, trained for {free[steps]} steps, the frozen language
model writes {free[exact_match]:.0%} of {free[n]} labels word for word (loss {free[loss]:.3f}).
"""


def markdown(results, demos, free):
    """Format tabletop.md.

    results: of `bench.tabletop.collect`. demos: the summaries of `make tabletop`, one per seed. free: the
    result of bench/free_prompts.py.
    """
    rows = results["rows"]
    heads = ["", *COLUMNS, "loss", "steps", "seeds", "device"]
    lines = [heads, ["---"] * len(heads), *map(cells, rows.values())]
    several = len(demos) > 1
    return TEXT.format(
        runs=f"{len(demos)} seeds" if several else "one seed",
        spread=" Scores are means; the range is in brackets." if several else "",
        scores=as_table(demo_table(demos)),
        clips=results["clips"],
        lr=results["lr"],
        steps=rows["base"]["runs"][0]["steps"],
        table=as_table(lines),
        free=free,
        **{name: results["versions"][name] for name in ("torch", "transformers")},
    )


def as_table(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo_table(demos):
    """Yield the rows of the table of scores: the mean over the seeds, and the range."""

    def cell(values):
        if None in values:
            return ""
        spread = f" ({min(values):.2f} – {max(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    yield ["", *tabletop_demo.SCORES.values()]
    yield ["---"] * (1 + len(tabletop_demo.SCORES))
    splits = tabletop_demo.SPLITS | {tabletop_demo.STILL: "control: first frame only"}
    for split, text in splits.items():
        scores = [demo["scores"][split] for demo in demos]
        yield [text, *(cell([s[metric] for s in scores]) for metric in tabletop_demo.SCORES)]
    for name, text in (("shuffled", "shuffled"), ("most_frequent", "most frequent label")):
        yield [f"control: {text}", cell([demo["controls"][name] for demo in demos]), "", "", ""]
    yield ["attentive probe on the same features", "", cell([d["probe"] for d in demos]), "", ""]


def cells(row):
    """Return the cells of a row of runs: the mean over its runs, and their standard deviation."""

    def score(values, digits):
        if None in values:
            return ""
        text = f"{statistics.fmean(values):.{digits}f}"
        return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text

    runs = row["runs"]
    return [
        row["text"],
        *(score([r["scores"][split][key] for r in runs], n) for split, key, n in COLUMNS.values()),
        score([run["losses"][-1] for run in runs], 3),
        str(runs[0]["steps"]),
        str(len(runs)),
        ", ".join(sorted({run["device"] for run in runs})),
    ]
