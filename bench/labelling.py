"""Self-training: train on a tenth of the captions, label the other clips, and train on both.

    python -m bench.labelling                      toy world, three seeds
    python -m bench.labelling --world tabletop     rendered clips, one seed

Runs the commands of docs/labelling.md and prints them. Run the same command again to continue: finished runs
are not repeated. All models of a world are trained for about as many steps. The last checkpoint is scored, so
that no checkpoint is chosen on the clips that are scored. Needs the world of make demo or make tabletop.
Writes labelling.json and labelling.md to --output.
"""

import runtime.start

import csv
import io
import os
import statistics
from pathlib import Path

from bench.labelling_table import markdown
from dataset import TRAIN, VALIDATION, by_hash, load_records
from runtime import cli
from runtime.caption_files import likeliest_captions
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance_of
from worlds import demo, tabletop_demo
from worlds.demo import shell
from worlds.tabletop_demo import cached, quoted

SHARE = 0.1  # share of the training clips that keep their captions
WORLDS = {  # data, language model, flags of train.py, passes over all training clips, splits
    "toy": (
        "data/toy",
        "data/toy/lm",
        demo.TRAINING,
        7,
        (VALIDATION, "validation_pairs", "validation_objects"),
    ),
    "tabletop": (
        "data/tabletop",
        "data/pretrained/smollm2",
        tabletop_demo.TRAINING,
        1,
        tuple(tabletop_demo.SPLITS),
    ),
}
MODELS = {
    "human": "a tenth",
    "all": "a tenth, and the model's own for the others",
    "half": "a tenth, and the likelier half of the model's own",
    "full": "all",
}
METRICS = "CIDEr", "template_accuracy", "placeholder_match", "exact_match"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--world", choices=WORLDS, default="toy", help="the world to use")
    add("--data", help="folder of the world (default: data/<world>)")
    add(
        "--lm",
        metavar="DIR",
        help="folder of the language model (default: that of the world's demo)",
    )
    add("--limit", type=cli.whole(100), help="use only N training clips")
    text = "number of runs (default: 3 on the toy world, 1 on the other)"
    add("--seeds", type=cli.whole(1), help=text)
    add("--runs", default="results/labelling_runs", help="parent of the run folders")
    add("--output", default="results", help="folder for the table")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data, lm, training, epochs, splits = WORLDS[args.world]
    data, lm = Path(args.data or data), args.lm or lm
    cli.existing(data / "features" / "manifest.json", "features", "Run make demo or make tabletop.")
    output = cli.output_folder(args.output, "--output")
    seeds, runs = args.seeds or (3 if args.world == "toy" else 1), []
    dtype = "--dtype " + ("auto" if args.world == "toy" else tabletop_demo.default_dtype())
    for seed in range(seeds):
        folder = Path(args.runs) / f"{args.world}_seed{seed}"
        flags = f"{training} --seed {seed}"
        counts = label(folder, data, lm, flags, dtype, epochs, args.limit, seed)
        for model in MODELS:
            for split in splits:
                if not (folder / model / f"evaluation_{split}_last.json").exists():
                    shell(
                        f"evaluate.py --checkpoint {quoted(folder / model / 'last.pt')} {cached(data)}"
                        f" --split {split} --no-meteor --workers 0 {dtype}"
                    )
        runs.append(counts | {"seed": seed, "scores": scores(folder, splits)})
    path = output / "labelling.json"
    results = read_json(path, "results") if path.exists() else {}
    facts = read_json(folder / "full" / "args.json", "args")
    steps = len((folder / "full" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    results[args.world] = {"steps": steps, **provenance_of(facts), "runs": runs}
    write_json(path, results)
    text = markdown(results, MODELS)
    write_atomic(output / "labelling.md", text.encode())
    print(text)


def label(folder, data, lm, training, dtype, epochs, limit, seed):
    """Train the four models of a seed. Returns the numbers of captions and the shares that are right."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {r["id"]: r for r in load_records(data / "annotations", TRAIN)[:limit]}
    order = by_hash(records, seed)
    human, rest = order[: round(SHARE * len(order))], order[round(SHARE * len(order)) :]
    held_out = load_records(data / "annotations", VALIDATION)
    for name, ids in (("human", human), ("full", order)):
        rows = [(r["video"], r["label"], VALIDATION) for r in held_out]
        rows += [(records[i]["video"], records[i]["label"], TRAIN) for i in ids]
        write_csv(folder / f"{name}.csv", rows)
    clips = folder / "clips"  # links to the other clips, for infer.py
    clips.mkdir(exist_ok=True)
    for i in rest:
        link = clips / records[i]["video"]
        if not link.is_symlink():
            link.symlink_to(os.path.abspath(data / "videos" / records[i]["video"]))

    def train(name, files, flags=""):
        annotations = folder / f"annotations_{name}"
        shell(f"prepare_annotations.py --captions {files} --output {quoted(annotations)} {flags}")
        passes = round(epochs * len(order) / len(load_records(annotations, TRAIN)))
        shell(
            f"train.py --annotations {quoted(annotations)} --features {quoted(data / 'features')}"
            f" --lm {quoted(lm)} --output {quoted(folder / name)} {training} {dtype}"
            f" --epochs {passes} --workers 0 --captions-per-clip 1 --eval-clips 50 --resume"
        )

    train("human", quoted(folder / "human.csv"))
    labelled = folder / "labelled.csv"
    shell(
        f"infer.py {quoted(clips)} --checkpoint {quoted(folder / 'human' / 'last.pt')} --scores"
        f" --output {quoted(labelled)} --skip-done --batch-size 32 {dtype}"
    )
    rows = [row for _, row in likeliest_captions(labelled)]
    right = [
        (row["score"], row["caption"] == records[Path(row["video"]).stem]["label"]) for row in rows
    ]
    median = statistics.median(score for score, _ in right)
    both = f"{quoted(folder / 'human.csv')} {quoted(labelled)}"
    train("all", both, f"--videos {quoted(clips)}")
    train("half", both, f"--videos {quoted(clips)} --min-score {median}")
    train("full", quoted(folder / "full.csv"))
    return {
        "human": len(human),
        "labelled": len(rows),
        "right": statistics.mean(ok for _, ok in right),
        "right_likelier": statistics.mean(ok for score, ok in right if score >= median),
        "right_other": statistics.mean(ok for score, ok in right if score < median),
    }


def scores(folder, splits):
    """Return {model: {split: {metric: score}}}, with the 95 % interval of CIDEr as "interval"."""
    found = {}
    for model in MODELS:
        results = {
            s: read_json(folder / model / f"evaluation_{s}_last.json", "scores") for s in splits
        }
        found[model] = {
            split: {m: r["metrics"][m] for m in METRICS} | {"interval": r["ci95"]["CIDEr"]}
            for split, r in results.items()
        }
    return found


def write_csv(path, rows):
    """Write a CSV file with the columns video, caption and split."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("video", "caption", "split"), *rows])
    write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    cli.run(main)
