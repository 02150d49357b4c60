"""Kill, stop, truncate, corrupt and shard the real scripts, and compare with undisturbed runs.

tests/test_reliability.py runs every trial: with few repetitions in `make test`, with many in
`make torture`, which writes results/reliability.md. A trial takes (world, repetitions, rng) and
yields rows of the table.
"""

import json
import os
import signal
import tempfile
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shutil import copytree

from checkpoint import read_checkpoint
from runtime import files
from runtime.errors import DONE, FAILED, PARTIAL, SIGNALLED, UserError
from runtime.feature_cache import load_features, load_manifest
from runtime.provenance import summary
from torture.odd_clips import CLIPS
from torture.sandbox import DAMAGED, World, differences, equal, expect

Repetitions = namedtuple("Repetitions", "kills stops flips")
Row = namedtuple("Row", "test details result problems")  # the row holds if `problems` is empty

REPETITIONS = {"small": Repetitions(2, 1, 200), "full": Repetitions(20, 4, 1000)}
TOLERANCE = 3e-4  # effect of AdamW on the rounding of sums in another order


def unmet(**conditions):
    """Return the names of the conditions that are false, for a row's problems."""
    return [f"not {name}" for name, holds in conditions.items() if not holds]


# ---- kills and signals ---------------------------------------------------------------------


def kill_repeatedly(world, kills, rng, attempt, whole, limits, success):
    """Kill a script `kills` times and restart it each time. Return (details, result, problems).

    attempt(folder, **how): runs the script. whole: what an undisturbed run wrote. limits: seconds of
    work, and bytes, within which to kill. success: the exit code of a finished run.
    """
    counts, problems, folder, killed = Counter(), [], world.new(), False
    while (done := counts["work"] + counts["write"]) < kills or killed:
        place, how = "work", {"kill_after": rng.uniform(0, limits[0])}
        if done % 2:
            place, how = "write", {"kill_at": rng.randrange(1, limits[1])}
        ended = attempt(folder, **(how if done < kills else {}))
        killed = expect(ended, success, -signal.SIGKILL).code != success
        if killed:
            counts[place] += 1
        else:
            problems += differences(whole, folder)
            counts["finished"] += 1
            folder = world.new()
    details = f"{counts['work']} SIGKILLs while working, {counts['write']} while writing a file"
    return details, f"{counts['finished']} finished runs, all identical bit for bit", problems


def kill_preprocessing(world, repetitions, rng):
    whole, seconds = world.cache()
    limits = seconds, sum(p.stat().st_size for p in whole.rglob("*.pt")) // 3
    row = kill_repeatedly(
        world, repetitions.kills, rng, world.preprocess, whole, limits, success=PARTIAL
    )
    yield Row("preprocessing killed and restarted", *row)

    reasons = sorted(failures(whole).values())
    result = f"{len(reasons)} lines in failures.jsonl: {', '.join(reasons)}"
    problems = unmet(complete=len(reasons) == DAMAGED)
    yield Row("damaged clips in that data set", f"{DAMAGED}", result, problems)


def failures(features):
    """Return {id: reason} of the clips that could not be used."""
    lines = (features / "failures.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def kill_training(world, repetitions, rng):
    whole, seconds = world.trained()

    def attempt(folder, **how):
        return world.train(folder, rng.choice((0, 2)), **how)

    limits = seconds, 5 * (whole / "last.pt").stat().st_size
    row = kill_repeatedly(world, repetitions.kills, rng, attempt, whole, limits, success=DONE)
    yield Row("training killed and resumed, dropout on, 0 or 2 loader workers", *row)


def corrupt_last_checkpoint(world, repetitions, rng):
    whole, _ = world.trained()
    folder = copytree(whole, world.new())
    with open(folder / "last.pt", "r+b") as file:
        file.seek(2000)
        file.write(b"\0" * 500)
    ended = expect(world.train(folder, kill_after=0), DONE, -signal.SIGKILL)
    expect(world.train(folder), DONE)  # also after another kill
    problems = differences(whole, folder) + unmet(warned="resuming from" in ended.stderr)
    result = "training warned, resumed from previous.pt and ended in the same bits"
    yield Row("last.pt corrupted", "500 bytes overwritten", result, problems)


def stop_training(world, repetitions, rng):
    """Signals go to the whole process group, loader workers included, as batch systems send them."""
    whole, seconds = world.trained()
    folder, problems, steps = world.new(), [], []
    for n in range(repetitions.stops):
        number = (signal.SIGTERM, signal.SIGINT)[n % 2]
        after = rng.uniform(0, seconds / (repetitions.stops + 1))  # before the run ends
        ended = world.train(folder, 2, kill_after=after, stop_with=number)
        if ended.code != SIGNALLED + number:
            problems.append(f"exit code {ended.code}")
        steps.append(files.read_torch(folder / "last.pt")["step"])
    expect(world.train(folder), DONE)
    problems += differences(whole, folder)
    if steps != sorted(steps):  # a stop during validation saves the same step again
        problems.append(f"saved at steps {steps}")
    details = f"{repetitions.stops} x SIGTERM or Ctrl-C to the process group"
    result = "saved and exited with 143 or 130 each time, ended in the same bits"
    yield Row("training stopped and resumed", details, result, problems)


# ---- damaged files -------------------------------------------------------------------------


def flip_features(world, repetitions, rng):
    cache, _ = world.cache()
    settings, paths = load_manifest(cache).settings, sorted(cache.rglob("*.pt"))
    counts, damaged = Counter(), world.folder / "flipped.pt"
    for path in rng.choices(paths, k=repetitions.flips):
        read = partial(load_features, clip_id=path.stem, settings=settings)
        damaged.write_bytes(flipped(path.read_bytes(), rng))
        counts[outcome(read, path, damaged)] += 1
    yield flip_row("bit flips in feature files", counts)


def flip_checkpoint(world, repetitions, rng):
    best, damaged = world.trained()[0] / "best.pt", world.folder / "flipped.pt"
    whole, executed = best.read_bytes(), world.folder / "executed"

    def read(contents):
        for data in contents:
            damaged.write_bytes(data)
            yield outcome(read_checkpoint, best, damaged)

    counts = Counter(read(flipped(whole, rng) for _ in range(repetitions.flips)))
    yield flip_row("bit flips in a checkpoint", counts)

    invalid = [whole[: rng.randrange(len(whole))] for _ in range(50)]
    invalid += [files.torch_bytes(value) for value in ({"weights": [1.0]}, Bomb(executed))]
    refused = Counter(read(invalid))["detected"]
    problems = unmet(refused=refused == len(invalid), safe=not executed.exists())
    result = f"all {refused} refused, nothing executed"
    yield Row("invalid checkpoints", "50 truncated, 1 foreign, 1 pickle bomb", result, problems)


def flipped(data, rng):
    """Return a copy of `data` with one bit flipped."""
    data = bytearray(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def outcome(read, path, damaged):
    """Return the effect of the damage to `damaged`, a copy of `path`, on reading it."""
    try:
        value = read(damaged)
    except UserError:
        return "detected"
    return "harmless" if equal(read(path), value) else "undetected"


def flip_row(test, counts):
    result = f"{counts['detected']} detected, {counts['harmless']} without effect on loaded values"
    result += f", {counts['undetected']} undetected"
    return Row(test, f"{counts.total()} flips", result, [result] if counts["undetected"] else [])


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def odd_clips(world, repetitions, rng):
    """Pass every clip of `odd_clips.CLIPS` through preprocess_ssv2.py."""
    os.environ["SVT_LOG"] = "0"  # silences the AV1 encoder
    folder = Path(tempfile.mkdtemp(dir=world.folder))
    clips = World(folder, world.toy, folder / "annotations", folder / "videos")
    clips.videos.mkdir()
    records = []
    for n, (name, (suffix, make, *_)) in enumerate(CLIPS.items()):
        try:
            make(clips.videos / f"{n}{suffix}")
        except ValueError:
            yield Row("clip", name, "skipped: PyAV has no encoder for it", [])
            continue
        records.append({"id": str(n), "video": f"{n}{suffix}", "label": name.replace("%", "")})
    clips.annotations.mkdir()
    files.write_json(clips.annotations / "train.json", records)
    ended = expect(clips.preprocess(flags=["--splits", "train"]), PARTIAL)

    failed = failures(clips.features)
    for record in records:
        name, path = list(CLIPS)[int(record["id"])], clips.features / "train" / f"{record['id']}.pt"
        status = failed.get(record["id"], "ok")
        decoder = files.read_torch(path)["decoder"] if path.is_file() else None
        problems = unmet(
            expected=(status, decoder) == CLIPS[name][2:], handled="Traceback" not in ended.stderr
        )
        yield Row("clip", name, status + (f", decoded by {decoder}" if decoder else ""), problems)


# ---- full disk, shards, several processes --------------------------------------------------


def fill_disk(world, repetitions, rng):
    for name, script, (whole, _), success, kept in (
        ("training", world.train, world.trained(), DONE, "last.pt"),
        ("preprocessing", world.preprocess, world.cache(), PARTIAL, "train"),
    ):
        folder = world.new()
        ended = expect(script(folder, full_after=10), FAILED)
        problems = unmet(
            message="the disk is full" in ended.stderr and "Traceback" not in ended.stderr,
            intact=(folder / kept).exists() and not list(folder.rglob("*.tmp")),
        )
        expect(script(folder), success)
        result = "stopped with a message, existing files intact; restarted with space: identical"
        yield Row(f"disk full during {name}", "", result, problems + differences(whole, folder))


def shards(world, repetitions, rng):
    whole, seconds = world.cache()

    def preprocess(folder, shard, **kwargs):
        return world.preprocess(folder, flags=["--shard", shard], **kwargs)

    folder = world.new()
    for shard in ("0/3", "1/3", "2/3"):
        expect(preprocess(folder, shard), DONE, PARTIAL)
    yield Row("3 shards", "in turn", "identical features", differences(whole, folder, "*.pt"))

    folder = world.new()
    preprocess(folder, "0/3", kill_after=rng.uniform(0.2, seconds / 3))
    for shard in ("0/2", "1/2"):
        expect(preprocess(folder, shard), DONE, PARTIAL)
    expect(world.preprocess(folder), PARTIAL)
    test = "shard 0/3 killed, then 0/2, 1/2 and the whole"
    yield Row(test, "", "identical, failures merged into one file", differences(whole, folder))


def two_at_once(world, repetitions, rng):
    """Start a second process on the same cache or run folder while the first one works."""
    for test, script, (whole, _), flags in (
        ("two processes on one cache", world.preprocess, world.cache(), ()),
        ("a shard and the whole on one cache", world.preprocess, world.cache(), ("--shard", "1/2")),
        ("two processes on one run folder", world.train, world.trained(), ()),
    ):
        folder = world.new()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(script, folder)
            while not (folder / ".lock").exists():
                time.sleep(0.05)
            second = script(folder, flags=flags)
        problems = differences(whole, folder) + unmet(
            refused=second.code == FAILED and first.result().code != FAILED,
            message="another" in second.stderr and "Traceback" not in second.stderr,
        )
        result = "the second exited with a message, the first finished with identical files"
        yield Row(test, "", result, problems)


def distributed(world, repetitions, rng):
    """Compare two processes of torchrun with one, in uninterrupted and in resumed runs."""
    features, _ = world.cache()
    folder = world.new()
    expect(world.preprocess(folder, processes=2), DONE)
    problems = differences(features, folder)
    yield Row("preprocessing by 2 processes", "", "identical", problems)

    whole, seconds = world.trained()
    folder = world.new()
    expect(world.train(folder, processes=2), DONE)
    yield distributed_row("training by 2 processes instead of 1", whole, folder)

    folder = world.new()
    world.train(folder, kill_after=seconds / 2)
    expect(world.train(folder, processes=2), DONE)
    yield distributed_row("training by 1 process killed, resumed by 2", whole, folder)


def distributed_row(test, whole, folder):
    one, two = (files.read_torch(f / "last.pt") for f in (whole, folder))
    gap = max((one["qformer"][k] - two["qformer"][k]).abs().max().item() for k in one["qformer"])
    logs = [(f / "metrics.jsonl").read_text().splitlines() for f in (whole, folder)]
    tokens = [[json.loads(line)["tokens"] for line in log] for log in logs]
    problems = unmet(steps=one["step"] == two["step"], tokens=tokens[0] == tokens[1])
    if not gap < TOLERANCE:
        problems.append(f"parameters differ by {gap:.1e}")
    result = f"parameters within {gap:.1e} after {one['step']} steps, equal tokens in every step"
    return Row(test, "", result, problems)


TRIALS = (
    *(kill_preprocessing, shards, flip_features, odd_clips, kill_training),
    *(corrupt_last_checkpoint, stop_training, flip_checkpoint, fill_disk, distributed, two_at_once),
)


def markdown(rows):
    """Return the text of results/reliability.md."""
    lines = f"""# Results of the torture tests

Made by `make torture` on the toy world with tiny models, on the CPU. Processes and signals are real; the
moments of the kills and the damaged bytes are sampled with a fixed seed. Nothing here ran on SSv2 or on a GPU.
{summary()}.

| test | details | result |
|---|---|---|
"""
    for row in rows:
        result = f"**FAILED**: {', '.join(row.problems)}" if row.problems else row.result
        lines += f"| {row.test} | {row.details} | {result} |\n"
    return lines
