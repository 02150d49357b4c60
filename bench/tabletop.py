"""Controls and decisions on the tabletop world: train with one change at a time.

    python -m bench.tabletop                              (9 CPU-hours, two runs at a time)
    python -m bench.tabletop --row lm_random --seed 0     (a single run, 20 CPU-minutes)

Needs the models, clips and features of `make tabletop`. It can be stopped and restarted: finished runs are
kept in --runs. Each run trains on the first 1,000 clips for 315 steps with train.py, with the demo's
settings and one change: other flags, another language model or encoder, or a replacement from
bench/ablation_changes.py. Writes tabletop_runs.json and tabletop_runs.md to --output.
"""

import runtime.start

import shlex
import shutil
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MobileNetV2Config, MobileNetV2Model

import evaluate
import train
import video
from bench.ablation_changes import changed
from bench.jobs import run_commands, step_times
from bench.tabletop_table import markdown
from dataset import VALIDATION
from encoder import transform
from feature_cache import load_manifest
from runtime import cli, hub
from runtime.errors import FAILED, PARTIAL, UserError
from runtime.files import read_json, write_atomic, write_json
from runtime.names import list_files
from worlds import tabletop_demo
from worlds.demo import shell

CLIPS, EPOCHS = 1000, 5  # 63 steps of 16 clips per epoch
WARMUP = 30
METRICS = ("CIDEr", "template_accuracy", "placeholder_match", "exact_match")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    flags: of train.py, appended to those of all rows. change: in bench/ablation_changes.py. lm: folder in
    --pretrained. features: folder in --data. seeds: number of runs.
    """

    text: str
    flags: str = ""
    change: str | None = None
    lm: str = "smollm2"
    features: str = "features"
    seeds: int = 1


CONTROLS = {
    "base": Row("SmolLM2 and MobileNetV2 as they are", seeds=3),
    "lm_random": Row("SmolLM2 with random weights", lm="smollm2_random", seeds=3),
    "lm_shuffled": Row("SmolLM2 with shuffled layers", lm="smollm2_shuffled", seeds=3),
    "encoder_random": Row("MobileNetV2 with random weights", features="features_random", seeds=3),
}
DECISIONS = {
    "lr_3e-4": Row("learning rate 3e-4", "--lr 3e-4"),
    "lr_6e-4": Row("learning rate 6e-4", "--lr 6e-4"),
    "lr_2e-3": Row("learning rate 2e-3", "--lr 2e-3"),
    "no_gain": Row("soft prompts start at the norm of a LayerNorm", change="no_gain"),
    "no_standardisation": Row("features not standardised", change="no_standardisation"),
    "labels_only": Row("labels only, K = 1", "--captions-per-clip 1", "labels_only"),
    "per_caption": Row("captions weighted equally", change="per_caption"),
    "k1": Row("K = 1, 7 passes", "--captions-per-clip 1 --epochs 7"),
    "k4": Row("K = 4, 3 passes", "--captions-per-clip 4 --epochs 3"),
    "queries8": Row("8 queries", "--num-queries 8"),
    "queries64": Row("64 queries", "--num-queries 64"),
    "eot_in_front": Row("an end-of-text embedding in front", change="eot_in_front"),
    "no_positions": Row("without positions", change="no_positions"),
}
ROWS = CONTROLS | DECISIONS


@dataclass(frozen=True)
class Study:
    """The folders of the runs."""

    data: Path  # the tabletop world
    pretrained: Path
    runs: Path  # parent of the run folders

    def folder(self, name, seed):
        return self.runs / f"{name}_seed{seed}"

    def cached(self, name):
        """Return the flags for the annotations and the features of a row."""
        features = str(self.data / ROWS[name].features)
        return ["--annotations", str(self.data / "annotations"), "--features", features]

    def flags(self, name, seed):
        """Return the flags of train.py for one run."""
        flags = shlex.split(f"{tabletop_demo.TRAINING} --epochs {EPOCHS} {ROWS[name].flags}")
        flags += ["--warmup-steps", str(WARMUP), "--limit", str(CLIPS), "--eval-clips", "100"]
        flags += ["--no-meteor", "--workers", "0", "--device", "cpu", "--overwrite"]
        flags += ["--dtype", tabletop_demo.default_dtype(), "--seed", str(seed)]
        flags += ["--lm", str(self.pretrained / ROWS[name].lm)]
        return [*flags, *self.cached(name), "--output", str(self.folder(name, seed))]

    def inputs(self, name, seed):
        """Return what the result of a run depends on, apart from the code."""
        settings = load_manifest(self.data / ROWS[name].features).settings
        return {
            "flags": self.flags(name, seed),
            "change": ROWS[name].change,
            "models": [
                settings.encoder_fingerprint,
                hub.fingerprint(self.pretrained / ROWS[name].lm),
            ],
        }

    def result(self, name, seed):
        """Return the result of a run with exactly these inputs, or None."""
        path = self.folder(name, seed) / "result.json"
        result = read_json(path, "result") if path.is_file() else {}
        inputs = self.inputs(name, seed)
        return result if all(result.get(k) == v for k, v in inputs.items()) else None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/tabletop", metavar="DIR", help="folder of the tabletop world")
    add("--pretrained", default="data/pretrained", metavar="DIR", help="folder of the models")
    add("--runs", default="results/tabletop_runs", metavar="DIR", help="parent of the run folders")
    add("--output", default="results", metavar="DIR", help="folder for the table")
    add("--jobs", type=cli.whole(1), default=2, metavar="N", help="number of runs in parallel")
    text = f"run only this row, with --seed: {', '.join(ROWS)}"
    add("--row", choices=ROWS, metavar="NAME", help=text)
    add("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of the run of --row")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    study = Study(Path(args.data), Path(args.pretrained), Path(args.runs))
    for folder in (
        study.data / "annotations",
        study.data / "features",
        study.pretrained / "smollm2",
    ):
        cli.existing(folder, "tabletop world", "Run make tabletop first.")
    if args.row:
        return run_row(study, args.row, args.seed)
    output = cli.output_folder(args.output, "--output")
    make_controls(study)
    failed = run_all(study, args.jobs)
    results = collect(study)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "tabletop_runs.json", results)
    text = markdown(results)
    write_atomic(output / "tabletop_runs.md", text.encode())
    print(text, end="")
    return PARTIAL if failed else None


# ---- models and features of the controls -------------------------------------------------------


def make_controls(study):
    """Make the language models and the encoder of the controls, and encode the clips with the latter."""
    source = study.pretrained / "smollm2"
    make_folder(study.pretrained / "smollm2_random", source, random_lm)
    make_folder(study.pretrained / "smollm2_shuffled", source, shuffled_lm)
    random = study.pretrained / "mobilenet_v2_random"
    clips = list_files(study.data / "videos", ".webm")[:16]
    frames = [frame for path in clips for frame in video.decode(path, 4).frames]
    make_folder(random, study.pretrained / "mobilenet_v2", partial(random_encoder, frames=frames))
    splits = ["train", *tabletop_demo.SPLITS]
    shell(tabletop_demo.encode(study.data, random, "features_random", splits, f"--limit {CLIPS}"))


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

    The statistics of its batch normalisations are those of the frames, (H, W, 3) each. Otherwise features
    would vanish on their way through the layers.
    """
    model = MobileNetV2Model(MobileNetV2Config.from_pretrained(source))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches
    with torch.no_grad():
        model.train()(transform(torch.as_tensor(np.stack(frames)), 224, "squash"))
    return model.eval()


# ---- runs ----------------------------------------------------------------------------------------


def run_row(study, name, seed):
    """Apply the change to the code, train, score and write result.json, all in this process."""
    folder, row = study.folder(name, seed), ROWS[name]
    flags = study.flags(name, seed)
    (folder / "result.json").unlink(missing_ok=True)
    torch.set_num_threads(1)
    with changed(row.change), step_times() as seconds:
        if code := train.main(flags):
            return code  # stopped by a signal
        score = ["--checkpoint", str(folder), *study.cached(name), "--no-meteor", "--workers", "0"]
        score += ["--device", "cpu", "--dtype", tabletop_demo.default_dtype()]
        for split in tabletop_demo.SPLITS:
            if split != VALIDATION:  # train.py has scored it
                evaluate.main([*score, "--split", split])
    result = read_run(folder, statistics.median(seconds))
    write_json(folder / "result.json", {"seed": seed, **result, **study.inputs(name, seed)})


def read_run(folder, step_seconds):
    """Collect the figures of a finished run. step_seconds: its median processor time per step."""
    steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    scores = {}
    for split in tabletop_demo.SPLITS:
        found = read_json(folder / f"evaluation_{split}.json", "scores")
        scores[split] = {k: found["metrics"].get(k) for k in METRICS}
        scores[split]["shuffled"] = found["controls"]["shuffled"]["CIDEr"]
    epochs = sorted(folder.glob("validation_epoch_*.json"), key=lambda p: int(p.stem.split("_")[2]))
    curve = [read_json(path, "validation of an epoch") for path in epochs]
    return {
        "scores": scores,
        "steps": steps,
        "seconds": round(step_seconds * steps, 1),
        "losses": [point["loss"] for point in curve],
        "parameters": read_json(folder / "args.json", "args")["trainable_parameters"],
    }


def run_all(study, jobs):
    """Start all unfinished runs, `jobs` at a time. Returns the names of those that failed."""
    every = [(name, seed) for seed in range(3) for name, row in ROWS.items() if seed < row.seeds]
    waiting = [run for run in every if not study.result(*run)]
    study.runs.mkdir(parents=True, exist_ok=True)
    commands, logs = {}, {}
    for name, seed in waiting:
        run = f"{name}, seed {seed}"
        commands[run] = ["-m", "bench.tabletop", "--row", name, "--seed", str(seed)]
        commands[run] += ["--data", str(study.data), "--pretrained", str(study.pretrained)]
        commands[run] += ["--runs", str(study.runs)]
        logs[run] = study.folder(name, seed).with_suffix(".log")
    return run_commands(commands, logs, len(every) - len(waiting), jobs)


def collect(study):
    """Collect the contents of tabletop_runs.json. Raises UserError if no run of the base is finished."""
    rows = {}
    for name, row in ROWS.items():
        runs = [study.result(name, seed) for seed in range(row.seeds)]
        keys = ("seed", "scores", "steps", "seconds", "losses")
        if runs := [{k: run[k] for k in keys} for run in runs if run]:
            rows[name] = {"text": row.text, "flags": row.flags, "change": row.change, "runs": runs}
    if "base" not in rows:
        raise UserError(f"no run of the base is finished in {study.runs}", code=FAILED)
    args = read_json(study.folder("base", 0) / "args.json", "args")
    return {"clips": CLIPS, "versions": args["versions"], "rows": rows}


if __name__ == "__main__":
    cli.run(main)
