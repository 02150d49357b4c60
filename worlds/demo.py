"""Run every script on the toy world: real video files, no GPU, no download.

    python -m worlds.demo                (6 to 8 minutes on two cores)

Writes summary.json, curves.png and gallery.html (a web page) to results/demo.

Every command is printed, so that it can be repeated by hand. The toy world shows that the scripts work
together and that the captions depend on the video. The scores do not carry over to
Something-Something-V2.
"""

import runtime.start

import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from runtime import cli, start
from runtime.cli import note
from runtime.errors import FAILED, Stopped, UserError
from runtime.files import read_json, write_json
from runtime.provenance import provenance_of

# A tiny model trains with fewer queries, a higher learning rate and no dropout
TRAINING = (
    "--num-queries 16 --num-blocks 1 --num-heads 4 --dropout 0 --lr 2e-3 --warmup-steps 100"
    " --batch-size 32 --grad-accum 1 --captions-per-clip 2"
)

ROWS = {
    "cider": "validation: clips never seen",
    "cider_unseen_pairs": "pairs of objects never seen together",
    "cider_unseen_objects": "objects never seen",
    "cider_sentence": "validation, sentence style",
    "cider_shuffled": "control: predictions shuffled",
    "cider_still": "control: first frame only",
    "cider_most_frequent": "control: most frequent label",
    "cider_ceiling": "ceiling: the references themselves",
    "cider_sentence_ceiling": "ceiling, sentence style",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--data", default="data/toy", help="folder of the toy world, created if missing"
    )
    parser.add_argument("--output", default="results/demo", help="run folder")
    parser.add_argument(
        "--clips", type=cli.whole(50), default=4000, help="number of training clips"
    )
    parser.add_argument(
        "--epochs", type=cli.whole(1), default=7, help="passes over the training clips"
    )
    parser.add_argument(
        "--lm-steps",
        type=cli.whole(1),
        help="pretraining steps of the toy language model (default: that of worlds.toy_ssv2)",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="seed of the world and the run")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="print a table of these summary.json files and exit",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        print(markdown(args.table))
        return
    run, seconds = Path(args.output), Counter()
    for phase, command in steps(args):
        began = time.perf_counter()
        shell(command)
        seconds[phase] += time.perf_counter() - began
    summary = summarise(run, {phase: round(taken, 1) for phase, taken in seconds.items()})
    write_json(run / "summary.json", summary)
    print(table(summary))
    note(f"wrote {run / 'summary.json'}, {run / 'curves.png'} and {run / 'gallery.html'}")
    data, output, python = shlex.quote(args.data), shlex.quote(args.output), python_command()
    app = f"{python} -m viz.app --checkpoint {output} --examples {data}/videos"
    if not find_spec("gradio"):
        app = f"{python} -m pip install -c constraints.txt -e '.[app]' && {app}"
    caption = f"{python} infer.py {data}/videos --limit 5 --checkpoint {output}"
    note(
        f"\ncaption more clips of the toy world:\n    {caption}\nthe same in a browser:\n    {app}"
    )


def python_command():
    """Return the command that starts this Python in the user's shell, which may have no active venv."""
    found = shutil.which("python")
    if found and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "python"
    path = Path(sys.executable)
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def steps(args):
    """Yield (phase, command line) in order. Each step reads the files of the ones before it."""
    data, output, seed = shlex.quote(args.data), shlex.quote(args.output), args.seed
    lm_steps = f" --lm-steps {args.lm_steps}" if args.lm_steps else ""
    annotations = f"--annotations {data}/annotations"
    cached = f"--features {data}/features {annotations}"
    still = f"--features {data}/features_still {annotations}"
    device = f"--device {shlex.quote(args.device)}"
    encode = f"preprocess_ssv2.py --videos {data}/videos --encoder {data}/encoder --num-frames 16"
    encode += f" {device}"
    score = f"evaluate.py --checkpoint {output} --workers 0 --no-meteor {device}"

    yield "world", f"-m worlds.toy_ssv2 {data} --clips {args.clips} --seed {seed}{lm_steps}"
    yield (
        "annotations",
        f"prepare_annotations.py --labels {data}/labels --paraphrases {data}/paraphrases"
        f" --output {data}/annotations",
    )
    splits = "train validation validation_pairs validation_objects"
    yield "features", f"{encode} {cached} --workers 2 --split {splits}"
    yield "features", f"{encode} {still} --workers 2 --split validation --still"
    yield (
        "training",
        f"train.py {cached} --lm {data}/lm --output {output} --overwrite --seed {seed} --workers 0"
        f" --epochs {args.epochs} {TRAINING} {device}",
    )
    yield "evaluation", f"{score} {cached} --split validation_pairs"
    yield "evaluation", f"{score} {cached} --split validation_objects"
    yield "evaluation", f"{score} {cached} --style sentence"
    yield "evaluation", f"{score} {still} --control still"
    yield "gallery", f"-m viz.gallery {output} {annotations} --videos {data}/videos"
    predictions = read_json(Path(args.output) / "predictions_validation.json", "predictions")
    clips = " ".join(f"{data}/videos/{p['image_id']}.webm" for p in predictions[:3])
    yield "captions", f"infer.py {clips} --checkpoint {output} {device}"
    yield "captions", f"infer.py {clips} --checkpoint {output} {device} --style sentence"


def shell(command):
    """Echo a command line and run it. Raises UserError if its exit code is not 0.

    If a signal stops this process, the script may save what it has before it ends.
    """
    note(f"\n$ python {command}")
    name, *args = shlex.split(command)
    name = str(start.ROOT / name) if name.endswith(".py") else name
    with subprocess.Popen([sys.executable, name, *args], env=start.environment()) as process:
        try:
            code = process.wait()
        except Stopped as stopped:
            # a terminal has sent its signals to the script, too, and a second one would kill it at once
            if stopped.args[0] == signal.SIGTERM:
                process.terminate()
            raise  # the end of the block waits for the script
    if code:
        raise UserError(f"{command} ended with exit code {code}", code=FAILED)


def summarise(run, seconds):
    """Collect the figures of a run from the files in its folder."""

    def scores(name):
        return read_json(run / f"evaluation_{name}.json", "scores")

    main, pairs, objects = (
        scores(n) for n in ("validation", "validation_pairs", "validation_objects")
    )
    sentence, still = scores("validation_sentence"), scores("validation_still")
    args = read_json(run / "args.json", "args")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": {"total": round(sum(seconds.values()), 1), **seconds},
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "cider": main["metrics"]["CIDEr"],
        "cider_unseen_pairs": pairs["metrics"]["CIDEr"],
        "cider_unseen_objects": objects["metrics"]["CIDEr"],
        "cider_sentence": sentence["metrics"]["CIDEr"],
        "cider_shuffled": main["controls"]["shuffled"]["CIDEr"],
        "cider_still": still["metrics"]["CIDEr"],
        "cider_most_frequent": main["controls"]["most_frequent"]["CIDEr"],
        "cider_ceiling": main["controls"]["ceiling"]["CIDEr"],
        "cider_sentence_ceiling": sentence["controls"]["ceiling"]["CIDEr"],
        "template_accuracy": main["metrics"]["template_accuracy"],
        "exact_match": main["metrics"]["exact_match"],
        "clips": {
            "train": args["clips"],
            "validation": main["n"],
            "validation_pairs": pairs["n"],
            "validation_objects": objects["n"],
        },
        "trainable_parameters": args["trainable_parameters"],
        "tokenizer": main["tokenizer"],
        "seed": args["args"]["seed"],
        **provenance_of(args),
    }


def table(s):
    """Format the summary for the terminal."""
    lines = [f"{name:<38} {s[key]:6.2f}" for key, name in ROWS.items()]
    return "\n".join(
        [
            f"{'toy world':<38}  CIDEr",
            *lines,
            f"template accuracy {s['template_accuracy']:.3f}, exact match {s['exact_match']:.3f},"
            f" {s['seconds']['total']:.0f} s ({s['cpu_seconds']:.0f} CPU-seconds)",
            "Synthetic clips of moving shapes: the scores do not carry over to Something-Something-V2.",
        ]
    )


def markdown(files):
    """Format the mean and range of several summaries, as in docs/evaluation.md."""
    runs = [read_json(f, "summary") for f in files]

    def cell(values, digits=2):
        mean = sum(values) / len(values)
        return f"{mean:.{digits}f} | {min(values):.{digits}f} – {max(values):.{digits}f}"

    lines = ["| toy world, CIDEr | mean | range |", "|---|---|---|"]
    lines += [f"| {name} | {cell([r[key] for r in runs])} |" for key, name in ROWS.items()]
    lines += [
        f"| template accuracy | {cell([r['template_accuracy'] for r in runs], 3)} |",
        f"| exact match | {cell([r['exact_match'] for r in runs], 3)} |",
        f"| seconds on two cores | {cell([r['seconds']['total'] for r in runs], 0)} |",
        f"| CPU-seconds | {cell([r['cpu_seconds'] for r in runs], 0)} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
