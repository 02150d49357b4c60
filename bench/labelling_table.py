"""Format the results of bench/labelling.py as one page."""

import statistics

from dataset import VALIDATION

TEXT = """\
# Self-training

`python -m bench.labelling`: a captioner trained on a tenth of the captions writes captions of the other clips, and a
new one trains on both. See [docs/labelling.md](../docs/labelling.md). All models of a world train for about as
many steps, in whole passes; the last checkpoint is scored on clips whose captions are the world's own. CIDEr is on a
0-10 scale. With several seeds, a score is the mean with the range of the runs; with one, CIDEr has its 95 % interval over clips.
"""
WORLD = """
## {name}

{human:,} of {total:,} training clips keep their captions. The model writes {labelled:,} captions, of which {right:.0%} equal the
label: {right_likelier:.0%} of the likelier half and {right_other:.0%} of the other. {runs}, about {steps} steps each.

{table}
"""
NAMES = {"toy": "Toy world", "tabletop": "Tabletop world"}
HEADS = {"validation": "clips never seen", "validation_pairs": "unseen pairs"}
HEADS |= {"validation_objects": "unseen objects", "validation_background": "unseen background"}


def markdown(results, models):
    """Format labelling.md. results: {world: results of `bench.labelling`}. models: {name: title}."""
    parts = [TEXT]
    for world, found in results.items():
        runs = found["runs"]
        right = {k: statistics.mean(r[k] for r in runs) for k in runs[0] if k.startswith("right")}
        parts.append(
            WORLD.format(
                name=NAMES[world],
                human=runs[0]["human"],
                total=runs[0]["human"] + runs[0]["labelled"],
                labelled=runs[0]["labelled"],
                **right,
                runs=f"{len(runs)} seeds" if len(runs) > 1 else "One seed",
                steps=found["steps"],
                table=table([r["scores"] for r in runs], models),
            )
        )
    return "".join(parts)


def table(runs, models):
    """Format the scores of one world. runs: {model: {split: {metric: score}}} of each seed."""
    splits = list(runs[0]["human"])
    heads = ["captions", *(f"CIDEr, {HEADS[s]}" for s in splits), "template", "exact"]
    lines = [heads, ["---"] * len(heads)]
    for model, title in models.items():
        cells = [title]
        for split in splits:
            values = [r[model][split]["CIDEr"] for r in runs]
            low, high = (
                runs[0][model][split]["interval"] if len(runs) == 1 else (min(values), max(values))
            )
            cells.append(f"{statistics.mean(values):.2f} ({low:.2f} – {high:.2f})")
        for metric in ("template_accuracy", "exact_match"):
            mean = statistics.mean(r[model][VALIDATION][metric] for r in runs)
            cells.append(f"{mean:.3f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
