"""Kill, stop, cut, flip, fill and split the real scripts, and compare with undisturbed runs bit for bit.

    python torture.py        (10 minutes on two cores; writes results/reliability.md; exit 1 if a row fails)

Real processes and real signals, on a toy world with tiny models, on the CPU. `make test` runs the same
with fewer repetitions (tests/test_reliability.py).
"""

import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from contextlib import suppress
from pathlib import Path

import cli
import files
from cli import DONE, FAILED, INTERRUPTED, PARTIAL, TERMINATED, UserError, note
from dataset import load_features, load_manifest, load_records

HERE = Path(__file__).resolve().parent
WORK_BEGINS = {"train": ("runfolder", "Log"), "preprocess_ssv2": ("preprocess_ssv2", "encode_all")}
TIMING = ("seconds", "clips_per_second")
DAMAGED = 3  # clips of the world that no run may take

Ended = namedtuple("Ended", "code seconds stderr")
Row = namedtuple("Row", "what done found fine")


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--output", default="results/reliability.md", help="the table")
    parser.add_argument("--kills", type=cli.whole(1), default=20, help="of each script")
    parser.add_argument("--flips", type=cli.whole(1), default=1000, help="flipped bytes")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="seed of times and places")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        rows = []
        for trial in (
            lambda: kill_preprocessing(world, args.kills, rng),
            lambda: shards(world, rng),
            lambda: flip_features(world, args.flips, rng),
            lambda: odd_clips(world),
            lambda: kill_training(world, args.kills, rng),
            lambda: stop_training(world, 4, rng),
            lambda: flip_checkpoint(world, args.flips, rng),
            lambda: fill_the_disk(world),
            lambda: processes(world),
            lambda: two_at_once(world),
        ):
            for row in trial():
                rows.append(row)
                note(f"{'ok  ' if row.fine else 'FAIL'} {row.what}: {row.done}: {row.found}")
    files.write_atomic(args.output, markdown(rows))
    print(f"{sum(row.fine for row in rows)} of {len(rows)} rows as they must be, in {args.output}")
    return DONE if all(row.fine for row in rows) else FAILED


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
    command = [sys.executable, "-c", "import torture; torture.child()", script, orders]
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


# ---- trials --------------------------------------------------------------------------------


def killed_until(kills, rng, seconds, size, attempt, fresh, whole, success):
    """Kill `kills` times at seeded times or bytes, restarting each time; compare each time it ends.

    Returns (Counter, names of files that differed).
    """
    counts, wrong, target, killed = Counter(), set(), fresh(), False
    while (done := counts["in work"] + counts["in a save"]) < kills or killed:
        in_save = done % 2 == 1
        how = {"kill_after": rng.uniform(0, seconds)}
        if in_save:
            how = {"die_in_byte": rng.randrange(1, size)}
        ended = attempt(target, rng, **(how if done < kills else {}))
        killed = expect(ended, success, -signal.SIGKILL).code != success
        if killed:
            counts["in a save" if in_save else "in work"] += 1
        else:
            wrong.update(differences(contents(whole), contents(target)))
            counts["ends"] += 1
            target = fresh()
    return counts, sorted(wrong)


def kill_row(what, counts, wrong):
    done = f"{counts['in work']} SIGKILLs at work, {counts['in a save']} inside a file's write"
    found = f"{counts['ends']} ends, all equal bit for bit" if not wrong else f"differ: {wrong}"
    return Row(what, done, found, not wrong)


def kill_preprocessing(world, kills, rng):
    whole, seconds = world.cache()
    size = sum(p.stat().st_size for p in whole.rglob("*.pt")) // 3

    def fresh():
        return Path(tempfile.mkdtemp(dir=world.folder)) / "features"

    counts, wrong = killed_until(
        *(kills, rng, seconds, size),
        lambda target, rng, **how: world.preprocess(target, **how),
        *(fresh, whole, PARTIAL),
    )
    yield kill_row("preprocessing", counts, wrong)
    lines = [json.loads(s) for s in (whole / "failures.jsonl").read_text().splitlines()]
    reasons = ", ".join(sorted(line["reason"] for line in lines))
    found = f"{len(lines)} lines in failures.jsonl: {reasons}"
    yield Row("damaged clips of its world", f"{DAMAGED}", found, len(lines) == DAMAGED)


def kill_training(world, kills, rng):
    whole, seconds = world.trained()
    size = 5 * (whole / "last.pt").stat().st_size

    def fresh():
        return Path(tempfile.mkdtemp(dir=world.folder)) / "run"

    counts, wrong = killed_until(
        *(kills, rng, seconds, size),
        lambda target, rng, **how: world.train(target, rng.choice((0, 2)), **how),
        *(fresh, whole, DONE),
    )
    yield kill_row("training, dropout on, 0 or 2 loader workers", counts, wrong)

    broken = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
    shutil.copytree(whole, broken)
    with open(broken / "last.pt", "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 500)
    ended = expect(world.train(broken, kill_after=0), DONE, -signal.SIGKILL)
    expect(world.train(broken), DONE)  # also after a second kill
    wrong = differences(contents(whole), contents(broken))
    loud = "WARNING: continuing from" in ended.stderr
    found = "said so, went on from previous.pt, ended equal" if loud and not wrong else str(wrong)
    yield Row("last.pt damaged", "500 bytes", found, loud and not wrong)


def stop_training(world, times, rng):
    """Signals to the whole process group, loader workers included, as batch systems send them."""
    whole, seconds = world.trained()
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
    codes, steps = [], []
    for n in range(times):
        number = (signal.SIGTERM, signal.SIGINT)[n % 2]
        after = rng.uniform(0, seconds / times)
        ended = world.train(folder, 2, kill_after=after, signalled=number)
        codes.append(ended.code == (TERMINATED, INTERRUPTED)[n % 2])
        steps.append(files.read_torch(folder / "last.pt")["step"])
    expect(world.train(folder), DONE)
    wrong = differences(contents(whole), contents(folder))
    fine = all(codes) and not wrong and steps == sorted(set(steps))
    found = "saved and left with 143 / 130 each time, ended equal" if fine else f"{codes} {wrong}"
    yield Row("training asked to stop", f"{times} x SIGTERM or Ctrl-C to the group", found, fine)


def shards(world, rng):
    whole, seconds = world.cache()
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "features"
    for part in range(3):
        expect(world.preprocess(folder, flags=["--shard", f"{part}/3"]), DONE, PARTIAL)
    wrong = differences(contents(whole, "*.pt"), contents(folder, "*.pt"))
    yield Row(
        "3 shards", "one after the other", f"differ: {wrong}" if wrong else "equal", not wrong
    )
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "features"
    world.preprocess(folder, flags=["--shard", "0/3"], kill_after=rng.uniform(0.2, seconds / 3))
    for part in range(2):
        expect(world.preprocess(folder, flags=["--shard", f"{part}/2"]), DONE, PARTIAL)
    expect(world.preprocess(folder), PARTIAL)
    wrong = differences(contents(whole), contents(folder))
    found = f"differ: {wrong}" if wrong else "equal, failures gathered in one file"
    yield Row("shard 0/3 killed, 0/2 and 1/2 instead, then all", "", found, not wrong)


def two_at_once(world):
    """The second process on one cache, or one run folder, is told and leaves."""
    for what, script, folder, part in (
        ("two on one cache", world.preprocess, world.features, (0, 1)),
        ("a shard beside all", world.preprocess, world.features, (1, 2)),
        ("two on one run folder", world.train, world.trained()[0], (0, 1)),
    ):
        before = contents(folder)
        with files.lock(folder, "nobody else is here", *part):
            ended = script(folder)
        told = "another" in ended.stderr and "Traceback" not in ended.stderr
        fine = ended.code == FAILED and told and not differences(contents(folder), before)
        yield Row(what, "", "told in one sentence, left" if fine else ended.stderr[-300:], fine)


def flip_features(world, flips, rng):
    cache, _ = world.cache()
    settings, counts = load_manifest(cache)["settings"], Counter()
    paths = sorted(cache.rglob("*.pt"))
    target = world.folder / "flipped.pt"
    for _ in range(flips):
        path = rng.choice(paths)
        flip(path, target, rng)
        counts[outcome(lambda i: load_features(i, path.stem, settings), path, target)] += 1  # noqa: B023
    yield flip_row("feature files", flips, counts)


def flip_checkpoint(world, flips, rng):
    from captioner import read_checkpoint

    best, target, counts = world.trained()[0] / "best.pt", world.folder / "flipped.pt", Counter()
    for _ in range(flips):
        flip(best, target, rng)
        counts[outcome(read_checkpoint, best, target)] += 1
    yield flip_row("checkpoint", flips, counts)
    whole, refused = best.read_bytes(), 0
    for _ in range(50):
        target.write_bytes(whole[: rng.randrange(len(whole))])
        refused += outcome(read_checkpoint, best, target) == "found"
    yield Row("checkpoint", "50 times cut", f"{refused} refused", refused == 50)


def flip(path, target, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    target.write_bytes(data)


def outcome(read, path, target):
    """What reading `target`, a damaged copy of `path`, ends in."""
    try:
        value = read(target)
    except UserError:
        return "found"
    return "harmless" if equal(read(path), value) else "unnoticed"


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


def flip_row(what, flips, counts):
    found = f"{counts['found']} found, {counts['harmless']} left every loaded value as it was"
    found += f", {counts['unnoticed']} unnoticed"
    return Row(what, f"{flips} flipped bits", found, not counts["unnoticed"])


def odd_clips(world):
    """Every clip of `odd_clips.CLIPS` through preprocess_ssv2.py; its own row each."""
    import odd_clips

    folder = Path(tempfile.mkdtemp(dir=world.folder))
    (folder / "videos").mkdir()
    (folder / "annotations").mkdir()
    records, kept = [], {}
    for n, (what, (suffix, make, *_)) in enumerate(odd_clips.CLIPS.items()):
        try:
            make(folder / "videos" / f"{n}{suffix}")
        except ValueError:
            note(f"no encoder here for {what}")
            continue
        records.append({"id": str(n), "video": f"{n}{suffix}", "label": what.replace("%", "")})
        kept[str(n)] = what
    files.write_json(folder / "annotations" / "train.json", records)
    ours = World(folder, world.toy, folder / "annotations", folder / "videos")
    ended = expect(ours.preprocess(flags=["--splits", "train"]), PARTIAL)
    log = (ours.features / "failures.jsonl").read_text().splitlines()
    failed = {line["id"]: line["reason"] for line in map(json.loads, log)}
    for clip_id, what in kept.items():
        *_, status, decoder = odd_clips.CLIPS[what]
        path, got = ours.features / "train" / f"{clip_id}.pt", failed.get(clip_id)
        by = files.read_torch(path)["decoder"] if path.is_file() else None
        fine = (got or "ok", by) == (status, decoder) and "Traceback" not in ended.stderr
        yield Row("clip", what, f"{got or 'ok'}{f', by {by}' if by else ''}", fine)


def fill_the_disk(world):
    """No room in the middle of the work: old files stay, it is said, and it goes on when there is."""
    for script, whole, success, kept in (
        ("train", world.trained()[0], DONE, "last.pt"),
        ("preprocess", world.cache()[0], PARTIAL, "train"),
    ):
        folder = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
        ended = expect(getattr(world, script)(folder, full_after=20), FAILED)
        said = "the disk is full" in ended.stderr and "Traceback" not in ended.stderr
        old = (folder / kept).exists() and not list(folder.rglob("*.tmp"))
        expect(getattr(world, script)(folder), success)
        wrong = differences(contents(whole), contents(folder))
        found = "said in one sentence, old files whole, ended equal when there was room"
        if not (said and old and not wrong):
            found = f"said: {said}, old files there: {old}, differ: {wrong}"
        yield Row(f"disk full in {script}", "", found, said and old and not wrong)


def processes(world, tolerance=1e-3):
    """Two processes of torchrun and one: the same parameters, to what AdamW makes of a last bit."""
    whole, seconds = world.trained()
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
    expect(world.train(folder, ranks=2), DONE)
    yield process_row("2 processes instead of 1", whole, folder, tolerance)
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
    world.train(folder, kill_after=seconds / 2)
    expect(world.train(folder, ranks=2), DONE)
    yield process_row("1 process killed, 2 go on", whole, folder, tolerance)


def process_row(what, whole, folder, tolerance):
    one, two = (files.read_torch(f / "last.pt") for f in (whole, folder))
    gaps = [(one["qformer"][k] - two["qformer"][k]).abs().max().item() for k in one["qformer"]]
    tokens = [
        [json.loads(line)["tokens"] for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, folder)
    ]
    same = one["step"] == two["step"] and tokens[0] == tokens[1]
    fine = same and max(gaps) < tolerance
    found = (
        f"parameters within {max(gaps):.1e} after {one['step']} steps, tokens of each step equal"
    )
    return Row(what, "", found if fine else f"{max(gaps)} {same}", fine)


# ---- the report ----------------------------------------------------------------------------


def markdown(rows):
    lines = ["# What survives what", ""]
    lines += [
        "Made by `make torture` on a toy world with tiny models, on the CPU: real processes and"
    ]
    lines += [
        "signals, times and places drawn by a seed. Nothing here ran on SSv2 or on a GPU.",
        "",
    ]
    lines += ["| | done | found |", "|---|---|---|"]
    for row in rows:
        found = row.found if row.fine else f"**NOT AS IT MUST BE** {row.found}"
        lines.append(f"| {row.what} | {row.done} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
