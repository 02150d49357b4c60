"""Run the real scripts on a small toy world, kill or obstruct them, and compare the folders they leave.

Real processes, real signals and tiny models, on the CPU.
"""

from runtime.start import ROOT

import atexit
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

import prepare_annotations
from dataset import load_records
from runtime import cli, files
from runtime.errors import DONE, FAILED, PARTIAL, UserError
from runtime.run_folder import CORRUPT

MAIN_LOOP = {  # script: module and name of what it calls once, when its work starts
    "train": ("runtime.run_folder", "Log"),
    "preprocess_ssv2": ("preprocess_ssv2", "encode_all"),
}
PRELOADED = (
    "captioner",
    "encoder",
    "metrics",
    "runtime.decode_workers",
    "preprocess_ssv2",
    "train",
)
TIMING = ("seconds", "data_seconds", "clips_per_second")
DAMAGED = 3  # training clips that cannot be decoded

Ended = namedtuple("Ended", "code seconds stderr")


# ---- running the scripts -------------------------------------------------------------------


def run(script, flags, kill_after=None, stop_with=None, kill_at=None, full_after=None, processes=1):
    """Run a script with `flags` until it ends or is killed. Return `Ended`.

    kill_after: send SIGKILL after this many seconds of work, or the signal `stop_with` to the whole
    process group. kill_at: SIGKILL during the write of this byte, counted over all temporary files.
    full_after: number of temporary files after which no file can exceed 10,000 bytes (RLIMIT_FSIZE).
    processes: number of processes, started by torchrun.
    """
    flags = [*map(str, flags)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), f"{script}.py", *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        return Ended(done.returncode, 0.0, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder)  # receives pid, started (when the work starts), code and stderr
        fork_server().stdin.write(json.dumps([script, flags, folder, kill_at, full_after]) + "\n")
        fork_server().stdin.flush()
        wait_for(status / "started", status / "code")
        began = time.perf_counter()
        if not wait_for(status / "code", seconds=kill_after):
            pid = int((status / "pid").read_text())
            with suppress(ProcessLookupError):
                os.killpg(pid, stop_with) if stop_with else os.kill(pid, signal.SIGKILL)
            wait_for(status / "code")
        seconds = time.perf_counter() - began
        return Ended(int((status / "code").read_text()), seconds, (status / "stderr").read_text())


def wait_for(*paths, seconds=None):
    """Return True when one of the files exists, False after `seconds`."""
    end = math.inf if seconds is None else time.perf_counter() + seconds
    while not any(path.exists() for path in paths):
        if time.perf_counter() > end:
            return False
        if fork_server().poll() is not None:
            raise UserError("the fork server has ended", code=FAILED)
        time.sleep(0.005)
    return True


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def heed_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@cache
def fork_server():
    """Return a process that has imported everything and forks to run scripts, which saves seconds."""
    code = "from torture import sandbox; sandbox.serve()"
    how = {"cwd": ROOT, "env": environment(), "stdin": subprocess.PIPE, "text": True}
    # `pytest &` in a script starts with SIGINT ignored, and the scripts would ignore it too
    return subprocess.Popen([sys.executable, "-c", code], preexec_fn=heed_ctrl_c, **how)


def serve():
    """Main loop of the fork server. Each request forks a parent, which waits, and the script."""
    for name in PRELOADED:
        importlib.import_module(name)
    for name in ("qwen2", "vjepa2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request = json.loads(line)
        status = Path(request[2])
        pid = os.fork()
        if not pid:
            run_in_child(*request)
        (status / "pid").write_text(str(pid))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(FileNotFoundError):
            files.write_atomic(status / "code", str(code))
        os._exit(0)


def run_in_child(script, flags, status, kill_at, full_after):
    """Run the script in this process and exit. `kill_at` and `full_after` apply once work starts."""
    os.setsid()
    null, stderr = (
        os.open(os.devnull, os.O_RDWR),
        os.open(f"{status}/stderr", os.O_CREAT | os.O_WRONLY),
    )
    for target, source in enumerate((null, null, stderr)):
        os.dup2(source, target)
    sys.argv = [f"{script}.py", *flags]
    module, name = MAIN_LOOP[script]
    work = getattr(importlib.import_module(module), name)

    def start(*args, **kwargs):
        Path(status, "started").touch()
        if kill_at:
            files.open = open_and_die(kill_at)
        if full_after:
            files.open = open_on_full_disk(full_after)
        return work(*args, **kwargs)

    setattr(sys.modules[module], name, start)
    code = 1
    try:
        cli.run(importlib.import_module(script).main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    os._exit(code)


def open_and_die(remaining):
    """Return an `open` that kills the process after `remaining` bytes written to temporary files."""

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal remaining
            if len(data) >= remaining:
                self.file.write(data[:remaining])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= len(data)
            return self.file.write(data)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

    return lambda path, mode, **kwargs: (
        File(open(path, mode)) if mode == "wb" else open(path, mode, **kwargs)
    )


def open_on_full_disk(remaining):
    """Return an `open` that limits the size of files after `remaining` temporary files."""

    def open_limited(path, mode, **kwargs):
        nonlocal remaining
        remaining -= mode == "wb"
        if remaining < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return open(path, mode, **kwargs)

    return open_limited


def expect(ended, *codes):
    """Return `ended`. Raise UserError for another exit code, which makes the trial invalid."""
    if ended.code not in codes:
        raise UserError(f"a script ended with {ended.code}, not {codes}: {ended.stderr[-2000:]}", 1)
    return ended


# ---- the world -----------------------------------------------------------------------------


class World:
    """Clips, labels and tiny models. Features and runs are written to `folder`."""

    def __init__(self, folder, toy, annotations, videos):
        self.folder, self.toy, self.annotations, self.videos = folder, toy, annotations, videos
        self.features = folder / "features"

    def preprocess(self, features=None, **kwargs):
        flags = ["--videos", self.videos, "--annotations", self.annotations]
        flags += ["--workers", 2, "--device", "cpu"]
        flags += ["--features", features or self.features, "--encoder", self.toy / "encoder"]
        flags += ["--num-frames", 16, "--batch-size", 4, *kwargs.pop("flags", ())]
        return run("preprocess_ssv2", flags, **kwargs)

    def train(self, output, workers=0, **kwargs):
        flags = ["--features", self.features, "--annotations", self.annotations, "--no-meteor"]
        flags += ["--output", output, "--lm", self.toy / "lm", "--num-queries", 4, "--lr", 2e-3]
        flags += ["--batch-size", 4, "--grad-accum", 3, "--epochs", 3, "--warmup-steps", 2]
        flags += ["--eval-clips", 10, "--save-every", 2, "--allow-missing", DAMAGED]
        flags += ["--workers", workers, "--resume", "--device", "cpu", *kwargs.pop("flags", ())]
        return run("train", flags, **kwargs)

    def cache(self):
        """Return the features of an undisturbed run, made once, and its seconds."""
        if not self.features.is_dir():
            self.preprocess_seconds = expect(self.preprocess(), PARTIAL).seconds
        return self.features, self.preprocess_seconds

    def trained(self):
        """Return the run folder of an undisturbed training, made once, and its seconds."""
        folder = self.folder / "undisturbed"
        if not folder.is_dir():
            self.cache()
            self.train_seconds = expect(self.train(folder), DONE).seconds
        return folder, self.train_seconds

    def new(self):
        """Return the path of a folder that does not exist yet."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "new"


def make_world(folder, toy):
    """Return a World with the toy world's clips, of which `DAMAGED` for training are truncated."""
    annotations, videos = folder / "annotations", folder / "videos"
    flags = ["--labels", toy / "labels", "--paraphrases", toy / "paraphrases"]
    prepare_annotations.main([*map(str, flags), "--output", str(annotations)])
    shutil.copytree(toy / "videos", videos)
    damaged = sorted(r["id"] for r in load_records(annotations, "train"))[:DAMAGED]
    for clip_id, size in zip(damaged, (0, 200, 3000), strict=True):
        os.truncate(videos / f"{clip_id}.webm", size)
    return World(folder, toy, annotations, videos)


def contents(folder, pattern="*"):
    """Return {name: content} of a folder's files, without times and the folder's own path."""
    found = {}
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file()):
        data = path.read_bytes()
        if path.name in ("args.json", CORRUPT, ".lock"):
            continue
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            data = [{k: v for k, v in row.items() if k not in TIMING} for row in rows]
        if path.name in ("last.pt", "previous.pt"):  # equal values may be pickled differently
            data = files.read_torch(path)
        if path.name.startswith("evaluation_"):
            data = json.loads(data) | {"checkpoint": None}
        found[str(path.relative_to(folder))] = data
    return found


def differences(folder, other, pattern="*"):
    """Return the names of the files that two folders do not have in common, bit for bit."""
    one, two = contents(folder, pattern), contents(other, pattern)
    return sorted(k for k in one.keys() | two.keys() if not equal(one.get(k), two.get(k)))


def equal(a, b):
    """Return True if two values are equal bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
