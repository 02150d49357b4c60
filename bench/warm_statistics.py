"""Measure which feature statistics suit a warm start: those of the checkpoint or those of the new clips.

    python -m bench.warm_statistics --checkpoint results/tabletop --data data/tabletop     (10 minutes (est.))

Computes the loss of the labels of several splits with both, before any training. The new statistics are
computed from 50 clips of the split, the loss from up to 120 others. Writes warm_statistics.json and
warm_statistics.md to --output.
"""

import runtime.start

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_captioner, read_checkpoint
from dataset import VALIDATION, batches, by_hash, load_records
from evaluate import clip_loader, to_device
from runtime import cli, devices
from runtime.feature_cache import channel_statistics, load_manifest
from runtime.files import write_atomic, write_json
from runtime.intervals import bootstrap
from runtime.provenance import provenance

OWN, SCORED = 50, 120  # clips for the statistics and for the loss
SPLITS = {
    "validation_background": "other tables and walls",
    "validation_objects": "other objects",
    VALIDATION: "the same world",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="results/tabletop", help=cli.CHECKPOINT_KINDS)
    add("--data", default="data/tabletop", help="folder of the tabletop world")
    add("--lm", metavar="DIR", help="folder of the checkpoint's language model, if it has moved")
    add("--output", default="results", help="folder for the results")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    output = cli.output_folder(args.output, "--output")
    settings = load_manifest(Path(args.data, "features")).settings
    device, dtype = devices.resolve(args.device, args.dtype)
    captioner = load_captioner(read_checkpoint(args.checkpoint), device, dtype, args.lm)
    results = {s: compare(captioner, args.data, settings, s, args.workers) for s in SPLITS}
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "warm_statistics.json", provenance() | results)
    text = markdown(results)
    write_atomic(output / "warm_statistics.md", text.encode())
    print(text, end="")


def compare(captioner, data, settings, split, workers):
    """Compare the losses of the clips of a split with both statistics."""
    features, qformer = f"{data}/features", captioner.qformer
    records = {r["id"]: r for r in load_records(f"{data}/annotations", split)}
    ids = by_hash(records, 0)
    kept = qformer.mean.clone(), qformer.std.clone()
    new = channel_statistics(features, split, ids[:OWN], settings, workers)
    scored = [records[i] for i in ids[OWN : OWN + SCORED]]
    loader = clip_loader(captioner, features, settings, split, scored, "label", 1, workers)
    losses = []
    for batch in tqdm(batches(loader), split, len(scored), leave=False, unit="clip"):
        batch = to_device(batch, captioner.device)
        losses.append([loss_of(captioner, batch, statistics) for statistics in (kept, new)])
    qformer.standardise(*kept)
    losses = np.array(losses)  # (clips, 2)
    return {
        "n": len(losses),
        "shift": float(((new[0].to(kept[0]) - kept[0]) / kept[1]).abs().mean()),
        "kept": float(losses[:, 0].mean()),
        "new": float(losses[:, 1].mean()),
        "ci95": bootstrap(losses[:, 1] - losses[:, 0], 0),
    }


@torch.inference_mode()
def loss_of(captioner, batch, statistics):
    """Compute the mean loss per token of a batch with these statistics, (mean, std)."""
    captioner.qformer.standardise(*statistics)
    cache = captioner.prefix(batch["features"], batch["scale"], batch["offset"])
    return captioner.loss(cache, batch).double().mean().item()


def markdown(results):
    """Format warm_statistics.md. results: {split: `compare`}, which may be beside other keys."""
    lines = [
        "# Feature statistics of a warm start",
        "",
        "`python -m bench.warm_statistics`: the loss per token, averaged over clips, of the checkpoint of `make tabletop`",
        "(seed 0) before any further training. Features are standardised with the mean and standard deviation of its",
        f'training clips (kept) or of {OWN} other clips of the split (new). "shift" is the mean distance between the',
        "channel means of both, in standard deviations.",
        "",
        "| clips with | clips | shift | kept | new | new - kept, 95 % interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for split, title in SPLITS.items():
        r = results[split]
        low, high = r["ci95"]
        interval = f"{r['new'] - r['kept']:+.3f} ({low:+.3f} to {high:+.3f})"
        cells = [
            title,
            f"{r['n']}",
            f"{r['shift']:.2f}",
            f"{r['kept']:.3f}",
            f"{r['new']:.3f}",
        ]
        lines.append(f"| {' | '.join([*cells, interval])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
