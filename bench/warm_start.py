"""Compare train.py --init with training from scratch on 50, 200 and 1,000 clips.

    python -m bench.warm_start                                       (tabletop: 1.5 CPU-hours)
    python -m bench.warm_start --world shapes --data data/toy --models data/toy    (30 CPU-minutes (est.))
    python -m bench.warm_start --row warm_200 --seed 0               (a single run)

Needs the clips, features and models of `make tabletop` or `make demo`. The base, from which warm runs start,
is trained on clips without a third of the world's nouns. All other runs are trained on N "own" clips, each
with at least one of these nouns; a tenth of them is used for validation, the default of
prepare_annotations.py. They take --steps steps, rounded up to whole passes, and are scored on other own
clips, which are used for nothing else. It can be stopped and restarted: finished runs are kept in --runs.
Writes warm_start.json and warm_start.md to --output.
"""

import runtime.start

from dataclasses import replace
from functools import partial
from pathlib import Path

import evaluate
import metrics
from bench.study import COMMON, Row, Study, add_flags
from bench.tabletop import LR
from dataset import TRAIN, VALIDATION, by_hash, load_records
from runtime import cli
from runtime.errors import PARTIAL, UserError
from runtime.files import read_json, write_atomic, write_json
from runtime.predictions import read_predictions
from worlds import demo, tabletop_demo

COUNTS = (50, 200, 1000)  # own clips
REPORT = 300  # other own clips, on which all runs are scored
STEPS = 400  # per run
BASE_STEPS = 2  # the base takes this many times as many steps
METRICS = ("CIDEr", "template_accuracy", "placeholder_match", "exact_match")

# {world: (folder of the language model, clips per step, flags of train.py)}
WORLDS = {
    "tabletop": ("smollm2", 8, f"{tabletop_demo.TRAINING} --lr {LR}"),
    "shapes": ("lm", 16, f"{demo.TRAINING} --batch-size 16"),
}
KINDS = {
    "scratch": "from scratch",
    "warm": "warm start",
}


def make_rows(world, runs, counts, steps, seeds):
    """Return the rows of the study: the base, then each kind for each number of own clips."""
    lm, per_step, _ = WORLDS[world]
    init = f"--init {runs / 'base_seed0'}"

    def flags(clips, steps):
        return f"--epochs {-(-steps // -(-clips // per_step))}"

    folder = partial(annotations, runs)
    base = len(load_records(folder("base"), TRAIN))
    rows = {
        "base": Row(
            "base: clips without these nouns",
            flags(base, BASE_STEPS * steps),
            lm=lm,
            annotations=folder("base"),
            seeds=1,
        )
    }
    for n in counts:
        row = Row("", flags(n - n // 10, steps), lm=lm, annotations=folder(n), seeds=seeds)
        rows[f"scratch_{n}"] = replace(row, text=KINDS["scratch"])
        rows[f"warm_{n}"] = replace(row, text=KINDS["warm"], flags=f"{row.flags} {init}")
    return rows


def annotations(runs, name):
    """Return the annotations folder of the base, of N own clips, or of the clips that are scored."""
    return str(runs.absolute() / f"annotations_{name}")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--world", choices=WORLDS, default="tabletop", metavar="NAME", help="tabletop or shapes")
    add("--data", default="data/tabletop", help="folder of the world")
    add("--models", default="data/pretrained", help="folder of the models")
    add("--runs", default="results/warm_start_runs", help="parent of the run folders")
    text = "numbers of own clips"
    add("--clips", type=cli.whole(20), nargs="+", default=COUNTS, help=text)
    add("--steps", type=cli.whole(1), default=STEPS, help="steps of each run")
    add("--seeds", type=cli.whole(1), default=1, help="number of runs per row")
    add_flags(parser, None)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    data, runs = Path(args.data), Path(args.runs)
    for folder in (data / "annotations", data / "features", Path(args.models)):
        cli.existing(folder, "world", "Run make tabletop, or make demo for the shapes.")
    if not args.row:
        output = cli.output_folder(args.output, "--output")
        divide(data, runs, args.clips)
    study = make_study(args, data, runs)
    if args.row:
        if args.row not in study.rows:
            raise UserError(f"--row {args.row} is not one of {', '.join(study.rows)}")
        return study.run(args.row, args.seed, partial(figures, study, args.row))
    # all others start from the base
    failed = replace(study, rows={"base": study.rows["base"]}).run_all(1)
    failed += [] if failed else study.run_all(args.jobs)
    results = collect(study, args)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "warm_start.json", results)
    text = markdown(results)
    write_atomic(output / "warm_start.md", text.encode())
    print(text, end="")
    return PARTIAL if failed else None


def make_study(args, data, runs):
    """Return the study of a world."""
    _, _, flags = WORLDS[args.world]
    flags = [*flags.split(), "--eval-clips", "100"]
    options = ["--world", args.world, "--data", args.data, "--models", args.models]
    options += ["--runs", args.runs, "--clips", *map(str, args.clips), "--steps", str(args.steps)]
    if args.world == "tabletop":
        flags += ["--dtype", tabletop_demo.default_dtype()]
    return Study(
        module="bench.warm_start",
        rows=make_rows(args.world, runs, args.clips, args.steps, args.seeds),
        data=data,
        models=Path(args.models),
        runs=runs,
        flags=tuple(flags),
        splits=(VALIDATION,),
        options=tuple(options),
        device=args.device,
    )


# ---- the clips -----------------------------------------------------------------------------------


def divide(data, runs, counts):
    """Write the annotations of the base, of each number of own clips, and of the scored clips."""
    split = {s: load_records(data / "annotations", s) for s in (TRAIN, VALIDATION)}
    nouns = sorted({noun for r in split[TRAIN] for noun in nouns_of(r)})
    left_out = set(nouns[::3])
    own, others = {}, {}
    for name, records in split.items():
        records = {r["id"]: r for r in records}
        records = [records[i] for i in by_hash(records, 0)]
        own[name] = [r for r in records if left_out & set(nouns_of(r))]
        others[name] = [r for r in records if not left_out & set(nouns_of(r))]
    report, training = own[TRAIN][:REPORT], own[TRAIN][REPORT:]
    for n in counts:
        held_out = n // 10
        if len(training) < n - held_out or len(own[VALIDATION]) < held_out:
            raise UserError(
                f"--clips {n}: {data} has too few clips with {', '.join(sorted(left_out))}"
            )
        write(runs, n, training[: n - held_out], own[VALIDATION][:held_out])
    write(runs, "report", report, own[VALIDATION])
    write(runs, "base", others[TRAIN], others[VALIDATION])


def nouns_of(record):
    """Return the last word of each object: "pole" of "cyan pole", "box" of "cereal box"."""
    return [text.split()[-1] for text in record["placeholders"]]


def write(runs, name, train, validation):
    folder = Path(annotations(runs, name))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{TRAIN}.json", train)
    write_json(folder / f"{VALIDATION}.json", validation)


# ---- results -------------------------------------------------------------------------------------


def figures(study, name, folder, seconds):
    """Score a run and collect its figures."""
    places = ["--annotations", annotations(study.runs, "report"), "--split", TRAIN]
    places += ["--features", str(study.data / "features"), "--device", study.device]
    dtype = read_json(folder / "args.json", "args")["args"]["dtype"]
    evaluate.main(["--checkpoint", str(folder), *places, *COMMON, "--dtype", dtype])
    found = read_json(folder / f"evaluation_{TRAIN}.json", "scores")
    args = read_json(folder / "args.json", "args")
    return {
        "scores": {metric: found["metrics"][metric] for metric in METRICS},
        "ci95": found["ci95"]["CIDEr"],
        "step": found["settings"]["step"],
        "clips": args["clips"],
        "lr": args["args"]["lr"],
        "seconds": seconds,
    }


def collect(study, args):
    """Collect the contents of warm_start.json."""
    keys = ("seed", "device", "scores", "ci95", "step", "lr", "seconds")
    report = load_records(annotations(study.runs, "report"), TRAIN)
    rows = {}
    for name, row, runs in study.results():
        rows[name] = {"text": row.text, "flags": row.flags.partition(" --init")[0]}
        rows[name] |= {"clips": runs[0]["clips"], "runs": [{k: r[k] for k in keys} for r in runs]}
        kind, _, n = name.partition("_")
        if kind == "warm" and study.result(f"scratch_{n}", 0):
            folders = study.folder(f"scratch_{n}", 0), study.folder(name, 0)
            rows[name]["over_scratch"] = difference(folders, report)
    nouns = {noun for r in report for noun in nouns_of(r)}
    nouns -= {n for r in load_records(annotations(study.runs, "base"), TRAIN) for n in nouns_of(r)}
    return {
        "world": args.world,
        "steps": args.steps,
        "report": len(report),
        "nouns": sorted(nouns),
        "base_clips": rows["base"]["clips"],
        **study.provenance(),
        "rows": rows,
    }


def difference(folders, report):
    """Return the difference in CIDEr of two runs on the scored clips, with its interval."""
    ids = {r["id"] for r in report}
    captions = [read_predictions([f / f"predictions_{TRAIN}.json"], ids) for f in folders]
    result, _ = metrics.compare(*captions, report, with_meteor=False)
    cider = result["metrics"]["CIDEr"]
    return {"CIDEr": cider["difference"], "ci95": cider["ci95"]}


def markdown(results):
    """Format warm_start.md."""
    lines = [
        "# Warm start",
        "",
        f"`python -m bench.warm_start --world {results['world']}`. The base was trained on"
        f" {results['base_clips']:,} clips without {', '.join(results['nouns'])}.",
        f"Own clips show at least one of these; a tenth of them is for validation. Runs take at least"
        f" {results['steps']} steps, in whole passes; the base takes about twice as many. They are scored on",
        f"{results['report']} other own clips. CIDEr is on a 0-10 scale, with a 95 % interval over clips for one seed,"
        " or mean and",
        'range over seeds. "over scratch" is the difference of CIDEr and its paired interval (seed 0).',
        "",
        "| own clips | run | CIDEr | | over scratch | template | objects | exact match | best step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["rows"].items():
        n, runs = name.partition("_")[2] or "0", row["runs"]
        means = [sum(r["scores"][m] for r in runs) / len(runs) for m in METRICS]
        ciders = [r["scores"]["CIDEr"] for r in runs]
        low, high = runs[0]["ci95"] if len(runs) == 1 else (min(ciders), max(ciders))
        over = row.get("over_scratch")
        gain = "{:+.2f} ({:+.2f} to {:+.2f})".format(over["CIDEr"], *over["ci95"]) if over else ""
        cells = [f"{int(n):,}", row["text"], f"{means[0]:.2f}", f"{low:.2f} – {high:.2f}", gain]
        cells += [*(f"{m:.2f}" for m in means[1:]), f"{runs[0]['step']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
