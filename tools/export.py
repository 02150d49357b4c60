"""Write a trained Q-Former as a folder to share: config.json, model.safetensors and README.md, a model card.

    python -m tools.export results/ssv2 shared/ssv2     (of results/ssv2/best.pt)

No frozen weight is in it: encoder and language model are referred to by name and fingerprint.
"""

import runtime.start

import hashlib
import json
import re
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import metrics
from checkpoint import CONFIG, KEYS, WEIGHTS, read_checkpoint, weights_digest
from runtime import cli, hub
from runtime.cli import output_folder, printable
from runtime.errors import UserError
from runtime.files import json_bytes, lock, read_json, remove_unfinished, write_atomic

CARD = "README.md"
MARK = {"exported_by": "train.py"}  # one key: of more, safetensors does not keep the order


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("folder", help="folder to write, new or an earlier export")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    print(*export(args.run, args.folder), sep="\n")


# ---- writing -------------------------------------------------------------------------------


def export(run, folder):
    """Write `best.pt` of a run folder as a folder to share. Returns the paths of its files.

    Weights first and config.json, which holds their sha256, last: what a kill leaves is refused by
    `read`, and the next export completes it. Raises UserError for a run without a usable best.pt, and
    for a folder that holds other things than an earlier export.
    """
    run, folder = Path(run), output_folder(folder, "folder")
    checkpoint = read_checkpoint(run / "best.pt", "run")
    if problem := _not_ours(folder):
        raise UserError(f"folder {folder} {problem}; name another folder")
    weights = save({k: w.contiguous() for k, w in checkpoint["qformer"].items()}, MARK)
    config = {k: checkpoint[k] for k in KEYS if k in checkpoint}
    config["manifest"] = checkpoint["manifest"].as_dict()
    config["sha256"] = hashlib.sha256(weights).hexdigest()
    if config.get("best") in (float("inf"), -float("inf")):  # of a run without any score
        config["best"] = None
    try:
        config = json_bytes(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"run {run}: best.pt has what JSON cannot: {error}") from None
    parts = {WEIGHTS: weights, CARD: card(checkpoint, run, folder.absolute().name), CONFIG: config}
    with lock(folder, f"another export is at work in {folder}: wait for it, or stop it first"):
        remove_unfinished(folder, parts.__contains__)
        for name, data in parts.items():
            write_atomic(folder / name, data)
        (folder / ".lock").unlink()  # or it would be shared with the rest
    return [folder / name for name in parts]


def _not_ours(folder):
    """What a folder holds that no export of ours wrote, or None. Hidden files, as git's, may stay."""
    names = sorted(p.name for p in folder.glob("*") if not p.name.startswith("."))
    if others := [name for name in names if name not in (CONFIG, WEIGHTS, CARD)]:
        return f"holds {others[0]}, which is no part of an export"
    try:
        # the first that an export writes: where it is not ours, neither is the rest
        with safe_open(folder / WEIGHTS, "pt") as file:
            ours = file.metadata() == MARK
    except (OSError, SafetensorError):
        ours = False
    return f"holds a {names[0]} that no export wrote" if names and not ours else None


# ---- the card ------------------------------------------------------------------------------


def card(checkpoint, run, name):
    """The model card, Markdown behind YAML, of a checkpoint of the folder `run` shared as `name`."""
    settings, sizes, lm = checkpoint["manifest"].settings, checkpoint["sizes"], checkpoint["lm"]
    encoder = checkpoint["manifest"].info["encoder"]
    known = [model for model in (encoder, lm["name"]) if hub.is_cached(model)]
    base = f"base_model: {json.dumps(known)}\n" if known else ""
    flags = "" if encoder in known else " --encoder ENCODER"
    flags += "" if lm["name"] in known else " --lm LM"
    where = shlex.quote(printable(name, keep=""))
    count = sum(w.numel() for k, w in checkpoint["qformer"].items() if k not in ("mean", "std"))
    grid = " x ".join(map(str, settings.grid))
    facts = {
        "encoder, frozen": f"{_model(encoder)}, fingerprint {settings.encoder_fingerprint}",
        "language model, frozen": f"{_model(lm['name'])}, fingerprint {lm['fingerprint']}",
        "trained": f"{count:,} parameters: {sizes['num_queries']} queries,"
        f" {sizes['num_blocks']} blocks, {sizes['num_heads']} heads",
        "frames": f"{settings.num_frames} a clip ({settings.sampling}),"
        f" {settings.resize} to {settings.size} x {settings.size} pixels",
        "features": f"{grid} tokens of {settings.width} channels, {settings.store},"
        f" pooled {settings.pool} x {settings.pool}, encoded in {settings.compute_dtype}",
        **{f"style prompt, {style}": text for style, text in checkpoint["styles"].items()},
        "step": f"{checkpoint['step']:,}",
        **_recipe(run),
    }
    return f"""---
library_name: pytorch
pipeline_tag: video-text-to-text
tags: [video-captioning, q-former, v-jepa-2]
{base}---

# {_plain(name)}

A Q-Former that turns the features of a frozen V-JEPA 2 into soft prompts, with which a frozen language
model captions videos. It alone is in here: no weight of the encoder or the language model is.

## Use

With the code of video-captioner (`infer.py`), in its folder; `--checkpoint` takes this folder, or its
`owner/name` on the Hub:

```bash
python infer.py clip.mp4 --checkpoint {where}{flags}
```

Encoder and language model must be those below, by fingerprint; `--encoder` and `--lm` take their folders.

## Trained on

{_table([["what", "value"], *([*row] for row in facts.items())])}

## Measured

{_measured(checkpoint, run)}

## Intended use and limits

For research on captioning short clips like those it was trained on. Captions are short and in the
training captions' words; what those never name it cannot say. It hears no audio, sees
{settings.num_frames} frames of a clip, and captions the windows of a long video independently. Do not
rely on a caption where a wrong one does harm. The terms of the training clips, of the encoder and of the
language model apply to what is made with them; this card grants no licence.
"""


def _measured(checkpoint, run):
    """The run's scores of this very checkpoint as Markdown, or that there are none."""
    try:
        result = read_json(run / "evaluation_validation.json", "scores")
        settings = result["settings"]
        if settings["weights"] != weights_digest(checkpoint["qformer"]):
            return "Not evaluated."
        rows, lines = metrics.table(result)
        if missing := settings.get("missing"):
            lines.append(f"{missing} clips without features are in no score")
        head = f"Captions of style {settings['style']} for split {settings['split']}, of these weights:"
    except (UserError, KeyError, TypeError, ValueError, AttributeError):  # none, or not ours
        return "Not evaluated."
    notes = "".join(f"- {_plain(line)}\n" for line in lines)
    return f"{_plain(head)}\n\n{_table(rows)}\n\n{notes}".rstrip()


def _recipe(run):
    """What args.json of the run says about its training, as far as it is there."""
    names = ("epochs", "batch_size", "grad_accum", "captions_per_clip", "lr", "dropout", "seed")
    try:
        facts = read_json(run / "args.json", "arguments")
        flags = ", ".join(f"--{n.replace('_', '-')} {facts['args'][n]}" for n in names)
        return {"training clips": f"{facts['clips']:,}", "flags": flags}
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def _model(name):
    """A Hub id as it is, of a folder its own name: where it lay is nobody's business."""
    return name if hub.is_id(name) else f"folder {Path(name).name}"


def _table(rows):
    """A Markdown table of rows of text, the first its head."""
    rows = [[_plain(cell) for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text):
    """Text from a file or of a name as text of one line: no Markdown, no HTML, no link, no end."""
    text = printable(str(text)[:300], keep="")
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", text)


if __name__ == "__main__":
    cli.run(main)
