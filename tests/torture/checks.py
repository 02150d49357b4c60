"""Kill, stop, cut, flip, fill and split the real scripts, and compare with undisturbed runs bit for bit.

    make torture        (5 minutes on two cores; writes results/reliability.md; exit 1 if a row fails)

Real processes and real signals, on a toy world with tiny models, on the CPU. `make test` runs the same
with fewer repetitions (tests/test_reliability.py).
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from dataset import load_features, load_manifest
from runtime import cli, files
from runtime.cli import note
from runtime.errors import DONE, FAILED, INTERRUPTED, PARTIAL, TERMINATED, UserError
from torture.sandbox import DAMAGED, World, contents, differences, equal, expect, make_world

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


# ---- trials --------------------------------------------------------------------------------


def killed_until(kills, rng, seconds, size, attempt, fresh, whole, success):
    """Kill `kills` times at seeded times or bytes, restarting each time; compare each time it ends.

    Returns (Counter, names of files that differed).
    """
    from tqdm import tqdm

    counts, wrong, target, killed = Counter(), set(), fresh(), False
    bar = tqdm(total=kills, unit="kill", leave=False)
    while (done := counts["in work"] + counts["in a save"]) < kills or killed:
        in_save = done % 2 == 1
        how = {"kill_after": rng.uniform(0, seconds)}
        if in_save:
            how = {"die_in_byte": rng.randrange(1, size)}
        ended = attempt(target, rng, **(how if done < kills else {}))
        killed = expect(ended, success, -signal.SIGKILL).code != success
        if killed:
            counts["in a save" if in_save else "in work"] += 1
            bar.update()
        else:
            wrong.update(differences(contents(whole), contents(target)))
            counts["ends"] += 1
            target = fresh()
    bar.close()
    return counts, sorted(wrong)


def kill_row(what, counts, wrong):
    done = f"{counts['in work']} SIGKILLs at work, {counts['in a save']} inside a file's write"
    found = (
        f"{counts['ends']} finished runs, all equal bit for bit"
        if not wrong
        else f"differ: {wrong}"
    )
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
    loud = "resuming from" in ended.stderr
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
    for what, script, whole, flags in (
        ("two on one cache", world.preprocess, world.cache()[0], ()),
        ("a shard beside all", world.preprocess, world.cache()[0], ("--shard", "1/2")),
        ("two on one run folder", world.train, world.trained()[0], ()),
    ):
        folder = Path(tempfile.mkdtemp(dir=world.folder)) / "run"
        with ThreadPoolExecutor(1) as other:
            first = other.submit(script, folder)
            while not (folder / ".lock").exists():
                time.sleep(0.05)
            second = script(folder, flags=flags)
        told = "another" in second.stderr and "Traceback" not in second.stderr
        wrong = differences(contents(whole), contents(folder))
        fine = second.code == FAILED and told and not wrong and first.result().code != FAILED
        found = "the second told in one sentence, the first ended equal"
        yield Row(what, "", found if fine else f"{second.stderr[-300:]} {wrong}", fine)


def flip_features(world, flips, rng):
    cache, _ = world.cache()
    settings, counts = load_manifest(cache).settings, Counter()
    paths = sorted(cache.rglob("*.pt"))
    target = world.folder / "flipped.pt"
    for _ in range(flips):
        path = rng.choice(paths)
        flip(path, target, rng)
        counts[outcome(lambda i: load_features(i, path.stem, settings), path, target)] += 1  # noqa: B023
    yield flip_row("feature files", flips, counts)


def flip_checkpoint(world, flips, rng):
    from checkpoint import read_checkpoint

    best, target, counts = world.trained()[0] / "best.pt", world.folder / "flipped.pt", Counter()
    for _ in range(flips):
        flip(best, target, rng)
        counts[outcome(read_checkpoint, best, target)] += 1
    yield flip_row("checkpoint", flips, counts)
    whole, exploded = best.read_bytes(), world.folder / "exploded"
    strangers = [whole[: rng.randrange(len(whole))] for _ in range(50)]
    strangers += [files.torch_bytes(thing) for thing in ({"weights": [1.0]}, Bomb(exploded))]
    refused = 0
    for data in strangers:
        target.write_bytes(data)
        refused += outcome(read_checkpoint, best, target) == "found"
    fine = refused == len(strangers) and not exploded.exists()
    done = "50 times cut, a foreign one, a pickle bomb"
    yield Row("checkpoint", done, f"{refused} refused, nothing executed", fine)


class Bomb:
    """Pickled, it would make a file when loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


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


def flip_row(what, flips, counts):
    found = f"{counts['found']} found, {counts['harmless']} left every loaded value as it was"
    found += f", {counts['unnoticed']} unnoticed"
    return Row(what, f"{flips} flipped bits", found, not counts["unnoticed"])


def odd_clips(world):
    """Every clip of `odd_clips.CLIPS` through preprocess_ssv2.py; its own row each."""
    from torture import odd_clips

    os.environ["SVT_LOG"] = "0"  # the AV1 encoder would tell its life
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


def processes(world, tolerance=3e-4):
    """Two processes of torchrun and one: the same parameters, to what AdamW makes of a last bit."""
    whole, _ = world.cache()
    folder = Path(tempfile.mkdtemp(dir=world.folder)) / "features"
    expect(world.preprocess(folder, ranks=2), DONE)
    wrong = differences(contents(whole), contents(folder))
    yield Row(
        "preprocessing by 2 processes", "", f"differ: {wrong}" if wrong else "equal", not wrong
    )
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
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "av"))
    lines = f"""# What survives what

Made by `make torture` on a toy world with tiny models, on the CPU: real processes and signals, times
and places drawn by a seed. Nothing here ran on SSv2 or on a GPU. {versions}.

| | done | found |
|---|---|---|
"""
    for row in rows:
        found = row.found if row.fine else f"**NOT AS IT MUST BE** {row.found}"
        lines += f"| {row.what} | {row.done} | {found} |\n"
    return lines


if __name__ == "__main__":
    cli.run(main)
