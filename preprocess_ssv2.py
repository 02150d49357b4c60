"""Compute and cache the features of every clip: <features>/<split>/<id>.pt and manifest.json.

    python preprocess_ssv2.py                 (about 4.2 MB per clip; --dry-run estimates disk and time)
    python preprocess_ssv2.py --verify        (checksums, NaN, coverage)
    torchrun --nproc-per-node 4 preprocess_ssv2.py       (a share of the clips on each of four GPUs)

You can stop it at any time and start it again, with the same --shard or another. Clips that are done are
skipped, unless their files have changed (see runtime/sources.py). Clips that fail are recorded in
<features>/failures.jsonl (failures_part<i>of<n>.jsonl for a shard), and the exit code is then 3 (0 under
torchrun).
"""

import runtime.start

import os
import shutil
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dataset import TRAIN, VALIDATION, load_records
from encoder import FAMILIES, VideoEncoder, encode_files
from runtime import cli, clip_files, clip_log, devices, distributed, hub, ranks, sources
from runtime.cli import note
from runtime.decode_workers import WorkerPool
from runtime.errors import DONE, FAILED, PARTIAL, UserError, VideoError
from runtime.feature_cache import (
    CHOICES,
    MANIFEST,
    SOURCES,
    STORES,
    Manifest,
    complete,
    feature_file,
    load_manifest,
    recorded_sources,
    save_features,
    source_entry,
    verify,
)
from runtime.files import (
    in_shard,
    json_bytes,
    lock,
    read_json,
    remove_unfinished,
    torch_bytes,
    write_new,
)
from runtime.names import counted, duration, file_size, first_few, list_names, visible

FAILURES = "failures"  # the name of failures.jsonl in clip_log


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add(
        "--videos",
        help=f"folder that contains the clips (default: {cli.VIDEOS}); --verify looks for changed clips only"
        " if this flag is given",
    )
    add("--annotations", default=cli.ANNOTATIONS, help="folder written by prepare_annotations.py")
    add("--features", default=cli.FEATURES, help="folder of the feature cache")
    text = f"splits to encode (default: {TRAIN} {VALIDATION})"
    add("--split", "--splits", dest="splits", nargs="+", action="extend", help=text)
    add(
        "--shard",
        type=cli.shard,
        default="0/1",
        help="process only part i of n, written i/n, with i from 0 to n - 1; 0/1 means all clips",
    )
    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", default=cli.ENCODER, help=f"Hub id or folder; types: {', '.join(FAMILIES)}")
    add(
        "--num-frames",
        type=cli.whole(1),
        default=32,
        help="frames per clip; some encoders take only one number",
    )
    add(
        "--resize",
        choices=CHOICES["resize"],
        default="squash",
        help="how to make frames square; squash: the whole picture, distorted; crop: its centre, as V-JEPA 2"
        " does; pad: the whole picture, with bars",
    )
    add("--batch-size", type=cli.whole(1), default=8, help="clips per batch")
    add = parser.add_argument_group("storage").add_argument
    add("--store", choices=CHOICES["store"], default="int8", help="data type of stored features")
    add(
        "--pool",
        type=int,
        choices=[1, 2, 4],
        default=1,
        help="average the features over squares of POOL x POOL tokens",
    )
    add(
        "--still",
        action="store_true",
        help="repeat the first frame of each clip, as a control without motion",
    )
    add = parser.add_argument_group("modes").add_argument
    add("--dry-run", action="store_true", help="estimate disk space and time, then exit")
    add(
        "--verify",
        action="store_true",
        help="check an existing cache instead of computing features",
    )
    add("--timeout", type=cli.whole(1), default=60, help="seconds allowed to decode one clip")
    cli.add_common(parser)
    args = parser.parse_args(argv)
    args.splits = args.splits or [TRAIN, VALIDATION]
    return args


def main(argv=None):
    args = parse_args(argv)
    splits = {s: load_records(args.annotations, s)[: args.limit] for s in args.splits}
    records = {(split, r["id"]): r for split, clips in splits.items() for r in clips}
    if args.dry_run:
        return dry_run(args, records) if ranks.rank() == 0 else DONE
    with distributed.joined():
        part = ranks.share_of_shard(*args.shard)
        if args.verify:
            paths = files_of_part(args.videos, records, part)[0] if args.videos else None
            keys = in_part(records, part)
            return verify(Path(args.features), keys, paths, spans_of(records), part, args.workers)
        paths, missing = files_of_part(args.videos or cli.VIDEOS, records, part)
        device, dtype = devices.resolve(args.device, args.dtype)
        features = cli.output_folder(args.features, "--features")
        busy = (
            f"another preprocess_ssv2.py is filling {features}: wait for it, or use --shard in both"
        )
        with lock(features, busy, *part):
            failed = fill(args, features, part, paths, spans_of(records), missing, device, dtype)
        return report(len(paths) - len(failed), failed, missing)


def in_part(keys, part):
    """Return the keys (split, id) that are in part i of n."""
    return [key for key in keys if in_shard(key[1], *part)]


def files_of_part(videos, records, part):
    """Find the files of one part. Returns ({key: path}, [keys without a file]).

    Raises UserError if no clip of any part has a file.
    """
    paths, missing = clip_files.find_files(Path(videos), records)
    return {key: paths[key] for key in in_part(paths, part)}, in_part(missing, part)


def spans_of(records):
    """Return {key: (start, end)} in seconds of the records that are a part of their file."""
    return {k: (r["start"], r["end"]) for k, r in records.items() if r["end"] is not None}


class Work(NamedTuple):
    """What there is to do for one part.

    todo: {key: (path, span or None)} of the clips to encode. changed: the keys of those that have features
    of an earlier version of the file or of another span. sources: {key: `Source`} of the clips in the
    cache. unrecorded: the number of them whose source was not recorded until now. without_file: the number
    of clips with features, but no file.
    """

    todo: dict
    changed: set
    sources: dict
    unrecorded: int
    without_file: int


def find_work(features, paths, spans, missing, part):
    """Compare the clips of one part, {key: path} and the keys without a file, with the cache.

    spans: see `spans_of`. Returns a `Work`.
    """
    known, encoded = recorded_sources(features, part), complete(features, paths)
    changed, current = sources.compare({key: paths[key] for key in encoded}, known)
    changed |= {k for k in encoded if spans.get(k) != (known[k].span if k in known else None)}
    todo = {k: (path, spans.get(k)) for k, path in paths.items() if k not in encoded - changed}
    unrecorded = sum(key not in known for key in current)
    without_file = len(complete(features, missing))
    return Work(todo, changed, known | current, unrecorded, without_file)


def fill(args, features, part, paths, spans, missing, device, dtype):
    """Encode the clips of one part that are not in the cache yet. Returns {key: reason} of those that fail.

    part: this process's share of --shard, as (i, n). paths: {key: path} of the clips in this part.
    spans: see `spans_of`. missing: the keys of the clips in this part that have no file.
    """
    check_cache(args, features, dtype)
    failures = old_failures(features, part, {*paths, *missing})
    work = find_work(features, paths, spans, missing, part)
    note_counts(*map(int, distributed.sums(*counts(paths, missing, work))))
    encoder = matching_encoder(args, features, device, dtype) if work.todo else None
    clear(features, args.splits, part)
    entries = {key: source_entry(key, source) for key, source in work.sources.items()}
    with (
        clip_log.appending(features, FAILURES, args.shard, part, failures) as log_failure,
        clip_log.appending(features, SOURCES, args.shard, part, entries) as log_source,
    ):
        if not work.todo:
            return {}
        pool = WorkerPool(args.workers, args.timeout)
        logs = log_failure, log_source
        return encode_all(encoder, work, features, args.batch_size, pool, *logs)


def counts(paths, missing, work):
    """Return the arguments of `note_counts` for one part."""
    encoded = len(paths) - len(work.todo)
    return (
        *(len(paths), len(missing), encoded),
        *(len(work.changed), work.unrecorded, work.without_file),
    )


def note_counts(found, missing, encoded, changed, unrecorded, without_file):
    note(f"{counted(found, 'clip')} found, {missing:,} missing, {encoded:,} already encoded")
    if changed:
        clips = counted(
            changed, "clip has changed since it was", "clips have changed since they were"
        )
        note(f"{clips} encoded; new features replace the old ones one by one")
    if unrecorded:
        clips = counted(unrecorded, "clip has", "clips have")
        note(
            f"{clips} features but no valid line in {SOURCES}.jsonl, as in caches of earlier versions; the"
            " features are kept as those of the present files, and later changes will be noticed"
        )
    if without_file:
        clips = counted(without_file, "missing clip has", "missing clips have")
        note(f"{clips} features of an earlier run, which are kept and used in training")


def old_failures(features, part, clips):
    """Return the entries of failures.jsonl to keep: of clips not in `clips` that have no features yet."""
    entries = clip_log.read(features, FAILURES, part)
    return {
        k: e
        for k, e in entries.items()
        if k not in clips and not feature_file(features, *k).exists()
    }


def clear(features, splits, part):
    """Create the folders of the splits and delete this part's unfinished files of killed runs."""
    for split in splits:
        (features / split).mkdir(exist_ok=True)
        remove_unfinished(features / split, lambda name: in_shard(name.removesuffix(".pt"), *part))
    if part == (0, 1):
        remove_unfinished(features)


def flag_settings(args):
    """Return the values of `Settings` that the flags give."""
    return {
        "num_frames": args.num_frames,
        "sampling": "still" if args.still else "bin_centres",
        "resize": args.resize,
        "pool": args.pool,
        "store": args.store,
    }


def check_cache(args, features, dtype):
    """Raise UserError if the settings that are known without loading the encoder differ from the cache's."""
    existing = existing_settings(features)
    if not existing and any(list_names(folder, ".pt") for folder in visible(features)):
        raise UserError(
            f"{features} contains features but no {MANIFEST}, which records how they were made: restore"
            " it, or use another folder"
        )
    if existing:
        known = flag_settings(args) | {
            "compute_dtype": str(dtype).removeprefix("torch."),
            "encoder_fingerprint": hub.fingerprint(hub.find_model(args.encoder, "--encoder")),
        }
        replace(existing, **known).check_same(existing, f"the cache {features}")


def existing_settings(features):
    """Return the `Settings` of the cache, or None if it has no manifest yet."""
    return load_manifest(features).settings if (features / MANIFEST).exists() else None


def matching_encoder(args, features, device, dtype):
    """Load the encoder and check its settings against those of the cache. Write a new cache's manifest.

    Raises UserError if the settings differ.
    """
    existing = existing_settings(features)
    encoder = VideoEncoder.from_pretrained(args.encoder, device, dtype, **flag_settings(args))
    if not existing and not args.dry_run:
        # without the date, so that caches of the same features are byte-identical
        versions = {name: version(name) for name in ("torch", "transformers", "av")}
        info = hub.record("encoder", args.encoder) | {"versions": versions} | world_of(args.videos)
        manifest = Manifest(encoder.settings, info)
        # if several shards start together, one writes the manifest and the others are checked against it
        write_new(features / MANIFEST, json_bytes(manifest.as_dict()))
        existing = load_manifest(features).settings
    if existing:
        encoder.settings.check_same(existing, f"the cache {features}")
    return encoder


def world_of(videos):
    """Return {"world": content of world.json} if a synthetic world wrote the folder of the clips, else {}."""
    path = Path(os.path.abspath(videos)).parent / "world.json"
    try:
        world = read_json(path, "world")
    except UserError:  # it does not exist, or is another program's
        return {}
    if not (isinstance(world, dict) and world.get("synthetic") is True):
        return {}
    return {"world": {k: world[k] for k in ("name", "synthetic", "nouns") if k in world}}


def encode_all(encoder, work, features, batch_size, pool, log_failure, log_source):
    """Encode and save the clips to do of a `Work`. Returns {key: reason} of those that fail.

    log_failure, log_source: functions that append an entry to failures.jsonl and sources.jsonl.
    """
    failed, writes = {}, deque()
    with (
        ThreadPoolExecutor(4) as disk,  # so that encoding does not wait for fsync
        tqdm(total=len(work.todo), unit="clip", smoothing=0.05) as bar,
    ):
        for key, result in encode_files(encoder, work.todo, batch_size, pool):
            path = feature_file(features, *key)
            # in this order, so that a kill never leaves features beside the source of others
            if key in work.changed:
                path.unlink(missing_ok=True)
            if isinstance(result, VideoError):
                failed[key] = result.reason
                entry = {"id": key[1], "split": key[0], "path": str(work.todo[key][0])}
                log_failure(entry | {"reason": result.reason, "detail": str(result)})
            else:
                source, stored, decoder = result
                log_source(source_entry(key, source))
                writes.append(disk.submit(save_features, path, key[1], stored, decoder))
                if len(writes) > 4 * batch_size:
                    writes.popleft().result()  # raises if the write failed
            bar.update()
        for write in writes:
            write.result()
    return failed


def dry_run(args, records):
    """Print the disk space and time that a run needs, without writing a file. Returns the exit code."""
    paths, missing = files_of_part(args.videos or cli.VIDEOS, records, args.shard)
    device, dtype = devices.resolve(args.device, args.dtype)
    features = cli.output_folder(args.features, "--features")
    check_cache(args, features, dtype)
    work = find_work(features, paths, spans_of(records), missing, args.shard)
    note_counts(*counts(paths, missing, work))
    encoder = matching_encoder(args, features, device, dtype)
    print_disk(encoder.settings, len(work.todo), features)
    if work.todo:
        pool = WorkerPool(args.workers, args.timeout)
        print_time(encoder, work.todo, args.batch_size, pool)
    return DONE


def print_disk(settings, clips, features):
    """Print the disk space that the features of a number of clips need."""
    shape, dtype = (settings.num_tokens, settings.width), STORES[settings.store]
    stored = {"features": torch.zeros(shape, dtype=dtype), "scale": torch.zeros(2 * shape[1])}
    one = len(torch_bytes(stored))
    needed, free = one * clips, shutil.disk_usage(nearest_folder(features)).free
    print(f"disk per clip    {file_size(one)}")
    print(
        f"disk needed      {file_size(needed)} for {counted(clips, 'clip')}; {file_size(free)} free"
    )
    if needed > free:
        print("                 NOT ENOUGH: --pool 2 needs a quarter, --pool 4 a sixteenth")


def print_time(encoder, todo, batch_size, pool):
    """Print the estimated time to encode {key: path}, from two batches, which are not saved."""
    sample = dict(list(todo.items())[: 2 * batch_size])
    start = time.perf_counter()
    results = dict(encode_files(encoder, sample, batch_size, pool))
    seconds = (time.perf_counter() - start) / len(sample) * len(todo)
    print(
        f"estimated time   {duration(seconds)}, from {counted(len(sample), 'timed clip')} including start-up"
    )
    if failed := sum(isinstance(result, VideoError) for result in results.values()):
        print(f"failed           {failed} of {counted(len(sample), 'timed clip')}")


def nearest_folder(path):
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def report(ok, failed, missing):
    """Print the totals over all processes and return the exit code."""
    parts = distributed.all_gather((ok, failed, missing))
    ok = sum(part[0] for part in parts)
    failed = {key: reason for part in parts for key, reason in part[1].items()}
    missing = [key for part in parts for key in part[2]]
    reasons = Counter(failed.values())
    text = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    print(
        f"{ok:,} ok, {len(failed):,} failed{f' ({text})' if text else ''}, {len(missing):,} missing"
    )
    if missing:
        note(f"missing: {first_few([clip_id for _, clip_id in missing])}")
    if not ok and (failed or missing):
        return FAILED
    if ranks.launched():
        return DONE  # torchrun would treat any other code as a crash and kill the other processes
    return PARTIAL if failed or missing else DONE


if __name__ == "__main__":
    cli.run(main)
