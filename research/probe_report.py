"""Compare probes on the toy world, and the attentive one with the captioner.

Writes probe.json and probe.md.

    python -m worlds.demo && python -m worlds.demo --seed 1 --data data/toy1 --output results/demo1    (and so on)
    python -m research.probe_report --runs results/demo results/demo1 results/demo2 --data data/toy data/toy1 data/toy2

About ten minutes per run on two cores.
"""

import runtime.start

import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from dataset import VALIDATION
from runtime import cli, start
from runtime.cli import note
from runtime.errors import FAILED, UserError
from runtime.files import read_json, write_atomic, write_json
from runtime.provenance import provenance

TRAINING = "--num-heads 4 --epochs 10 --weight-decay 0.05 --warmup-steps 200 --workers 1"
ATTENTIVE, POOLED = "--lr 3e-3 1e-3 3e-4", "--lr 1e-1 3e-2 1e-2 3e-3"
PROBES = {
    "attentive": ATTENTIVE,
    "attentive, without positions": f"{ATTENTIVE} --no-positions",
    "MLP on the mean with learned token weights": f"{POOLED} --head mlp --on weights",
    "MLP on the mean": f"{POOLED} --head mlp",
    "linear on the mean": f"{POOLED} --head linear",
}
SPLITS = {VALIDATION: "validation", "validation_pairs": "unseen pairs"}
SPLITS |= {"validation_objects": "unseen objects"}
STILL, SHUFFLED, MAJORITY = "first frame only", "shuffled labels", "most frequent class"
COUNTS = {
    "both": "both",
    "only_probe": "only the probe",
    "only_captions": "only the captions",
    "neither": "neither",
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        default=["results/demo"],
        help="run folders of worlds.demo",
    )
    add(
        "--data",
        nargs="+",
        default=["data/toy"],
        help="folders of their worlds, in the same order",
    )
    add("--output", default="results", help="folder for probe.json and probe.md")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if len(args.runs) != len(args.data):
        raise UserError("--runs and --data need the same number of folders")
    found = [measure(Path(run), Path(data)) for run, data in zip(args.runs, args.data, strict=True)]
    output = cli.output_folder(args.output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    value = {"training": TRAINING, "probes": PROBES, "runs": found}
    write_json(output / "probe.json", provenance() | value)
    write_atomic(output / "probe.md", markdown(found).encode())
    print(markdown(found), end="")


def measure(run, data):
    """Train and score all probes on one world. Returns {"top1": {probe: {split: …}}, "captions": {…}}."""
    top1 = {}
    common = ["--annotations", data / "annotations", "--device", "cpu"]
    cached = [*common, "--features", data / "features"]
    for name, flags in PROBES.items():
        folder = data / "probes" / name.replace(", ", "_").replace(" ", "_")
        if not (folder / "evaluation_validation.json").exists():
            shell(
                "probe.py",
                *cached,
                *TRAINING.split(),
                *flags.split(),
                "--output",
                folder,
                "--overwrite",
            )
        for split in SPLITS:
            shell("probe.py", *cached, "--workers", 0, "--evaluate", folder, "--split", split)
        still = ["--features", data / "features_still", "--workers", 0, "--control", "still"]
        shell("probe.py", *common, "--evaluate", folder, *still)
        scores = {text: score(folder, split) for split, text in SPLITS.items()}
        top1[name] = scores | {STILL: score(folder, f"{VALIDATION}_still")}
    # only a training run scores the control; resuming a finished one does not train again
    best = data / "probes" / "attentive"
    flags = TRAINING.split() + PROBES["attentive"].split()
    shell("probe.py", *cached, *flags, "--output", best, "--resume")
    controls = read_json(best / f"evaluation_{VALIDATION}.json", "evaluation")["controls"]
    shell(
        "evaluate.py", *cached, "--checkpoint", run, "--probe", best, "--no-meteor", "--workers", 0
    )
    captions = read_json(run / f"evaluation_{VALIDATION}.json", "evaluation")["probe"]
    return {
        "top1": top1,
        "controls": {
            SHUFFLED: controls["shuffled_labels"]["top1"],
            MAJORITY: controls["majority"]["top1"],
        },
        "captions": captions,
    }


def score(folder, name):
    return read_json(folder / f"evaluation_{name}.json", "evaluation")["metrics"]["top1"]


def shell(script, *arguments):
    """Run a script of this project. Raises UserError if it fails."""
    command = [sys.executable, str(start.ROOT / script), *map(str, arguments)]
    note(f"\n$ python {shlex.join(map(str, (script, *arguments)))}")
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError("the command above failed", code=FAILED)


def markdown(found):
    """Format two tables: top-1 accuracy of each probe, and the attentive one against the captions."""

    def cell(values):
        if len(values) == 1:
            return f"{values[0]:.3f}"
        return f"{fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"

    names = [*SPLITS.values(), STILL]
    lines = [f"| probe | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for probe in PROBES:
        cells = [cell([run["top1"][probe][name] for run in found]) for name in names]
        lines.append(f"| {probe} | {' | '.join(cells)} |")
    for control in (SHUFFLED, MAJORITY):
        value = cell([run["controls"][control] for run in found])
        lines.append(f"| control: {control} | {value} |" + " |" * (len(names) - 1))
    lines += ["", "| right | clips |", "|---|---|"]
    total = sum(run["captions"]["n"] for run in found)
    for key, text in COUNTS.items():
        count = sum(run["captions"][key] for run in found)
        lines.append(f"| {text} | {count} ({count / total:.1%}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
