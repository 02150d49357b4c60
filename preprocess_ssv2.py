"""Cache V-JEPA 2 features of every clip, once: <features>/<split>/<id>.pt and manifest.json.

    python preprocess_ssv2.py                 (about 4.2 MB a clip; --dry-run tells disk and time)
    python preprocess_ssv2.py --verify        (checksums, NaN, coverage)

It can be stopped at any time and started again: complete files are kept. Clips that fail are lines
in <features>/failures.jsonl, and the exit code is then 3.
"""

import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cli
import hub
from cli import DONE, FAILED, PARTIAL, UserError, note
from dataset import (
    TRAIN,
    VALIDATION,
    check_same_settings,
    load_features,
    load_manifest,
    load_records,
    save_features,
)
from files import in_shard, torch_bytes, write_atomic, write_json

ENCODER = "facebook/vjepa2-vitl-fpc64-256"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--videos", default="data/20bn-something-something-v2", help="clips' folder")
    group.add_argument(
        "--annotations", default="data/annotations", help="of prepare_annotations.py"
    )
    group.add_argument("--features", default="data/features", help="where the cache goes")
    group.add_argument("--splits", nargs="+", default=[TRAIN, VALIDATION], help="splits to encode")
    group.add_argument("--shard", type=cli.shard, default=(0, 1), help="i/n: part i (from 0) of n")
    group = parser.add_argument_group("encoder")
    group.add_argument("--encoder", default=ENCODER, help="Hub id or folder of a V-JEPA 2")
    group.add_argument("--num-frames", type=cli.whole(1), default=32, help="frames per clip")
    group.add_argument(
        "--resize",
        choices=["squash", "crop", "pad"],
        default="squash",
        help="whole view, aspect ratio lost; V-JEPA 2's central crop; whole view with bars",
    )
    group.add_argument("--batch-size", type=cli.whole(1), default=8, help="clips encoded at once")
    group = parser.add_argument_group("storage")
    group.add_argument("--store", choices=["int8", "fp16"], default="int8", help="stored numbers")
    group.add_argument(
        "--pool", type=int, choices=[1, 2, 4], default=1, help="spatial mean pooling"
    )
    group.add_argument(
        "--still", action="store_true", help="the first frame repeated: a control without motion"
    )
    group = parser.add_argument_group("modes")
    group.add_argument(
        "--dry-run", action="store_true", help="count clips, bytes and time, then stop"
    )
    group.add_argument(
        "--verify", action="store_true", help="check the cache instead of filling it"
    )
    group.add_argument(
        "--timeout", type=cli.whole(1), default=60, help="seconds to decode one clip"
    )
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    wanted = {split: load_records(args.annotations, split) for split in args.splits}
    wanted = {
        split: [r for r in records[: args.limit] if in_shard(r["id"], *args.shard)]
        for split, records in wanted.items()
    }
    if args.verify:
        return verify(Path(args.features), wanted, args.workers)
    paths, missing = find_clips(Path(args.videos), wanted)
    return fill(args, paths, missing)


def find_clips(videos, wanted):
    """({(split, id): path}, [(split, id) without a file]). Raises UserError if there are none."""
    cli.existing(videos, "--videos", "It is the folder of the clips, <id>.webm or <id>.mp4.")
    names = {entry.name for entry in os.scandir(videos)}
    paths, missing = {}, []
    for split, records in wanted.items():
        for r in records:
            for name in filter(None, (r["video"], f"{r['id']}.webm", f"{r['id']}.mp4")):
                # a set look-up instead of 220,847 stat calls; sub-folders are asked for one by one
                if name in names or ("/" in name and (videos / name).is_file()):
                    paths[split, r["id"]] = videos / name
                    break
            else:
                missing.append((split, r["id"]))
    if not paths and missing:
        raise UserError(
            f"none of the {len(missing)} clips is in --videos {videos}: looked for"
            f" {missing[0][1]}.webm, {missing[0][1]}.mp4, …; the folder holds {len(names)} files,"
            f" for example {', '.join(sorted(names)[:3]) or 'none'}"
        )
    return paths, missing


def complete(features, paths):
    """The keys of `paths` whose feature file is there: a file under its final name is complete."""
    have = {}
    for split in {split for split, _ in paths}:
        folder = features / split
        have[split] = {e.name for e in os.scandir(folder)} if folder.is_dir() else set()
    return {key for key in paths if f"{key[1]}.pt" in have[key[0]]}


def fill(args, paths, missing):
    """Encode what the cache lacks."""
    features = cli.output_folder(args.features, "--features")
    done = complete(features, paths)
    todo = {key: path for key, path in paths.items() if key not in done}
    note(f"{len(paths):,} clips found, {len(missing):,} missing, {len(done):,} already encoded")
    device, dtype = cli.device_and_dtype(args)
    asked = {
        "num_frames": args.num_frames,
        "sampling": "still" if args.still else "bin_centres",
        "resize": args.resize,
        "pool": args.pool,
        "store": args.store,
    }
    manifest = features / "manifest.json"
    theirs = load_manifest(features)["settings"] if manifest.is_file() else None
    if theirs:  # what can be told without the encoder, before it is loaded
        asked_all = asked | {
            "compute_dtype": str(dtype).removeprefix("torch."),
            "encoder_fingerprint": hub.fingerprint(hub.find_model(args.encoder, "--encoder")),
        }
        check_same_settings(theirs | asked_all, theirs, f"the cache {features}")
        if not todo and not args.dry_run:
            return report(len(done), {}, missing)

    from encoder import VideoEncoder

    encoder = VideoEncoder.from_pretrained(args.encoder, device, dtype, **asked)
    if theirs:
        check_same_settings(encoder.settings, theirs, f"the cache {features}")
    if args.dry_run:
        return dry_run(args, encoder, todo)
    features.mkdir(parents=True, exist_ok=True)
    for split in args.splits:
        (features / split).mkdir(exist_ok=True)
    if not manifest.is_file():
        write_json(manifest, {"settings": encoder.settings, "info": info(args)})

    failed = {}
    part = "_part{}of{}".format(*args.shard) if args.shard != (0, 1) else ""
    log = features / f"failures{part}.jsonl"  # shards run side by side, and each replaces its own
    keep = {key: line for key, line in read_failures(log).items() if key not in todo}
    write_atomic(log, "".join(keep.values()))  # those to be tried again may now succeed
    with open(log, "a", encoding="utf-8") as file, progress(len(todo), "clip") as bar:
        for key, error in encode(encoder, todo, features, args):
            bar.update()
            if error:
                failed[key] = error
                line = {
                    "id": key[1],
                    "split": key[0],
                    "path": str(todo[key]),
                    "reason": error[0],
                    "detail": error[1],
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
    write_atomic(log, "".join(sorted(read_failures(log).values())))
    return report(len(paths) - len(failed), failed, missing)


def encode(encoder, todo, features, args):
    """Decode, encode and save; yields (key, None or (reason, detail)) for every clip of `todo`."""
    import pool
    from video import VideoError

    def save(key, stored, decoder):
        save_features(features / key[0] / f"{key[1]}.pt", key[1], stored, decoder)

    def launch(batch):
        names = [(key, clip.decoder) for key, clip in batch]  # and not the frames
        return names, encoder.launch([clip.frames for _, clip in batch])

    def collect(names, finish):
        for (key, decoder), record in zip(names, finish(), strict=True):
            if record is None:
                yield key, ("non_finite", "the encoder returned NaN or infinity")
            else:
                writes.append((key, disk.submit(save, key, record, decoder)))

    def written(limit):
        while len(writes) > limit:
            key, write = writes.pop(0)
            write.result()  # a full disk surfaces here
            yield key, None

    batch, running, writes = [], [], []
    clips = pool.decode_many(
        todo.items(),
        args.num_frames,
        workers=args.workers,
        timeout=args.timeout,
        ahead=2 * (args.batch_size + args.workers),  # the next batch decodes while one is encoded
    )
    with ThreadPoolExecutor(4) as disk:  # fsync waits for the disk, not for us
        for key, clip in clips:
            if isinstance(clip, VideoError):
                yield key, (clip.reason, str(clip))
            elif clip.truncated:
                yield key, ("truncated", f"ends before its declared {clip.duration:.2f} s")
            else:
                batch.append((key, clip))
            if len(batch) == args.batch_size:
                # a GPU begins this batch before the last one is taken and saved
                running.append(launch(batch))
                batch = []
                while len(running) > (1 if encoder.device.type == "cuda" else 0):
                    yield from collect(*running.pop(0))
            yield from written(4 * args.batch_size)
        running += [launch(batch)] if batch else []
        for launched in running:
            yield from collect(*launched)
        yield from written(0)


def dry_run(args, encoder, todo):
    """Print what the run would need, from a few timed clips."""
    import torch

    sample = dict(list(todo.items())[: 2 * args.batch_size])
    shape = (
        encoder.settings["grid"][0] * encoder.settings["grid"][1] ** 2,
        encoder.settings["width"],
    )
    dtype = {"int8": torch.int8, "fp16": torch.float16}[args.store]
    one = torch_bytes(
        {"features": torch.zeros(shape, dtype=dtype), "scale": torch.zeros(2 * shape[1])}
    )
    needed, free = len(one) * len(todo), shutil.disk_usage(nearest_folder(args.features)).free
    print(f"bytes per clip   {len(one):,}")
    print(f"bytes needed     {needed:,} for {len(todo):,} clips, {free:,} free")
    if needed > free:
        print("                 NOT ENOUGH: --pool 2 needs a quarter, --pool 4 a sixteenth")
    if sample:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            for split, _ in sample:
                Path(folder, split).mkdir(exist_ok=True)
            times, failed = [time.perf_counter()], 0
            for _, error in encode(encoder, sample, Path(folder), args):
                times.append(time.perf_counter())
                failed += error is not None
        seconds = (times[-1] - times[0]) / len(sample) * len(todo)
        print(
            f"estimated time   {hours(seconds)} from {len(sample)} timed clips, start-up included"
        )
        if failed:
            print(f"damaged          {failed} of the {len(sample)} timed clips")
    return DONE


def hours(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds:.0f} s"


def nearest_folder(path):
    path = Path(path).absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def report(ok, failed, missing):
    """The last line, and the exit code."""
    reasons = Counter(reason for reason, _ in failed.values())
    text = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    print(
        f"{ok:,} ok, {len(failed):,} failed{f' ({text})' if text else ''}, {len(missing):,} missing"
    )
    if missing:
        note(f"missing: {', '.join(i for _, i in missing[:5])}{' …' if len(missing) > 5 else ''}")
    if not ok and (failed or missing):
        return FAILED
    return PARTIAL if failed or missing else DONE


def read_failures(path):
    """{(split, id): line} of failures.jsonl; a line cut short by a kill is dropped."""
    lines = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
                lines[entry["split"], entry["id"]] = line
            except (ValueError, KeyError, TypeError):
                continue
    return lines


def verify(features, wanted, workers):
    """Read every feature file: checksum, shape, NaN; then coverage. Exit 1 if anything is wrong."""
    settings = load_manifest(features)["settings"]

    def check(key):
        split, clip_id = key
        try:
            record = load_features(features / split / f"{clip_id}.pt", clip_id, settings)
        except UserError as error:
            return str(error)
        parts = ("scale", "offset") + (("features",) if settings["store"] == "fp16" else ())
        finite = all(record[k].isfinite().all() for k in parts)
        return None if finite else f"features of clip {clip_id} hold NaN or infinity"

    keys = [(split, r["id"]) for split, records in wanted.items() for r in records]
    have = complete(features, dict.fromkeys(keys))
    bad = []
    with ThreadPoolExecutor(max(1, workers)) as pool, progress(len(have), "file") as bar:
        for problem in pool.map(check, sorted(have)):
            bar.update()
            if problem:
                bad.append(problem)
    for problem in bad[:20]:
        note(problem)
    print(f"{len(have) - len(bad):,} whole, {len(bad):,} damaged, {len(keys) - len(have):,} absent")
    return FAILED if bad or len(have) < len(keys) else DONE


def progress(total, unit):
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, smoothing=0.05, mininterval=1)


def info(args):
    """What a manifest says without being held to it."""
    from importlib.metadata import version

    names = ("torch", "transformers", "av")
    return {
        "encoder": args.encoder,
        "versions": {name: version(name) for name in names},
        "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


if __name__ == "__main__":
    cli.run(main)
