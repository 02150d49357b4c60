"""Teach a frozen pretrained language model to caption rendered household objects, with the real scripts.

    python -m worlds.tabletop_demo     (or make tabletop; about 75 minutes on two cores)

SmolLM2 and MobileNetV2 were pretrained on other data and stay frozen. Only the Q-Former is trained. Writes
summary.json, curves.png, strips.png, gallery.html and GIFs in films/ to --output. Finished parts are kept:
after an interruption, run the same command again to continue.

Every command is printed, so that it can be repeated by hand. The clips are rendered: the scores do not
carry over to Something-Something-V2.
"""

import runtime.start

import shlex
from pathlib import Path

from dataset import VALIDATION
from runtime import cli
from runtime.cli import note
from runtime.files import read_json, write_json
from runtime.provenance import provenance_of
from worlds.demo import shell

# Fewer queries and a higher learning rate than for Qwen2-1.5B, whose width is 1536 instead of 576
TRAINING = (
    "--num-queries 16 --num-blocks 1 --num-heads 4 --dropout 0 --lr 5e-4 --warmup-steps 100"
    " --batch-size 8 --grad-accum 1 --captions-per-clip 1"
)
PROBE = "--epochs 4 --lr 1e-3 --weight-decay 0.05 --warmup-steps 100 --batch-size 16 --workers 0 --resume"
FRAMES = 8
SPLITS = {
    VALIDATION: "clips never seen",
    "validation_pairs": "objects never seen together",
    "validation_objects": "objects never seen",
    "validation_background": "tables and walls never seen",
}
STILL = f"{VALIDATION}_still"
SCORES = {
    "CIDEr": "CIDEr",
    "template_accuracy": "template",
    "placeholder_match": "objects",
    "exact_match": "exact match",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/tabletop", help="folder of the tabletop world")
    add("--pretrained", default="data/pretrained", help="folder of the models")
    add("--output", default="results/tabletop", help="run folder")
    add("--clips", type=cli.whole(50), default=6000, help="number of training clips")
    add("--epochs", type=cli.whole(1), default=4, help="passes over the clips")
    add("--seed", type=cli.seed, default=0, help="seed of the world and the run")
    text = "auto: bfloat16 if the processor supports it, else float32, which takes twice as long"
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=text)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    dtype = default_dtype() if args.dtype == "auto" else args.dtype
    run = cli.output_folder(args.output, "--output")
    for command in prepare(args.data, args.pretrained, args.clips, args.seed):
        shell(command)
    lm = f"--lm {shlex.quote(args.pretrained)}/smollm2"
    flags = f"--epochs {args.epochs} --seed {args.seed} --dtype {dtype}"
    shell(f"train.py {cached(args.data)} {lm} --output {quoted(run)} {TRAINING} {flags} --resume")
    shell(
        f"probe.py {cached(args.data)} --output {quoted(run / 'probe')} {PROBE} --seed {args.seed}"
    )
    for name, command in evaluations(run, args.data, dtype).items():
        if is_newer(run / f"evaluation_{name}.json", run / "best.pt"):
            note(f"\nkept {run / f'evaluation_{name}.json'}")
        else:
            shell(command)
    for command in pictures(run, args.data):
        shell(command)
    summary = summarise(run)
    write_json(run / "summary.json", summary)
    print(table(summary))
    note(f"wrote {run / 'summary.json'}, {run / 'strips.png'} and {run / 'gallery.html'}")


def quoted(path):
    return shlex.quote(str(path))


def cached(data, features="features"):
    """Return the flags for the annotations and the features of the world."""
    return f"--annotations {quoted(data)}/annotations --features {quoted(data)}/{features}"


def prepare(data, pretrained, clips, seed):
    """Yield the command lines that fetch the models, render the clips and encode them."""
    yield f"-m worlds.pretrained --output {quoted(pretrained)}"
    yield f"-m worlds.tabletop {quoted(data)} --clips {clips} --seed {seed}"
    yield annotate(data, "annotations")
    encoder, splits = Path(pretrained) / "mobilenet_v2", ["train", *SPLITS]
    yield encode(data, encoder, "features", splits)
    yield encode(data, encoder, "features_still", [VALIDATION], "--still")


def annotate(data, annotations, sentences=False):
    """Return the command line that writes the annotations of the world to a folder in `data`.

    By default they contain labels only: at equal processor time, training on labels and sentences gives
    lower scores.
    """
    paraphrases = f" --paraphrases {quoted(data)}/paraphrases" if sentences else ""
    output = f"{quoted(data)}/{annotations}"
    return f"prepare_annotations.py --labels {quoted(data)}/labels{paraphrases} --output {output}"


def encode(data, encoder, features, splits, flags=""):
    """Return the command line that encodes splits of the world into a cache, a folder in `data`."""
    return (
        f"preprocess_ssv2.py --videos {quoted(data)}/videos --encoder {quoted(encoder)}"
        f" --num-frames {FRAMES} {cached(data, features)} --split {' '.join(splits)} --workers 2 {flags}"
    )


def evaluations(run, data, dtype):
    """Return {name of the result: command line} for all splits, and for the first-frame control."""
    score = f"evaluate.py --checkpoint {quoted(run)} --no-meteor --dtype {dtype} --workers 0"
    commands = {split: f"{score} {cached(data)} --split {split}" for split in SPLITS}
    return commands | {STILL: f"{score} {cached(data, 'features_still')} --control still"}


def pictures(run, data):
    """Yield the command lines for a picture of captioned clips, a web page of all clips, and GIFs."""
    places = f"--annotations {quoted(data)}/annotations --videos {quoted(data)}/videos"
    predictions = quoted(run / f"predictions_{VALIDATION}.json")
    strips = f"--num-samples 6 --output {quoted(run / 'strips.png')}"
    yield f"-m viz.strips --predictions {predictions} {places} {strips}"
    yield f"-m viz.gallery {quoted(run)} {places}"
    films = quoted(run / "films")
    yield f"infer.py --checkpoint {quoted(run)} --num-samples 6 {places} --output {films} --overwrite"
    yield f"-m viz.films {films}/captions.jsonl {places}"


def default_dtype():
    """Return "bfloat16" if the processor multiplies in bfloat16, else "float32"."""
    path = Path("/proc/cpuinfo")
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    return "bfloat16" if "bf16" in known else "float32"


def is_newer(path, other):
    return path.exists() and path.stat().st_mtime > other.stat().st_mtime


def summarise(run):
    """Collect the scores of a run from the files in its folder."""
    results = {
        name: read_json(run / f"evaluation_{name}.json", "scores") for name in [*SPLITS, STILL]
    }
    controls = results[VALIDATION]["controls"]
    args = read_json(run / "args.json", "args")
    probe = read_json(run / "probe" / f"evaluation_{VALIDATION}.json", "scores")
    return {
        "scores": {
            name: {key: result["metrics"].get(key) for key in SCORES} | {"n": result["n"]}
            for name, result in results.items()
        },
        "controls": {name: scores["CIDEr"] for name, scores in controls.items()},
        "probe": probe["metrics"]["top1"],
        "trainable_parameters": args["trainable_parameters"],
        "clips": args["clips"],
        "seed": args["args"]["seed"],
        **provenance_of(args),
    }


def table(summary):
    """Format the summary for the terminal."""
    lines = [f"{'tabletop world':<34}" + "".join(f"{text:>13}" for text in SCORES.values())]
    rows = SPLITS | {STILL: "control: first frame only"}
    for name, text in rows.items():
        values = [summary["scores"][name][key] for key in SCORES]
        cells = [f"{'':>13}" if v is None else f"{v:13.2f}" for v in values]
        lines.append(f"{text:<34}" + "".join(cells))
    for name, text in (("shuffled", "shuffled"), ("most_frequent", "most frequent label")):
        lines.append(f"control: {text:<25}{summary['controls'][name]:13.2f}")
    lines.append(f"{'probe on the same features':<47}{summary['probe']:13.2f}")
    lines.append("Rendered clips: the scores do not carry over to Something-Something-V2.")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
