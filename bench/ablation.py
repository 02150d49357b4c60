"""What each choice is worth: training on the toy world with one thing changed at a time, three seeds.

    make ablation                                     (or python -m bench.ablation --jobs 2)
    python -m bench.ablation --row no_positions --seed 0    (one run again, 90 s)

About 40 minutes on two idle cores: run it in the background. It can be stopped at any time and
started again; finished runs are kept, in results/ablation_runs. Every run is the real train.py and
evaluate.py in a process of its own, on one thread, with the demo's settings and one change: other flags,
or a few lines of bench/ablation_changes.py in place of the product's. Writes ablation.json, ablation.md and
readme/captions_per_clip.png under --output; the table goes to stdout.
The toy world is tiny: no claim about Something-Something-V2.
"""

import runtime.start
from runtime.start import environment

import math
import shlex
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import evaluate
import train
from bench.ablation_changes import changed
from bench.ablation_table import SCORES, cpu, draw, markdown
from dataset import load_manifest
from runtime import cli, run_folder
from runtime.errors import FAILED, PARTIAL, UserError
from runtime.files import read_json, write_atomic, write_json
from worlds import demo, shapes

WORLD_CLIPS = 4000  # the demo's world, so that validation has 250 clips; training sees --clips
OBJECTS = "validation_objects"
CACHES = {"features": "", "features_fp16": "--store fp16", "features_pool2": "--pool 2"}

ORIGINAL = "--captions-per-clip 1 --epochs 9 --clip-grad 1e9"

# text: what the table calls it; flags: of train.py, on top of the base's; change: in bench/ablation_changes.py
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


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--data", default="data/ablation", help="folder of the toy world")
    parser.add_argument("--runs", default="results/ablation_runs", help="folder of the run folders")
    parser.add_argument("--output", default="results", help="folder of the table and the figure")
    parser.add_argument("--clips", type=cli.whole(64), default=1000, help="training clips")
    parser.add_argument("--seeds", type=cli.whole(1), default=3, help="runs of each row")
    parser.add_argument("--jobs", type=cli.whole(1), default=2, help="runs at a time")
    parser.add_argument("--row", choices=ROWS, help="this one run only, no table")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="seed of that run")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.row:
        return run_row(args)
    output = cli.output_folder(args.output, "--output")
    build_world(args)
    failed = run_all(args)
    results = collect(args)
    (output / "readme").mkdir(parents=True, exist_ok=True)
    write_json(output / "ablation.json", results)
    table = markdown(results)
    write_atomic(output / "ablation.md", table)
    print(table)
    draw(results, output / "readme" / "captions_per_clip.png")
    return PARTIAL if failed else None


def build_world(args):
    """The toy world, its annotations and three feature caches, by the real scripts; what is there is kept."""
    data = shlex.quote(args.data)
    demo.shell(f"-m worlds.toy_ssv2 {data} --clips {WORLD_CLIPS}")
    demo.shell(
        f"prepare_annotations.py --labels {data}/labels --paraphrases {data}/paraphrases"
        f" --output {data}/annotations"
    )
    for cache, flags in CACHES.items():
        demo.shell(
            f"preprocess_ssv2.py --videos {data}/videos --encoder {data}/encoder --num-frames 16"
            f" --annotations {data}/annotations --features {data}/{cache} --limit {args.clips}"
            f" --splits train validation {OBJECTS} --workers 2 --device cpu {flags}"
        )


# ---- the runs ------------------------------------------------------------------------------


def folder_of(args, name, seed):
    return Path(args.runs) / f"{name}_seed{seed}"


def flags_of(args, name, seed):
    """The flags of train.py for one run.

    A ninth of the steps is warm-up, as in the demo. Batches of 16 clips, not the demo's 32: training
    is short, and with half the steps what counts is mostly who gets off the ground first.
    """
    row = ROWS[name]
    flags = shlex.split(
        f"--features {shlex.quote(args.data)}/{row.cache} {demo.TRAINING} --epochs 7 {row.flags}"
        " --batch-size 16 --eval-clips 100 --no-meteor --workers 0 --device cpu --overwrite"
    )
    flags += ["--annotations", f"{args.data}/annotations", "--lm", f"{args.data}/lm"]
    flags += ["--output", str(folder_of(args, name, seed)), "--limit", str(args.clips)]
    known = train.parse_args(flags)
    steps = known.epochs * math.ceil(args.clips / (known.batch_size * known.grad_accum))
    return [*flags, "--warmup-steps", str(steps // 9), "--seed", str(seed)]


def run_row(args):
    """One run in this process: change the code, train, score, and write result.json."""
    row, folder = ROWS[args.row], folder_of(args, args.row, args.seed)
    cached = Path(args.data) / row.cache
    cli.existing(
        cached / "manifest.json", "the toy world's features", "Run bench/ablation.py first."
    )
    flags = flags_of(args, args.row, args.seed)
    (folder / "result.json").unlink(missing_ok=True)

    torch.set_num_threads(1)
    with changed(row.change), cpu_seconds() as steps:
        if code := train.main(flags):
            return code  # stopped
        score = ["--checkpoint", str(folder), "--features", str(cached), "--workers", "0"]
        score += ["--annotations", f"{args.data}/annotations", "--device", "cpu", "--no-meteor"]
        evaluate.main([*score, "--split", OBJECTS])
    result = measure(args, folder, statistics.median(steps))
    write_json(folder / "result.json", {"seed": args.seed, **result, "flags": flags})


@contextmanager
def cpu_seconds():
    """A list that gets the processor time of each training step, which other load cannot stretch."""
    seconds, log = [], run_folder.Log.step

    def step(self, number, *rest):
        seconds.append(time.process_time() - began[0])
        log(self, number, *rest)
        began[0] = time.process_time()

    began = [time.process_time()]
    with mock.patch.object(run_folder.Log, "step", step):
        yield seconds


def measure(args, folder, step):
    """The figures of a finished run whose median step took `step` seconds."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    facts = read_json(folder / "args.json", "args")
    scores = read_json(folder / "evaluation_validation.json", "scores")["metrics"]
    objects = read_json(folder / f"evaluation_{OBJECTS}.json", "scores")["metrics"]
    epochs = sorted(folder.glob("validation_epoch_*.json"), key=lambda p: int(p.stem.split("_")[2]))
    curve = [read_json(path, "epoch") for path in epochs]
    return {
        "cider": scores["CIDEr"],
        "cider_objects": objects["CIDEr"],
        "template_accuracy": scores["template_accuracy"],
        "exact_match": scores["exact_match"],
        "right": either_style(args, folder / "predictions_validation.json"),
        "seconds": round(step * len(lines), 1),
        "parameters": facts["trainable_parameters"],
        "curve": [
            {
                "seconds": round(step * point["step"], 1),
                "loss": point["loss"],
                "cider": point["metrics"]["CIDEr"],
            }
            for point in curve
        ],
    }


def either_style(args, predictions):
    """The share of clips whose caption is their label, or any sentence that the toy world has for them."""
    world = read_json(Path(args.data) / "toy.json", "toy world")
    clips = {c["id"]: c for c in shapes.plan(world["clips"], world["seed"])}
    said = read_json(predictions, "predictions")
    return statistics.fmean(
        c["caption"] in (shapes.label_of(clip), *shapes.sentences_of(clip))
        for c in said
        for clip in [clips[c["image_id"]]]
    )


def finished(args, name, seed):
    """The result of a run with these very flags, or None."""
    path = folder_of(args, name, seed) / "result.json"
    result = read_json(path, "result") if path.is_file() else {}
    return result if result.get("flags") == flags_of(args, name, seed) else None


def run_all(args):
    """Start the runs that lack a result, --jobs at a time. Returns the names of those that failed."""
    every = [(name, seed) for seed in range(args.seeds) for name in ROWS]
    waiting = [run for run in every if not finished(args, *run)]
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    running, failed = {}, []
    with tqdm(total=len(every), initial=len(every) - len(waiting), unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    run = waiting.pop(0)
                    running[run] = start(args, *run)
                time.sleep(0.2)
                for name, seed in [
                    r for r, process in running.items() if process.poll() is not None
                ]:
                    if code := running.pop((name, seed)).returncode:
                        log = folder_of(args, name, seed).with_suffix(".log")
                        bar.write(f"{name}, seed {seed}: exit code {code}, see {log}", sys.stderr)
                        failed.append(name)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    return failed


def start(args, name, seed):
    """One run in a process of its own, its output in a log beside the run folder."""
    command = [sys.executable, "-m", "bench.ablation", "--row", name, "--seed", str(seed)]
    command += ["--data", args.data, "--runs", args.runs, "--clips", str(args.clips)]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(folder_of(args, name, seed).with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment() | one)


def collect(args):
    """All that the table and the figure show. Raises UserError if no run of the base is finished."""
    rows = {}
    for name, row in ROWS.items():
        runs = [result for seed in range(args.seeds) if (result := finished(args, name, seed))]
        if runs:
            settings = load_manifest(Path(args.data) / row.cache)["settings"]
            tokens = settings.num_tokens * settings.width
            rows[name] = {
                "text": row.text,
                "flags": row.flags,
                "change": row.change,
                "parameters": runs[0]["parameters"],
                "bytes_per_clip": tokens * {"int8": 1, "fp16": 2}[settings.store],
                "runs": [
                    {k: run[k] for k in ("seed", *SCORES, "seconds", "curve")} for run in runs
                ],
            }
    if "base" not in rows:
        raise UserError(f"no run of the base is finished in {args.runs}", code=FAILED)
    facts = read_json(
        folder_of(args, "base", rows["base"]["runs"][0]["seed"]) / "args.json", "args"
    )
    return {"clips": args.clips, "cpu": cpu(), "versions": facts["versions"], "rows": rows}


if __name__ == "__main__":
    cli.run(main)
