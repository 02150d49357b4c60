"""Run the real scripts on a small toy world, end them on purpose, compare what they leave behind.

For torture.py and the tests: real processes, real signals, tiny models, on the CPU.
"""

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import cli
import files
from cli import DONE, PARTIAL, UserError
from dataset import load_records

HERE = Path(__file__).resolve().parent
WORK_BEGINS = {"train": ("runfolder", "Log"), "preprocess_ssv2": ("preprocess_ssv2", "encode_all")}
TIMING = ("seconds", "clips_per_second")
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
    begun, ours = os.pipe()
    orders = json.dumps({"begun": ours, "die_in_byte": die_in_byte, "full_after": full_after})
    command = [sys.executable, "-c", "import sandbox; sandbox.child()", script, orders]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), f"{script}.py"]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [*command, *map(str, flags)],
            cwd=HERE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            pass_fds=[ours],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        os.close(ours)
        os.read(begun, 1)  # the work begins, or the process has ended
        began = time.perf_counter()
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                if signalled:
                    os.killpg(process.pid, signalled)
                else:
                    process.kill()
            process.wait()
        os.close(begun)
        stderr.seek(0)
        return Ended(process.returncode, time.perf_counter() - began, stderr.read())


def child():
    """The other side of `run`: arrange what was ordered, then be the script."""
    script, orders, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0], orders = f"{script}.py", json.loads(orders)
    module, name = WORK_BEGINS[script]
    work = getattr(importlib.import_module(module), name)

    def begin(*args, **kwargs):
        os.write(orders["begun"], b".")
        if orders["die_in_byte"]:
            files.open = fused(orders["die_in_byte"])
        if orders["full_after"]:
            files.open = filling(orders["full_after"])
        return work(*args, **kwargs)

    setattr(sys.modules[module], name, begin)
    cli.run(importlib.import_module(script).main)


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
        flags = ["--videos", self.videos, "--annotations", self.annotations, "--workers", 2]
        flags += ["--features", features or self.features, "--encoder", self.toy / "encoder"]
        flags += ["--num-frames", 16, "--batch-size", 4, *kwargs.pop("flags", ())]
        return run("preprocess_ssv2", flags, **kwargs)

    def train(self, output, workers=0, **kwargs):
        flags = ["--features", self.features, "--annotations", self.annotations, "--no-meteor"]
        flags += ["--output", output, "--lm", self.toy / "lm", "--num-queries", 4, "--lr", 2e-3]
        flags += ["--batch-size", 4, "--grad-accum", 3, "--epochs", 3, "--warmup-steps", 2]
        flags += ["--eval-clips", 10, "--save-every", 2, "--allow-missing", DAMAGED]
        flags += ["--workers", workers, "--resume", *kwargs.pop("flags", ())]
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
    import toy_ssv2

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
        if path.name in ("args.json", ".lock"):
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
