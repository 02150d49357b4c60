"""Training runs that differ by one change each, for bench/ablation.py, tabletop.py and warm_start.py.

Each run is a process with one thread that runs the real train.py and evaluate.py. Several run at a time,
and finished runs are kept.
"""

from runtime.start import environment

import math
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import evaluate
import train
from bench.ablation_changes import changed
from dataset import TRAIN, VALIDATION, load_records
from runtime import cli, hub, run_log
from runtime.errors import FAILED, UserError
from runtime.feature_cache import load_manifest
from runtime.files import read_json, write_json
from runtime.provenance import provenance, provenance_of


@dataclass(frozen=True)
class Row:
    """A row of the table, with one change from the base.

    text: title. flags: of train.py, appended to those of all rows. change: in bench/ablation_changes.py.
    lm: folder of the language model. features: folder of the feature cache. annotations: folder of the
    annotations. seeds: number of runs.
    """

    text: str
    flags: str = ""
    change: str | None = None
    lm: str = "lm"
    features: str = "features"
    annotations: str = "annotations"
    seeds: int = 3


@dataclass(frozen=True)
class Study:
    """The rows and folders of a study.

    module: the script, which runs a single run with --row and --seed. data: the world, with annotations
    and feature caches. models: parent of the language models. runs: parent of the run folders. flags: of
    train.py, for all rows. splits: the splits to score. options: of the script, for a single run.
    device: for --device of train.py and evaluate.py.
    """

    module: str
    rows: dict
    data: Path
    models: Path
    runs: Path
    flags: tuple
    splits: tuple
    options: tuple = ()
    device: str = "cpu"

    def folder(self, name, seed):
        return self.runs / f"{name}_seed{seed}"

    def training(self, name, seed):
        """Return the flags of train.py for one run."""
        row = self.rows[name]
        flags = [*self.flags, *row.flags.split(), *COMMON, "--overwrite", "--seed", str(seed)]
        flags += [*self.cached(name), "--lm", str(self.models / row.lm)]
        flags += ["--output", str(self.folder(name, seed))]
        args = train.parse_args(flags)
        clips = args.limit or len(load_records(self.data / row.annotations, TRAIN))
        steps = args.epochs * math.ceil(clips / (args.batch_size * args.grad_accum))
        return [*flags, "--warmup-steps", str(steps // 9)]

    def folders(self, name):
        """Return the folders of a row: annotations, features and language model."""
        row = self.rows[name]
        return self.data / row.annotations, self.data / row.features, self.models / row.lm

    def cached(self, name):
        """Return the flags for the annotations and the features of a row."""
        annotations, features, _ = map(str, self.folders(name))
        return ["--annotations", annotations, "--features", features]

    def inputs(self, name, seed):
        """Return what the result of a run depends on, apart from the code and the device."""
        row = self.rows[name]
        settings = load_manifest(self.data / row.features).settings
        models = [settings.encoder_fingerprint, hub.fingerprint(self.models / row.lm)]
        return {"flags": self.training(name, seed), "change": row.change, "models": models}

    def result(self, name, seed):
        """Return the result of a run with exactly these inputs, or None."""
        path = self.folder(name, seed) / "result.json"
        result = read_json(path, "result") if path.is_file() else None
        if not isinstance(result, dict):
            return None
        same = all(result.get(k) == v for k, v in self.inputs(name, seed).items())
        return result if same else None

    def run(self, name, seed, read):
        """Apply the row's change to the code, train, score and write result.json, all in this process.

        read(folder, seconds): returns the figures of a run, given its folder and its processor time.
        """
        folder, row, flags = self.folder(name, seed), self.rows[name], self.training(name, seed)
        device = ["--device", self.device]
        (folder / "result.json").unlink(missing_ok=True)
        torch.set_num_threads(1)
        with changed(row.change), step_times() as seconds:
            if code := train.main([*flags, *device]):
                return code  # stopped by a signal
            dtype = ["--dtype", train.parse_args(flags).dtype]
            score = ["--checkpoint", str(folder), *self.cached(name), *COMMON, *device, *dtype]
            for split in self.splits:
                if split == VALIDATION:  # train.py has scored it
                    continue
                if code := evaluate.main([*score, "--split", split]):
                    return code
        steps = len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        figures = read(folder, round(statistics.median(seconds) * steps, 1))
        facts = {"seed": seed, "device": read_json(folder / "args.json", "args")["device"]}
        write_json(folder / "result.json", facts | figures | self.inputs(name, seed))

    def run_all(self, jobs):
        """Start all unfinished runs, `jobs` at a time. Returns the names of those that failed."""
        seeds = range(max(row.seeds for row in self.rows.values()))
        every = [(name, s) for s in seeds for name, row in self.rows.items() if s < row.seeds]
        waiting = [run for run in every if not self.result(*run)]
        self.runs.mkdir(parents=True, exist_ok=True)
        commands, logs = {}, {}
        for name, seed in waiting:
            command = ["-m", self.module, "--row", name, "--seed", str(seed), *self.options]
            command += ["--device", self.device]
            commands[f"{name}, seed {seed}"] = command
            logs[f"{name}, seed {seed}"] = self.folder(name, seed).with_suffix(".log")
        return run_commands(commands, logs, len(every) - len(waiting), jobs)

    def results(self):
        """Yield (name, row, results of its finished runs). Raises UserError if the base has none."""
        for name, row in self.rows.items():
            runs = [run for seed in range(row.seeds) if (run := self.result(name, seed))]
            if not runs and name == "base":
                raise UserError(f"no run of the base is finished in {self.runs}", code=FAILED)
            if runs:
                yield name, row, runs

    def args(self):
        """Return the args.json of the base's first finished run."""
        seeds = range(self.rows["base"].seeds)
        seed = next(seed for seed in seeds if self.result("base", seed))
        return read_json(self.folder("base", seed) / "args.json", "args")

    def provenance(self):
        """Return what the base's first finished run was computed with, see `provenance`."""
        return provenance() | provenance_of(self.args())


COMMON = ["--no-meteor", "--workers", "0"]  # flags of train.py and evaluate.py


def add_flags(parser, rows):
    """Add the flags that all studies have."""
    add = parser.add_argument
    add("--output", default="results", help="folder for the table")
    add("--jobs", type=cli.whole(1), default=2, help="number of runs in parallel")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    text = f"run only this row, with --seed{': ' + ', '.join(rows) if rows else ''}"
    add("--row", choices=rows, metavar="NAME", help=text)
    add("--seed", type=cli.seed, default=0, help="seed of the run of --row")


def validations(folder):
    """Return the validations after each epoch of a run, in order."""
    paths = sorted(folder.glob("validation_epoch_*.json"), key=lambda p: int(p.stem.split("_")[2]))
    return [read_json(path, "validation of an epoch") for path in paths]


def run_commands(commands, logs, finished, jobs):
    """Run modules of this project, `jobs` at a time. Returns the names of those that failed.

    commands: {name: arguments of python}. logs: {name: path of the log}. finished: number of runs
    finished before, for the progress bar.
    """
    waiting, running, failed = list(commands), {}, []
    with tqdm(total=finished + len(commands), initial=finished, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    running[name] = start(commands[name], logs[name])
                time.sleep(0.2)
                for name in [name for name, p in running.items() if p.poll() is not None]:
                    if code := running.pop(name).returncode:
                        bar.write(f"{name}: exit code {code}, see {logs[name]}", sys.stderr)
                        failed.append(name)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    return failed


def start(command, log):
    """Start a run with one thread. Its output goes to the file `log`."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=file, env=environment() | one
        )


@contextmanager
def step_times():
    """Yield a list that collects the processor time of each training step.

    Unlike wall-clock time, it hardly depends on what else the machine is doing.
    """
    seconds, log = [], run_log.Log.step

    def step(*args):
        nonlocal began
        seconds.append(time.process_time() - began)
        log(*args)
        began = time.process_time()

    began = time.process_time()
    with mock.patch.object(run_log.Log, "step", step):
        yield seconds
