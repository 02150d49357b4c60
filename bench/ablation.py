"""Ablation on the toy world: train with one change at a time, three seeds each.

    make ablation                                           (or python -m bench.ablation)
    python -m bench.ablation --row no_positions --seed 0    (a single run, 90 s)

Takes 40 minutes on two idle cores. It can be stopped and restarted: finished runs are kept in
results/ablation_runs. Each run is a process with one thread that runs the real train.py and evaluate.py
with the demo's settings and one change: other flags, or a replacement from bench/ablation_changes.py.
Writes ablation.json, ablation.md and readme/captions_per_clip.png to --output; the table goes to stdout.
The toy world is tiny. The results do not carry over to Something-Something-V2.
"""

import runtime.start

import math
import shlex
import statistics
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import train
from bench.ablation_changes import changed
from bench.ablation_table import SCORES, cpu, draw, markdown
from bench.jobs import run_commands, step_times
from feature_cache import load_manifest
from runtime import cli, hub
from runtime.errors import FAILED, PARTIAL, UserError
from runtime.files import read_json, write_atomic, write_json
from worlds import demo, shapes

# As in the demo, so that there are 250 validation clips. Training uses only --clips of them.
WORLD_CLIPS = 4000
OBJECTS = "validation_objects"
CACHES = {"features": "", "features_fp16": "--store fp16", "features_pool2": "--pool 2"}

ORIGINAL = "--captions-per-clip 1 --epochs 9 --clip-grad 1e9"

# text: title of the row. flags: of train.py, appended to the base's. change: in bench/ablation_changes.py.
Row = namedtuple("Row", "text flags change cache", defaults=("", None, "features"))
ROWS = {
    "base": Row("base: K = 2, 7 passes"),
    "k1": Row("K = 1, 9 passes (equal seconds)", "--captions-per-clip 1 --epochs 9"),
    "k4": Row("K = 4, 5 passes (equal seconds)", "--captions-per-clip 4 --epochs 5"),
    "k2_passes5": Row("K = 2, 5 passes (as K = 4)", "--epochs 5"),
    "k1_passes5": Row("K = 1, 5 passes (as K = 4)", "--captions-per-clip 1 --epochs 5"),
    "no_positions": Row("without positions", change="no_positions"),
    "keys_only": Row("positions on keys only", change="keys_only"),
    "no_standardisation": Row("without standardisation", change="no_standardisation"),
    "no_gain": Row("output gain that starts at 1", change="no_gain"),
    "no_style_prompts": Row("without style prompts", change="no_style_prompts"),
    "fp16": Row("features in fp16", cache="features_fp16"),
    "pool2": Row("features pooled 2 x 2", cache="features_pool2"),
    "queries64": Row("64 queries", "--num-queries 64"),
    "blocks2": Row("2 blocks", "--num-blocks 2"),
    "original": Row(
        "the original's recipe, lr 1e-3", f"{ORIGINAL} --lr 1e-3", "original", "features_fp16"
    ),
    "original_lr": Row(
        "the original's recipe, its lr 5e-5", f"{ORIGINAL} --lr 5e-5", "original", "features_fp16"
    ),
}


@dataclass(frozen=True)
class Study:
    """The folders and the size of an ablation."""

    data: Path  # the toy world
    runs: Path  # parent of the run folders
    clips: int  # training clips
    seeds: int  # runs per row

    def folder(self, name, seed):
        return self.runs / f"{name}_seed{seed}"

    def flags(self, name, seed):
        """Return the flags of train.py for one run.

        One ninth of the steps is warm-up, as in the demo. Batches have 16 clips, not 32 as in the demo,
        because with half the steps the score of such a short run depends mostly on when learning starts.
        """
        row = ROWS[name]
        flags = shlex.split(
            f"{demo.TRAINING} --epochs 7 {row.flags} --batch-size 16 --eval-clips 100 --no-meteor"
            " --workers 0 --device cpu --overwrite"
        )
        flags += ["--features", str(self.data / row.cache), "--lm", str(self.data / "lm")]
        flags += ["--annotations", str(self.data / "annotations"), "--limit", str(self.clips)]
        flags += ["--output", str(self.folder(name, seed))]
        parsed = train.parse_args(flags)
        steps = parsed.epochs * math.ceil(self.clips / (parsed.batch_size * parsed.grad_accum))
        return [*flags, "--warmup-steps", str(steps // 9), "--seed", str(seed)]

    def inputs(self, name, seed):
        """Return what the result of a run depends on, apart from the code."""
        settings = load_manifest(self.data / ROWS[name].cache).settings
        return {
            "flags": self.flags(name, seed),
            "change": ROWS[name].change,
            "models": [settings.encoder_fingerprint, hub.fingerprint(self.data / "lm")],
        }

    def result(self, name, seed):
        """Return the result of a run with exactly these inputs, or None.

        Older results have only the flags.
        """
        path = self.folder(name, seed) / "result.json"
        result = read_json(path, "result") if path.is_file() else {}
        inputs = self.inputs(name, seed) if "flags" in result else {}
        same = inputs and all(result.get(key, value) == value for key, value in inputs.items())
        return result if same else None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", metavar="DIR", default="data/ablation", help="folder of the toy world"
    )
    parser.add_argument(
        "--runs", metavar="DIR", default="results/ablation_runs", help="folder for the run folders"
    )
    parser.add_argument(
        "--output", metavar="DIR", default="results", help="folder for the table and figure"
    )
    parser.add_argument(
        "--clips", metavar="N", type=cli.whole(64), default=1000, help="number of training clips"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=cli.whole(1), default=3, help="number of runs per row"
    )
    parser.add_argument(
        "--jobs", metavar="N", type=cli.whole(1), default=2, help="number of runs in parallel"
    )
    parser.add_argument(
        "--row",
        metavar="NAME",
        choices=ROWS,
        help=f"run only this row, with --seed: {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--seed", metavar="N", type=cli.whole(0), default=0, help="seed of the run of --row"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    study = Study(Path(args.data), Path(args.runs), args.clips, args.seeds)
    if args.row:
        return run_row(study, args.row, args.seed)
    output = cli.output_folder(args.output, "--output")
    build_world(study.data, study.clips)
    failed = run_all(study, args.jobs)
    results = collect(study)
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
            f" --splits train validation {OBJECTS} --workers 2 --device cpu {flags}"
        )


# ---- one run -------------------------------------------------------------------------------------


def run_row(study, name, seed):
    """Apply the change to the code, train, score and write result.json, all in this process."""
    folder, features = study.folder(name, seed), study.data / ROWS[name].cache
    cli.existing(
        features / "manifest.json", "features of the toy world", "Run python -m bench.ablation."
    )
    flags = study.flags(name, seed)
    (folder / "result.json").unlink(missing_ok=True)

    torch.set_num_threads(1)
    with changed(ROWS[name].change), step_times() as seconds:
        if code := train.main(flags):
            return code  # stopped by a signal
        score = ["--checkpoint", str(folder), "--features", str(features), "--split", OBJECTS]
        score += ["--annotations", str(study.data / "annotations"), "--no-meteor"]
        evaluate.main([*score, "--workers", "0", "--device", "cpu"])
    result = read_run(folder, statistics.median(seconds))
    result["right"] = share_right(study.data, folder / "predictions_validation.json")
    write_json(folder / "result.json", {"seed": seed, **result, **study.inputs(name, seed)})


def read_run(folder, step_seconds):
    """Collect the figures of a finished run. step_seconds: its median time per step."""
    steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    facts = read_json(folder / "args.json", "args")
    scores = read_json(folder / "evaluation_validation.json", "scores")["metrics"]
    objects = read_json(folder / f"evaluation_{OBJECTS}.json", "scores")["metrics"]
    epochs = sorted(folder.glob("validation_epoch_*.json"), key=lambda p: int(p.stem.split("_")[2]))
    curve = [read_json(path, "validation of an epoch") for path in epochs]
    return {
        "cider": scores["CIDEr"],
        "cider_objects": objects["CIDEr"],
        "template_accuracy": scores["template_accuracy"],
        "exact_match": scores["exact_match"],
        "seconds": round(step_seconds * steps, 1),
        "parameters": facts["trainable_parameters"],
        "curve": [
            {
                "seconds": round(step_seconds * point["step"], 1),
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


# ---- all runs ------------------------------------------------------------------------------------


def run_all(study, jobs):
    """Start all unfinished runs, `jobs` at a time. Returns the names of those that failed."""
    every = [(name, seed) for seed in range(study.seeds) for name in ROWS]
    waiting = [run for run in every if not study.result(*run)]
    study.runs.mkdir(parents=True, exist_ok=True)
    commands, logs = {}, {}
    for name, seed in waiting:
        run = f"{name}, seed {seed}"
        commands[run] = ["-m", "bench.ablation", "--row", name, "--seed", str(seed)]
        commands[run] += ["--data", str(study.data), "--runs", str(study.runs)]
        commands[run] += ["--clips", str(study.clips)]
        logs[run] = study.folder(name, seed).with_suffix(".log")
    return run_commands(commands, logs, len(every) - len(waiting), jobs)


def collect(study):
    """Collect the contents of ablation.json. Raises UserError if no run of the base is finished."""
    rows = {}
    for name, row in ROWS.items():
        runs = [study.result(name, seed) for seed in range(study.seeds)]
        if runs := [run for run in runs if run]:
            settings = load_manifest(study.data / row.cache).settings
            numbers = settings.num_tokens * settings.width
            rows[name] = {
                "text": row.text,
                "flags": row.flags,
                "change": row.change,
                "parameters": runs[0]["parameters"],
                "bytes_per_clip": numbers * {"int8": 1, "fp16": 2}[settings.store],
                "runs": [
                    {k: run[k] for k in ("seed", *SCORES, "seconds", "curve")} for run in runs
                ],
            }
    if "base" not in rows:
        raise UserError(f"no run of the base is finished in {study.runs}", code=FAILED)
    folder = study.folder("base", rows["base"]["runs"][0]["seed"])
    versions = read_json(folder / "args.json", "args")["versions"]
    return {"clips": study.clips, "cpu": cpu(), "versions": versions, "rows": rows}


if __name__ == "__main__":
    cli.run(main)
