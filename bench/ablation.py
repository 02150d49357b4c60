"""Ablation on the toy world: train with one change at a time, three seeds each.

    make ablation                                           (or python -m bench.ablation)
    python -m bench.ablation --row no_positions --seed 0    (a single run, 90 s)

Takes 20 to 40 minutes on two idle cores. It can be stopped and restarted: finished runs are kept in
results/ablation_runs. Each run is a process with one thread that runs the real train.py and evaluate.py
with the demo's settings and one change: other flags, or a replacement from bench/ablation_changes.py.
Writes ablation.json, ablation.md and readme/captions_per_clip.png to --output; the table goes to stdout.
The toy world is tiny. The results do not carry over to Something-Something-V2.
"""

import runtime.start

import shlex
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.ablation_table import SCORES, draw, markdown
from bench.study import Row, Study, add_flags, validations
from dataset import VALIDATION
from runtime import cli
from runtime.errors import PARTIAL
from runtime.feature_cache import load_manifest
from runtime.files import read_json, write_atomic, write_json
from worlds import demo, shapes

# As in the demo, so that there are 250 validation clips. Training uses only --clips of them.
WORLD_CLIPS = 4000
OBJECTS = "validation_objects"
CACHES = {"features": "", "features_fp16": "--store fp16", "features_pool2": "--pool 2"}

ORIGINAL = "--captions-per-clip 1 --epochs 9 --clip-grad 1e9"

ROWS = {
    "base": Row("base: K = 2, 7 passes"),
    "k1": Row("K = 1, 9 passes (equal seconds)", "--captions-per-clip 1 --epochs 9"),
    "k4": Row("K = 4, 5 passes (equal seconds)", "--captions-per-clip 4 --epochs 5"),
    "k2_passes5": Row("K = 2, 5 passes (as K = 4)", "--epochs 5"),
    "k1_passes5": Row("K = 1, 5 passes (as K = 4)", "--captions-per-clip 1 --epochs 5"),
    "no_positions": Row("without positions", change="no_positions"),
    "keys_only": Row("positions on keys only", change="keys_only"),
    "no_style_prompts": Row("without style prompts", change="no_style_prompts"),
    "fp16": Row("features in fp16", features="features_fp16"),
    "pool2": Row("features pooled 2 x 2", features="features_pool2"),
    "original": Row(
        "the original's recipe, lr 1e-3",
        f"{ORIGINAL} --lr 1e-3",
        "original",
        features="features_fp16",
    ),
    "original_lr": Row(
        "the original's recipe, its lr 5e-5",
        f"{ORIGINAL} --lr 5e-5",
        "original",
        features="features_fp16",
    ),
}


# Batches have 16 clips, not 32 as in the demo, because with half the steps the score of such a short run
# depends mostly on when learning starts.
TRAINING = f"{demo.TRAINING} --epochs 7 --batch-size 16 --eval-clips 100"


def make_study(data, runs, clips, seeds):
    """Return the study of the toy world in the folder `data`, with `clips` training clips per run."""
    return Study(
        module="bench.ablation",
        rows={name: replace(row, seeds=seeds) for name, row in ROWS.items()},
        data=data,
        models=data,
        runs=runs,
        flags=(*TRAINING.split(), "--limit", str(clips)),
        splits=(VALIDATION, OBJECTS),
        options=("--data", str(data), "--runs", str(runs), "--clips", str(clips)),
    )


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/ablation", help="folder of the toy world")
    add("--runs", default="results/ablation_runs", help="parent of the run folders")
    add("--clips", type=cli.whole(64), default=1000, help="number of training clips")
    add("--seeds", type=cli.whole(1), default=3, help="number of runs per row")
    add_flags(parser, ROWS)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    study = make_study(Path(args.data), Path(args.runs), args.clips, args.seeds)
    study = replace(study, device=args.device)
    if args.row:
        features = study.data / ROWS[args.row].features / "manifest.json"
        cli.existing(features, "features of the toy world", "Run python -m bench.ablation.")
        return study.run(args.row, args.seed, partial(figures, study.data))
    output = cli.output_folder(args.output, "--output")
    build_world(study.data, args.clips)
    failed = study.run_all(args.jobs)
    results = collect(study, args.clips)
    (output / "readme").mkdir(parents=True, exist_ok=True)
    write_json(output / "ablation.json", results)
    table = markdown(results)
    write_atomic(output / "ablation.md", table)
    print(table)
    draw(results, output / "readme" / "captions_per_clip.png")
    return PARTIAL if failed else None


def build_world(data, clips):
    """Make the toy world, its annotations and its feature caches with the real scripts."""
    data = shlex.quote(str(data))
    demo.shell(f"-m worlds.toy_ssv2 {data} --clips {WORLD_CLIPS}")
    demo.shell(
        f"prepare_annotations.py --labels {data}/labels --paraphrases {data}/paraphrases"
        f" --output {data}/annotations"
    )
    for cache, flags in CACHES.items():
        demo.shell(
            f"preprocess_ssv2.py --videos {data}/videos --encoder {data}/encoder --num-frames 16"
            f" --annotations {data}/annotations --features {data}/{cache} --limit {clips}"
            f" --split train validation {OBJECTS} --workers 2 --device cpu {flags}"
        )


def figures(data, folder, seconds):
    """Collect the figures of a finished run. seconds: its processor time of training."""
    scores = read_json(folder / f"evaluation_{VALIDATION}.json", "scores")["metrics"]
    objects = read_json(folder / f"evaluation_{OBJECTS}.json", "scores")["metrics"]
    curve = validations(folder)
    return {
        "cider": scores["CIDEr"],
        "cider_objects": objects["CIDEr"],
        "template_accuracy": scores["template_accuracy"],
        "exact_match": scores["exact_match"],
        "right": share_right(data, folder / f"predictions_{VALIDATION}.json"),
        "seconds": seconds,
        "parameters": read_json(folder / "args.json", "args")["trainable_parameters"],
        "curve": [
            {
                "seconds": round(seconds * point["step"] / curve[-1]["step"], 1),
                "loss": point["loss"],
                "cider": point["metrics"]["CIDEr"],
            }
            for point in curve
        ],
    }


def share_right(data, predictions):
    """Compute the share of captions that equal the clip's label or one of its sentences."""
    world = read_json(data / "toy.json", "toy world")
    clips = {c["id"]: c for c in shapes.plan(world["clips"], world["seed"])}

    def is_right(clip, caption):
        return caption in (shapes.label_of(clip), *shapes.sentences_of(clip))

    captions = read_json(predictions, "predictions")
    return statistics.fmean(is_right(clips[c["image_id"]], c["caption"]) for c in captions)


def collect(study, clips):
    """Collect the contents of ablation.json."""
    rows = {}
    for name, row, runs in study.results():
        settings = load_manifest(study.data / row.features).settings
        numbers = settings.num_tokens * settings.width
        rows[name] = {
            "text": row.text,
            "flags": row.flags,
            "change": row.change,
            "parameters": runs[0]["parameters"],
            "bytes_per_clip": numbers * {"int8": 1, "fp16": 2}[settings.store],
            "runs": [{k: run[k] for k in ("seed", *SCORES, "seconds", "curve")} for run in runs],
        }
    return {"clips": clips, **study.provenance(), "rows": rows}


if __name__ == "__main__":
    cli.run(main)
