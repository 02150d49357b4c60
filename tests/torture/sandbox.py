"""Run the real scripts on a small toy world, end them on purpose, compare what they leave behind.

For torture/checks.py and the tests: real processes, real signals, tiny models, on the CPU.
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

from dataset import load_records
from runtime import cli, files
from runtime.errors import DONE, PARTIAL, UserError

WORK_BEGINS = {
    "train": ("runtime.run_folder", "Log"),
    "preprocess_ssv2": ("preprocess_ssv2", "encode_all"),
}
TIMING = ("seconds", "data_seconds", "clips_per_second")
DAMAGED = 3  # clips of the world that no run may take

Ended = namedtuple("Ended", "code seconds stderr")


# ---- running the scripts -------------------------------------------------------------------


def run(script, flags, kill_after=None, signalled=None, die_in_byte=None, full_after=None, ranks=1):
    """Run a script with flags to its end, or to the one that is arranged for it; returns `Ended`.

    kill_after: seconds of work after which SIGKILL comes, or `signalled`, a signal for the whole
    process group. die_in_byte: it kills itself when it has written that much of what should be whole
    files. full_after: such files after which none may have more than 10,000 bytes, by RLIMIT_FSIZE.
    ranks: processes, by torchrun.
    """
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), f"{script}.py", *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        return Ended(done.returncode, 0.0, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        talk = Path(folder)
        orders = [script, [*map(str, flags)], folder, die_in_byte, full_after]
        nursery().stdin.write(json.dumps(orders) + "\n")
        nursery().stdin.flush()
        wait_for(talk / "begun", talk / "code")
        began = time.perf_counter()
        if not wait_for(talk / "code", seconds=kill_after):
            pid = int((talk / "pid").read_text())
            with suppress(ProcessLookupError):
                os.killpg(pid, signalled) if signalled else os.kill(pid, signal.SIGKILL)
            wait_for(talk / "code")
        seconds = time.perf_counter() - began
        return Ended(int((talk / "code").read_text()), seconds, (talk / "stderr").read_text())


def wait_for(*paths, seconds=None):
    """Until one of the files is there, True, or the time is over, False."""
    end = math.inf if seconds is None else time.perf_counter() + seconds
    while not any(path.exists() for path in paths):
        if time.perf_counter() > end:
            return False
        if nursery().poll() is not None:
            raise UserError("the process that starts the scripts has died", code=1)
        time.sleep(0.005)
    return True


def environment():
    found = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": found}


@cache
def nursery():
    """A process that has imported everything and forks the scripts: starting each takes seconds."""
    code = "from torture import sandbox; sandbox.nurse()"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdin=subprocess.PIPE, text=True
    )


def nurse():
    """The nursery's side: two forks for every line of orders, one to be the script, one to see it end."""
    for name in (
        "captioner",
        "encoder",
        "metrics",
        "runtime.decode_workers",
        "preprocess_ssv2",
        "train",
    ):
        importlib.import_module(name)
    for name in ("qwen2", "vjepa2"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        orders = json.loads(line)
        talk = Path(orders[2])
        pid = os.fork()
        if not pid:
            be_script(*orders)
        (talk / "pid").write_text(str(pid))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(FileNotFoundError):
            files.write_atomic(talk / "code", str(code))
        os._exit(0)


def be_script(script, flags, talk, die_in_byte, full_after):
    """Arrange what was ordered, then be the script."""
    os.setsid()
    nothing, errors = (
        os.open(os.devnull, os.O_RDWR),
        os.open(f"{talk}/stderr", os.O_CREAT | os.O_WRONLY),
    )
    for number, to in ((0, nothing), (1, nothing), (2, errors)):
        os.dup2(to, number)
    sys.argv = [f"{script}.py", *flags]
    module, name = WORK_BEGINS[script]
    work = getattr(importlib.import_module(module), name)

    def begin(*args, **kwargs):
        Path(talk, "begun").touch()
        if die_in_byte:
            files.open = fused(die_in_byte)
        if full_after:
            files.open = filling(full_after)
        return work(*args, **kwargs)

    setattr(sys.modules[module], name, begin)
    code = 1
    try:
        cli.run(importlib.import_module(script).main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    os._exit(code)


def fused(left):
    """An `open` under which the process dies in the `left`-th byte written to temporary files."""

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            nonlocal left
            if len(data) >= left:
                self.file.write(data[:left])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left -= len(data)
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


def filling(left):
    """An `open` from whose `left`-th whole file on there is hardly any room."""

    def fill(path, mode, **kwargs):
        nonlocal left
        left -= mode == "wb"
        if left < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return open(path, mode, **kwargs)

    return fill


def expect(ended, *codes):
    """Raise where a script ended otherwise: that is no finding but a broken trial."""
    if ended.code not in codes:
        raise UserError(f"a script ended with {ended.code}, not {codes}: {ended.stderr[-2000:]}", 1)
    return ended


# ---- the world -----------------------------------------------------------------------------


class World:
    """Clips, labels and tiny models under `folder`; features and runs are made beside them."""

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
        """The features, made undisturbed, once; and the seconds that took."""
        if not self.features.is_dir():
            self.cached = expect(self.preprocess(), PARTIAL).seconds
        return self.features, self.cached

    def trained(self):
        """The run folder of an undisturbed training, made once; and the seconds that took."""
        folder = self.folder / "undisturbed"
        if not folder.is_dir():
            self.cache()
            self.learned = expect(self.train(folder), DONE).seconds
        return folder, self.learned


def make_world(folder, toy=None, clips=100):
    """A toy world, three of whose clips are damaged."""
    import prepare_annotations
    from worlds import toy_ssv2

    if toy is None:
        toy = folder / "toy"
        toy_ssv2.main([str(toy), "--clips", str(clips), "--lm-steps", "30"])
    annotations, videos = folder / "annotations", folder / "videos"
    flags = ["--labels", toy / "labels", "--paraphrases", toy / "paraphrases"]
    prepare_annotations.main([*map(str, flags), "--output", str(annotations)])
    shutil.copytree(toy / "videos", videos)
    victims = sorted(r["id"] for r in load_records(annotations, "train"))[:DAMAGED]
    for clip_id, size in zip(victims, (0, 200, 3000), strict=True):
        os.truncate(videos / f"{clip_id}.webm", size)
    return World(folder, toy, annotations, videos)


def contents(folder, only="*"):
    """{name: bytes} of a folder, without what tells the time or the folder's own name."""
    found = {}
    for path in sorted(p for p in folder.rglob(only) if p.is_file()):
        data = path.read_bytes()
        if path.name in ("args.json", "damaged.pt", ".lock"):
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        if path.name in ("last.pt", "previous.pt"):  # pickle tells who shares a string with whom
            data = files.read_torch(path)
        if path.name.startswith("evaluation_"):
            data = json.loads(data) | {"checkpoint": None}
        found[str(path.relative_to(folder))] = data
    return found


def differences(one, two):
    return sorted(k for k in one.keys() | two.keys() if not equal(one.get(k), two.get(k)))


def equal(a, b):
    """Equal bit for bit, through dicts and lists."""
    import torch

    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
