"""Export a trained Q-Former to a folder for sharing: config.json, model.safetensors and a model card.

    python -m tools.export results/ssv2 shared/ssv2     (exports results/ssv2/best.pt)

The export does not contain the frozen models. It stores their names and fingerprints instead.
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
from runtime.names import counted, visible

CARD = "README.md"
MARK = {"exported_by": "train.py"}  # a single key, because safetensors does not keep the order


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("folder", help="folder to write; must be new, empty or an earlier export")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    print(*export(args.run, args.folder), sep="\n")


# ---- writing -------------------------------------------------------------------------------


def export(run, folder):
    """Export best.pt of a run folder. Returns the paths of the written files.

    The weights are written first and config.json, which contains their sha256, last. `read_checkpoint`
    therefore refuses the files that a killed export leaves, and running the export again completes them.
    Raises UserError if best.pt is not usable, or if the folder contains anything but an earlier export.
    """
    run, folder = Path(run), output_folder(folder, "folder")
    checkpoint = read_checkpoint(run / "best.pt", "run")
    if problem := _foreign_file(folder):
        raise UserError(f"folder {folder} {problem}; choose another folder")
    weights = save({k: w.contiguous() for k, w in checkpoint["qformer"].items()}, MARK)
    config = {k: checkpoint[k] for k in KEYS if k in checkpoint}
    manifest = checkpoint["manifest"].as_dict()
    config["lm"] = public("name", checkpoint["lm"])
    config["manifest"] = manifest | {"info": public("encoder", manifest["info"])}
    config["sha256"] = hashlib.sha256(weights).hexdigest()
    if config.get("best") in (float("inf"), -float("inf")):  # the run has no score
        config["best"] = None
    try:
        config = json_bytes(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"run {run}: best.pt cannot be written as JSON: {error}") from None
    parts = {WEIGHTS: weights, CARD: card(checkpoint, run, folder.absolute().name), CONFIG: config}
    with lock(folder, f"another export is writing to {folder}: wait for it, or stop it first"):
        remove_unfinished(folder, parts.__contains__)
        for name, data in parts.items():
            write_atomic(folder / name, data)
        (folder / ".lock").unlink()  # it must not be shared
    return [folder / name for name in parts]


def _foreign_file(folder):
    """Describe a file in the folder that an export did not write, else None. Ignores hidden files."""
    names = [entry.name for entry in visible(folder)]
    if others := [name for name in names if name not in (CONFIG, WEIGHTS, CARD)]:
        return f"contains {others[0]}, which is not part of an export"
    try:
        # the weights are written first, so every export has them
        with safe_open(folder / WEIGHTS, "pt") as file:
            exported = file.metadata() == MARK
    except (OSError, SafetensorError):
        exported = False
    if names and not exported:
        return f"contains a {names[0]} that was not written by tools.export"
    return None


# ---- the card ------------------------------------------------------------------------------


def card(checkpoint, run, name):
    """Format the model card of a checkpoint from the folder `run`, shared as `name`."""
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
        f" pooled {settings.pool} x {settings.pool}, computed in {settings.compute_dtype}",
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

A Q-Former that maps V-JEPA 2 features of a video to soft prompts for a language model, which writes the
caption. Encoder and language model are frozen. Their weights are not included.

## Use

Run this in a clone of video-captioner. `--checkpoint` takes this folder or its `owner/name` on the Hub:

```bash
python infer.py clip.mp4 --checkpoint {where}{flags}
```

The encoder and the language model must have the fingerprints below. If they are in local folders, pass
those as `--encoder` and `--lm`.

## Training

{_table([["what", "value"], *([*row] for row in facts.items())])}

## Evaluation

{_scores(checkpoint, run)}

## Intended use and limits

For research on captioning short clips like those in training. Captions are short and use the vocabulary
of the training captions, so the model cannot name anything that these never mention. It ignores audio,
sees {settings.num_frames} frames of a clip, and captions the windows of a long video independently. Do not
rely on captions where a wrong one could do harm. The licences of the training clips, the encoder and the
language model may restrict the use of this model. This card does not grant a licence.
"""


def _scores(checkpoint, run):
    """The run's scores as Markdown if they were computed with this checkpoint, else "Not evaluated."."""
    try:
        result = read_json(run / "evaluation_validation.json", "scores")
        if not metrics.is_result(result):
            return "Not evaluated."
        settings = result["settings"]
        if settings["weights"] != weights_digest(checkpoint["qformer"]):
            return "Not evaluated."
        rows, lines = metrics.table(result)
        if missing := settings.get("missing"):
            lines.append(f"excluded: {counted(missing, 'clip')} without features")
        head = f"Scores of these weights for {settings['style']} captions of the {settings['split']} split:"
    except (UserError, KeyError, TypeError, ValueError, AttributeError):  # missing or invalid file
        return "Not evaluated."
    notes = "".join(f"- {_plain(line)}\n" for line in lines)
    return f"{_plain(head)}\n\n{_table(rows)}\n\n{notes}".rstrip()


def _recipe(run):
    """Training clips and flags from the run's args.json, or {} if it is missing or invalid."""
    names = ("epochs", "batch_size", "grad_accum", "captions_per_clip", "lr", "dropout", "seed")
    try:
        facts = read_json(run / "args.json", "arguments")
        flags = ", ".join(f"--{n.replace('_', '-')} {facts['args'][n]}" for n in names)
        return {"training clips": f"{facts['clips']:,}", "flags": flags}
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def public(key, entry):
    """The result of `hub.record` without the path of a folder, which may be private."""
    name = entry[key]
    if entry.get("hub") is True or hub.is_cached(name):
        return entry | {"hub": True}
    return entry | {key: name if hub.is_id(name) else Path(name).name}


def _model(name):
    """A Hub id unchanged, or the last part of a folder's path, because the rest may be private."""
    return name if hub.is_id(name) else f"folder {Path(name).name}"


def _table(rows):
    """A Markdown table of rows of text. The first row is the header."""
    rows = [[_plain(cell) for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text):
    """`text` on one line of at most 300 characters, with Markdown and HTML escaped."""
    text = printable(str(text)[:300], keep="")
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", text)


if __name__ == "__main__":
    cli.run(main)
