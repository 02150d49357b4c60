"""Recognise actions in the toy Charades, in whole videos and in windows. Writes charades.json and charades.md.

    python -m worlds.toy_ssv2 data/toy
    python -m worlds.toy_charades data/toy data/charades --videos 800 --test-videos 250
    python -m research.charades_report --data data/toy --charades data/charades

About six CPU-minutes. The caches and probes are in --charades.
"""

import runtime.start

from pathlib import Path

import numpy as np

import heads
from dataset import TEST, load_records
from research.probe_report import shell
from runtime import cli, run_folder
from runtime.charades import SPLITS
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance

TRAINING = (
    "--num-heads 4 --epochs 20 --batch-size 32 --lr 3e-3 1e-3 --weight-decay 0.05 --warmup-steps 50"
)
RUNS = {
    "whole videos": "",
    "windows of 2 s without overlap": "--window 2",
    "windows of 2 s, one per second": "--window 2 --stride 1",
}
COMMANDS = [
    "python -m worlds.toy_ssv2 data/toy",
    "python -m worlds.toy_charades data/toy data/charades --videos 800 --test-videos 250",
    "python -m research.charades_report --data data/toy --charades data/charades",
]
CONTROLS = {
    "majority": "class frequencies",
    "windows": "number of windows",
    "shuffled_labels": "shuffled labels",
}
METRICS = {"mAP": "mAP", "wAP": "weighted", "mAP_official": "mAP, official rule"}
NOTE = """
This is a synthetic data set: `worlds/toy_charades.py` joins clips of coloured shapes in Charades' file layout.
The encoder is a tiny V-JEPA 2 with random weights. The scores show that import, windows, features, probe and
scoring work together; they say nothing about the mAP on Charades, and must not be compared with published
ones. Each row is one training run with one seed on {train} videos, of which a tenth is held out twice: once for
validation, which is not used here, and once to choose head and epoch. The {test} test videos choose nothing.
A window has one sixteenth of its length between frames, so in a whole video the motion is sampled more
sparsely. Without overlap there are fewer training records at an equal number of epochs, so that the probe
also takes fewer steps: the difference between the rows is not due to the overlap alone.
In windows, shuffled labels score above the class frequencies. So does the number of windows alone: longer
videos have more actions, and the maximum over more windows tends to be higher.
"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/toy", help="the toy world, whose encoder is used")
    add("--charades", default="data/charades", help="folder of worlds.toy_charades")
    add("--output", default="results", help="folder for charades.json and charades.md")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    root, output = Path(args.charades), cli.output_folder(args.output, "--output")
    hint = "Run python -m worlds.toy_charades first."
    world = read_json(cli.existing(root / "toy.json", "--charades", hint), "toy world")
    runs = {name: measure(root, Path(args.data), name) for name in RUNS}
    value = {"synthetic": True, "commands": COMMANDS, "world": world, "training": TRAINING}
    output.mkdir(parents=True, exist_ok=True)
    text = markdown(runs, world["videos"])
    write_json(output / "charades.json", provenance() | value | {"records": RUNS, "runs": runs})
    write_atomic(output / "charades.md", text.encode())
    print(text, end="")


def measure(root, data, name):
    """Import, encode, train and score one kind of record. Returns its scores and controls."""
    folder = name.replace(",", "").replace(" ", "_")
    annotations, probe = root / "annotations" / folder, root / "probes" / folder
    given = ["--annotations", annotations, "--features", root / "features", "--device", "cpu"]
    shell(
        *("prepare_annotations.py", "--charades", root, *RUNS[name].split()),
        *("--output", annotations),
    )
    # a cache for all kinds: a window is encoded once, whichever list it is in
    shell(
        *("preprocess_ssv2.py", *given, "--videos", root / "videos", "--num-frames", 16),
        *("--encoder", data / "encoder", "--split", "train", "test", "--workers", 1),
    )
    given += ["--split", "test", "--workers", 0]
    # a finished run is only scored again
    start = "--resume" if (probe / run_folder.LAST).exists() else "--overwrite"
    shell("probe.py", *given, *TRAINING.split(), "--output", probe, start)
    result = read_json(probe / "evaluation_test.json", "evaluation")
    shell("probe.py", *given, "--evaluate", probe, "--windows", "mean")
    mean = read_json(probe / "evaluation_test_mean.json", "evaluation")
    records = {s: len(read_json(annotations / f"{s}.json", "annotations")) for s in SPLITS}
    result["controls"]["windows"] = count_windows(load_records(annotations, TEST))
    found = {"records": records, "videos": result["n"], "max": result["metrics"]}
    chosen = {"per_class": result["per_class"], "chosen": result["settings"]["chosen"]}
    return found | {"mean": mean["metrics"]} | chosen | {"controls": result["controls"]}


def count_windows(records):
    """Score the number of windows of a video as the score of every class: longer videos have more actions."""
    classes, _ = heads.class_names(records)
    one = np.ones(len(classes), np.float32)
    videos = heads.by_video(records, {r["id"]: one for r in records})
    scores = np.stack([len(rows) * one for _, rows, _ in videos])
    wanted = np.stack([heads.targets(rows, classes, True).max(0) for _, rows, _ in videos])
    return heads.multi_label_scores(scores, wanted)[0]


def markdown(runs, videos):
    """Format the results as a table, with what they do not show."""
    lines = ["# Toy Charades: actions in joined toy clips", ""]
    lines.append(f"| records | training, test | {' | '.join(METRICS.values())} | mAP, mean |")
    lines.append("|---" * (3 + len(METRICS)) + "|")
    for name, run in runs.items():
        cells = [f"{run['max'][key]:.3f}" for key in METRICS] + [f"{run['mean']['mAP']:.3f}"]
        counts = f"{run['records']['train']:,}, {run['records']['test']:,}"
        lines.append(f"| {name} | {counts} | {' | '.join(cells)} |")
    for key, text in CONTROLS.items():
        for name, run in runs.items():
            cells = [f"{run['controls'][key][metric]:.3f}" for metric in METRICS]
            lines.append(f"| control: {text}, {name} | | {' | '.join(cells)} | |")
    lines += [
        "",
        "Scores of a video are the maximum over its windows; in the last column, the mean. The official rule",
        "never counts a video without actions as a false positive.",
        NOTE.format(**videos),
        f"Probes trained with `{TRAINING}`. Made by:",
        "",
        *(f"    {command}" for command in COMMANDS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
