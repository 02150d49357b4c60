"""Format the results of bench/tabletop.py."""

import statistics

from dataset import VALIDATION

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
# Training runs on the tabletop world

`python -m bench.tabletop` (torch {torch}, transformers {transformers}). Each run trains on {clips:,} rendered clips for
{steps} steps of 16 clips, K = 2 captions per clip, learning rate 1e-3, one block, 16 queries, unless the row says
otherwise. SmolLM2-135M-Instruct is dequantised from Q4_1. Language model and encoder are frozen in all rows.
"CIDEr" is on a 0-10 scale. "template" is template accuracy, "objects" the share of objects that are named,
"exact" the share of captions that equal the label. "unseen" columns are CIDEr too. With several seeds, scores are
mean ± standard deviation. Loss is that of the last epoch on 100 validation clips. Seconds are processor time of the
training steps, with one thread.

{table}

The clips are rendered and training is short. The results do not carry over to Something-Something-V2.
"""


def markdown(results):
    """Format tabletop_runs.md."""
    rows = results["rows"]
    heads = ["", *COLUMNS, "loss", "seconds", "seeds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows.values()]
    steps = rows["base"]["runs"][0]["steps"]
    facts = {name: results["versions"][name] for name in ("torch", "transformers")}
    return TEXT.format(clips=results["clips"], steps=steps, table="\n".join(lines), **facts)


def cells(row):
    """Yield the cells of a row: the mean over its runs, and their standard deviation."""

    def score(values, digits):
        if None in values:
            return ""
        text = f"{statistics.fmean(values):.{digits}f}"
        return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text

    runs = row["runs"]
    yield row["text"]
    for split, metric, digits in COLUMNS.values():
        yield score([run["scores"][split][metric] for run in runs], digits)
    yield score([run["losses"][-1] for run in runs], 3)
    yield score([run["seconds"] for run in runs], 0)
    yield str(len(runs))
