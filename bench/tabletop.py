"""Train on the tabletop world with one change at a time: controls and settings.

    python -m bench.tabletop                            (about 8 CPU-hours, two runs at a time)
    python -m bench.tabletop --row queries8 --seed 0    (a single run, about 15 CPU-minutes)

Needs the models, clips and features of `make tabletop` and the result of bench/free_prompts.py. It can be
stopped and restarted: finished runs are kept in --runs. Each run trains on the first 1,000 clips for 625
steps with train.py. Its settings are the demo's, with twice the learning rate and one change: other
flags, another language model or encoder, or a replacement from bench/ablation_changes.py. Writes
tabletop_runs.json and tabletop.md to --output.
"""

import runtime.start

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MobileNetV2Config, MobileNetV2Model

import video
from bench.study import Row, Study, add_flags, validations
from bench.tabletop_table import markdown
from encoder import transform
from runtime import cli
from runtime.errors import PARTIAL
from runtime.files import read_json, write_atomic, write_json
from runtime.names import list_files
from worlds import tabletop_demo
from worlds.demo import shell
from worlds.pretrained_models import SIZE

CLIPS, EPOCHS = 1000, 5  # 125 steps of 8 clips per epoch
LR = "1e-3"  # twice that of `make tabletop`, which takes five times as many steps
METRICS = ("CIDEr", "template_accuracy", "placeholder_match", "exact_match")

CONTROLS = {
    "base": Row("SmolLM2 and MobileNetV2 as they are", lm="smollm2"),
    "lm_random": Row("SmolLM2 with random weights", lm="smollm2_random"),
    "lm_shuffled": Row("SmolLM2 with shuffled layers", lm="smollm2_shuffled"),
    "encoder_random": Row(
        "MobileNetV2 with random weights", lm="smollm2", features="features_random"
    ),
}
decision = partial(Row, lm="smollm2", seeds=1)
sentences = partial(decision, annotations="annotations_sentences")
DECISIONS = {
    "lr_3e-4": decision("learning rate 3e-4", "--lr 3e-4"),
    "lr_6e-4": decision("learning rate 6e-4", "--lr 6e-4"),
    "lr_2e-3": decision("learning rate 2e-3", "--lr 2e-3"),
    "batch16": decision("16 clips per step, half the steps", "--batch-size 16"),
    "no_gain": decision("soft prompts start at the norm of a LayerNorm", change="no_gain"),
    "no_standardisation": decision("features not standardised", change="no_standardisation"),
    "k2": sentences("label + 1 sentence (K = 2)", "--captions-per-clip 2"),
    "k2_passes3": sentences("K = 2, 3 passes", "--captions-per-clip 2 --epochs 3"),
    "k4_passes2": sentences("K = 4, 2 passes", "--captions-per-clip 4 --epochs 2"),
    "k2_per_caption": sentences(
        "K = 2, 3 passes, captions weighted equally",
        "--captions-per-clip 2 --epochs 3",
        "per_caption",
    ),
    "queries8": decision("8 queries", "--num-queries 8"),
    "queries64": decision("64 queries", "--num-queries 64"),
    "blocks2": decision("2 blocks", "--num-blocks 2"),
    "eot_in_front": decision("an end-of-text embedding in front", change="eot_in_front"),
    "no_positions": decision("without positions", change="no_positions"),
}
ROWS = CONTROLS | DECISIONS


def make_study(data, pretrained, runs):
    """Return the study of the tabletop world in the folder `data`."""
    flags = f"{tabletop_demo.TRAINING} --lr {LR} --epochs {EPOCHS} --limit {CLIPS} --eval-clips 100"
    return Study(
        module="bench.tabletop",
        rows=ROWS,
        data=data,
        models=pretrained,
        runs=runs,
        flags=(*flags.split(), "--dtype", tabletop_demo.default_dtype()),
        splits=tuple(tabletop_demo.SPLITS),
        options=("--data", str(data), "--pretrained", str(pretrained), "--runs", str(runs)),
    )


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/tabletop", help="folder of the tabletop world")
    add("--pretrained", default="data/pretrained", help="folder of the models")
    add("--runs", default="results/tabletop_runs", help="parent of the run folders")
    add_flags(parser, ROWS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    study = make_study(Path(args.data), Path(args.pretrained), Path(args.runs))
    study = replace(study, device=args.device)
    needed = study.data / "annotations", study.data / "features", study.models / "smollm2"
    for folder in needed:
        cli.existing(folder, "tabletop world", "Run make tabletop first.")
    if args.row:
        for folder in study.folders(args.row):
            cli.existing(folder, f"input of {args.row}", "Run python -m bench.tabletop to make it.")
        return study.run(args.row, args.seed, figures)
    output = cli.output_folder(args.output, "--output")
    demos, free = other_results(output)
    make_controls(study.data, study.models)
    failed = study.run_all(args.jobs)
    results = collect(study)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "tabletop_runs.json", results)
    text = markdown(results, demos, free)
    write_atomic(output / "tabletop.md", text.encode())
    print(text, end="")
    return PARTIAL if failed else None


# ---- models and features of the controls -------------------------------------------------------


def make_controls(data, pretrained):
    """Make the annotations with sentences, and the models and features of the controls."""
    shell(tabletop_demo.annotate(data, "annotations_sentences", sentences=True))
    source = pretrained / "smollm2"
    make_folder(pretrained / "smollm2_random", source, random_lm)
    make_folder(pretrained / "smollm2_shuffled", source, shuffled_lm)
    random = pretrained / "mobilenet_v2_random"
    clips = list_files(data / "videos", ".webm")[:16]
    frames = [frame for path in clips for frame in video.decode(path, 4).frames]
    make_folder(random, pretrained / "mobilenet_v2", partial(random_encoder, frames=frames))
    splits = ["train", *tabletop_demo.SPLITS]
    shell(tabletop_demo.encode(data, random, "features_random", splits, f"--limit {CLIPS}"))


def make_folder(folder, source, make):
    """Save the model `make(source)` and the other files of the folder `source` to a new folder."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(
        source, temporary, ignore=shutil.ignore_patterns("*.safetensors", "source.json")
    )
    torch.manual_seed(0)
    make(source).save_pretrained(temporary)
    temporary.rename(folder)


def random_lm(source):
    return AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(source))


def shuffled_lm(source):
    """Load a language model and put its layers into a random order."""
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = model.model.layers
    weights = [layer.state_dict() for layer in layers]
    copies = [{k: v.clone() for k, v in w.items()} for w in weights]
    for layer, place in zip(layers, torch.randperm(len(layers)).tolist(), strict=True):
        layer.load_state_dict(copies[place])
    return model


def random_encoder(source, frames):
    """Make a MobileNetV2 with random weights.

    Its batch normalisations use the statistics of `frames`, (H, W, 3) each. Otherwise the features would
    vanish in the deeper layers.
    """
    model = MobileNetV2Model(MobileNetV2Config.from_pretrained(source))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    with torch.no_grad():
        model.train()(transform(torch.as_tensor(np.stack(frames)), SIZE, "squash"))
    return model.eval()


# ---- runs ----------------------------------------------------------------------------------------


def figures(folder, seconds):
    """Collect the figures of a finished run. seconds: processor time of its training."""
    scores = {}
    for split in tabletop_demo.SPLITS:
        found = read_json(folder / f"evaluation_{split}.json", "scores")
        scores[split] = {k: found["metrics"].get(k) for k in METRICS}
        scores[split]["shuffled"] = found["controls"]["shuffled"]["CIDEr"]
    curve = validations(folder)
    return {
        "scores": scores,
        "steps": curve[-1]["step"],
        "seconds": seconds,
        "losses": [point["loss"] for point in curve],
        "parameters": read_json(folder / "args.json", "args")["trainable_parameters"],
    }


def collect(study):
    """Collect the contents of tabletop_runs.json."""
    keys = ("seed", "device", "scores", "steps", "seconds", "losses")
    rows = {
        name: {
            "text": row.text,
            "flags": row.flags,
            "change": row.change,
            "runs": [{k: run[k] for k in keys} for run in runs],
        }
        for name, row, runs in study.results()
    }
    args = study.args()
    return {
        "clips": CLIPS,
        "lr": args["args"]["lr"],
        **study.provenance(),
        "rows": rows,
    }


def other_results(folder):
    """Read the results of other commands that tabletop.md quotes: of `make tabletop` and of bench.free_prompts.

    Raises UserError if there is none.
    """
    hint = "Run python -m bench.free_prompts first."
    path = cli.existing(folder / "free_prompts.json", "result", hint)
    hint = "Run make tabletop first, and copy its summary.json to this name."
    cli.existing(folder / "tabletop_seed0.json", "result", hint)
    demos = [read_json(p, "summary") for p in sorted(folder.glob("tabletop_seed*.json"))]
    return demos, read_json(path, "result")


if __name__ == "__main__":
    cli.run(main)
