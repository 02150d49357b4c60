"""Compute and cache V-JEPA 2 features of every clip: <features>/<split>/<id>.pt and manifest.json.

    python preprocess_ssv2.py                 (about 4.2 MB per clip; --dry-run estimates disk and time)
    python preprocess_ssv2.py --verify        (checksums, NaN, coverage)
    torchrun --nproc-per-node 4 preprocess_ssv2.py       (a share of the clips on each of four GPUs)

You can stop it at any time and start it again, with the same --shard or another. Clips that are done are
skipped, unless their files have changed (see runtime/sources.py). Clips that fail are recorded in
<features>/failures.jsonl (failures_part<i>of<n>.jsonl for a shard), and the exit code is then 3 (0 under
torchrun).
"""

import runtime.start

import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import video
from dataset import TRAIN, VALIDATION, load_records
from encoder import VideoEncoder
from feature_cache import (
    CHOICES,
    SOURCES,
    STORES,
    Manifest,
    complete,
    feature_file,
    load_features,
    load_manifest,
    recorded_sources,
    save_features,
    source_entry,
)
from runtime import cli, clip_files, clip_log, devices, distributed, hub, ranks, sources
from runtime.cli import note
from runtime.decode_workers import WorkerPool
from runtime.errors import DONE, FAILED, PARTIAL, UserError, VideoError
from runtime.files import in_shard, json_bytes, lock, remove_unfinished, torch_bytes, write_new
from runtime.names import list_names, visible

MANIFEST = "manifest.json"
FAILURES = "failures"  # the name of failures.jsonl in clip_log
MAX_ERROR = 0.03  # of int8 storage, see `quantisation_error`; 0.008 for Gaussian features


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
    add("--splits", nargs="+", help=f"splits to encode (default: {TRAIN} {VALIDATION})")
    add(
        "--shard",
        type=cli.shard,
        default="0/1",
        help="process only part i of n, written i/n, with i from 0 to n - 1; 0/1 means all clips",
    )
    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", default=cli.ENCODER, help="Hub id or folder of a V-JEPA 2 model")
    add("--num-frames", type=cli.whole(1), default=32, help="frames per clip")
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
    wanted = {s: load_records(args.annotations, s)[: args.limit] for s in args.splits}
    if args.dry_run and ranks.rank():
        return DONE  # rank 0 prints the estimate for all
    part = args.shard if args.dry_run else ranks.share_of_shard(*args.shard)
    with nullcontext() if args.dry_run else distributed.joined():
        records = {(s, r["id"]): r for s, split in wanted.items() for r in split}
        paths, missing = {}, []
        if args.videos or not args.verify:
            paths, missing = clip_files.find_files(Path(args.videos or cli.VIDEOS), records)
            paths = {key: paths[key] for key in in_part(paths, part)}
        if args.verify:
            known = recorded_sources(Path(args.features), part)
            keys = in_part(records, part)
            return verify(Path(args.features), keys, paths, known, args.workers)
        device, dtype = devices.resolve(args.device, args.dtype)
        return fill(args, part, paths, in_part(missing, part), device, dtype)


def in_part(keys, part):
    """Return the keys (split, id) that are in part i of n."""
    return [key for key in keys if in_shard(key[1], *part)]


def fill(args, part, paths, missing, device, dtype):
    """Encode the clips of one part that are not in the cache yet.

    part: this process's share of --shard, as (i, n). paths: {key: path} of the clips in this part.
    missing: the keys of the clips in this part that have no file.
    """
    features = cli.output_folder(args.features, "--features")
    busy = f"another preprocess_ssv2.py is filling {features}: wait for it, or use --shard in both"
    with nullcontext() if args.dry_run else lock(features, busy, *part):
        known, encoded = recorded_sources(features, part), complete(features, paths)
        changed, current = sources.compare({key: paths[key] for key in encoded}, known)
        todo = {key: path for key, path in paths.items() if key not in encoded - changed}
        unrecorded = sum(key not in known for key in current)
        counts = [len(paths), len(missing), len(paths) - len(todo), len(changed), unrecorded]
        note_counts(*(counts if args.dry_run else map(int, distributed.sums(*counts))))
        encoder = matching_encoder(args, features, device, dtype, needed=todo or args.dry_run)
        if args.dry_run:
            pool = WorkerPool(args.workers, args.timeout)
            return dry_run(encoder, todo, features, args.batch_size, pool)
        clear(features, args.splits, part)
        failures = old_failures(features, part, {*paths, *missing})
        entries = {key: source_entry(key, source) for key, source in (known | current).items()}
        with (
            clip_log.appending(features, FAILURES, args.shard, part, failures) as log_failure,
            clip_log.appending(features, SOURCES, args.shard, part, entries) as log_source,
        ):
            pool = WorkerPool(args.workers, args.timeout)
            how = args.batch_size, pool, log_failure, log_source
            failed = encode_all(encoder, todo, changed, features, *how) if todo else {}
    return report(len(paths) - len(failed), failed, missing)


def note_counts(found, missing, encoded, changed, unrecorded):
    note(f"{found:,} clips found, {missing:,} missing, {encoded:,} already encoded")
    if changed:
        note(
            f"{changed:,} clips have changed since they were encoded; they are encoded again, and their"
            " features are replaced one by one"
        )
    if unrecorded:
        note(
            f"{unrecorded:,} clips were encoded by a version that did not record their files; their"
            " features are kept, and later changes to the files will be noticed"
        )


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


def matching_encoder(args, features, device, dtype, needed):
    """Load the encoder and check its settings against those of the cache. Write a new cache's manifest.

    Returns None if the encoder is not needed. Raises UserError if the settings differ, before the
    encoder is loaded if possible.
    """
    wanted = {
        "num_frames": args.num_frames,
        "sampling": "still" if args.still else "bin_centres",
        "resize": args.resize,
        "pool": args.pool,
        "store": args.store,
    }
    existing = load_manifest(features).settings if (features / MANIFEST).is_file() else None
    if not existing and any(list_names(folder, ".pt") for folder in visible(features)):
        raise UserError(
            f"{features} contains features but no {MANIFEST}, which records how they were made: restore"
            " it, or use another folder"
        )
    if existing:  # first compare the settings that are known without loading the encoder
        known = wanted | {
            "compute_dtype": str(dtype).removeprefix("torch."),
            "encoder_fingerprint": hub.fingerprint(hub.find_model(args.encoder, "--encoder")),
        }
        replace(existing, **known).check_same(existing, f"the cache {features}")
    if not needed:
        return None

    encoder = VideoEncoder.from_pretrained(args.encoder, device, dtype, **wanted)
    if not existing and not args.dry_run:
        # without the date, so that caches of the same features are byte-identical
        versions = {name: version(name) for name in ("torch", "transformers", "av")}
        info = hub.record("encoder", args.encoder) | {"versions": versions}
        manifest = Manifest(encoder.settings, info)
        # if several shards start together, one writes the manifest and the others are checked against it
        write_new(features / MANIFEST, json_bytes(manifest.as_dict()))
        existing = load_manifest(features).settings
    if existing:
        encoder.settings.check_same(existing, f"the cache {features}")
    return encoder


def encode_all(encoder, todo, changed, features, batch_size, pool, log_failure, log_source):
    """Run `encode` with a progress bar. Returns {key: (reason, detail)} of the clips that fail.

    changed: keys of clips whose features are of an earlier version of the file. They are deleted once
    the new features are computed or the new file has failed. log_failure, log_source: functions that
    append an entry to failures.jsonl and sources.jsonl.
    """

    def delete_outdated(key):
        if key in changed:
            feature_file(features, *key).unlink(missing_ok=True)

    def before_saving(key, source):
        # in this order, so that a kill never leaves features beside the source of others
        delete_outdated(key)
        log_source(source_entry(key, source))

    failed = {}
    with progress(len(todo), "clip") as bar:
        for key, error in encode(encoder, todo, features, batch_size, pool, before_saving):
            bar.update()
            if error:
                delete_outdated(key)
                failed[key] = reason, detail = error
                entry = {"id": key[1], "split": key[0], "path": str(todo[key])}
                log_failure(entry | {"reason": reason, "detail": detail})
    return failed


def encode(encoder, todo, features, batch_size, pool, before_saving):
    """Decode, encode and save clips. Yields (key, None) for each, or (key, (reason, detail)) if it failed.

    todo: {key: path}. features: the folder of the cache. pool: a `WorkerPool` for decoding.
    before_saving: a function of the key and the `Source` of a clip, called before a file is written.
    """

    def save(key, stored, decoder):
        save_features(feature_file(features, *key), key[1], stored, decoder)

    def launch(batch):
        # without the frames, to free memory
        names = [(key, source, clip.decoder) for key, source, clip in batch]
        return names, encoder.launch([clip.frames for *_, clip in batch], measure=not errors)

    def collect(names, finish):
        records = finish()
        measured = [
            record.pop("error").item() for record in records if record and "error" in record
        ]
        if measured and not errors:
            errors.extend(measured)
            note_quantisation(sum(errors) / len(errors), len(errors))
        for (key, source, decoder), record in zip(names, records, strict=True):
            if record is None:
                yield key, ("non_finite", "the encoder returned NaN or infinity")
            else:
                before_saving(key, source)
                writes.append((key, disk.submit(save, key, record, decoder)))

    def written(limit):
        while len(writes) > limit:
            key, write = writes.pop(0)
            write.result()  # raises if the write failed
            yield key, None

    batch, running, writes, errors = [], [], [], []
    jobs = ((key, path, encoder.settings.num_frames) for key, path in todo.items())
    ahead = 2 * (batch_size + pool.workers)  # so that decoding continues while a batch is encoded
    clips = pool.map(video.decode_source, jobs, ahead)
    with ThreadPoolExecutor(4) as disk:  # so that encoding does not wait for fsync
        for key, result in clips:
            if isinstance(result, VideoError):
                yield key, (result.reason, str(result))
            elif result[1].damage:
                yield key, result[1].damage
            else:
                batch.append((key, *result))
            if len(batch) == batch_size:
                # queue this batch on the GPU before collecting the previous one, so that it stays busy
                running.append(launch(batch))
                batch = []
                while len(running) > (1 if devices.on_gpu(encoder.device) else 0):
                    yield from collect(*running.pop(0))
            yield from written(4 * batch_size)
        running += [launch(batch)] if batch else []
        for launched in running:
            yield from collect(*launched)
        yield from written(0)


def note_quantisation(error, clips):
    """Print the quantisation error of the first batch, with a warning if it is high."""
    text = f"int8 storage: relative error {error:.1%} (mean of the first {clips} clips)"
    if error > MAX_ERROR:
        text = (
            f"WARNING: {text}, more than {MAX_ERROR:.0%}: a few tokens are much larger than the others,"
            " which lose precision. Use --store fp16 with another --features folder; it takes twice the"
            " space"
        )
    note(text)


def dry_run(encoder, todo, features, batch_size, pool):
    """Print the disk space and, from a few timed clips, the time that the run would need."""
    sample = dict(list(todo.items())[: 2 * batch_size])
    shape = encoder.settings.num_tokens, encoder.settings.width
    dtype = STORES[encoder.settings.store]
    features_of_one = {
        "features": torch.zeros(shape, dtype=dtype),
        "scale": torch.zeros(2 * shape[1]),
    }
    one = len(torch_bytes(features_of_one))
    needed, free = one * len(todo), shutil.disk_usage(nearest_folder(features)).free
    print(f"bytes per clip   {one:,}")
    print(f"bytes needed     {needed:,} for {len(todo):,} clips, {free:,} free")
    if needed > free:
        print("                 NOT ENOUGH: --pool 2 needs a quarter, --pool 4 a sixteenth")
    if sample:
        with tempfile.TemporaryDirectory() as folder:
            for split, _ in sample:
                Path(folder, split).mkdir(exist_ok=True)
            times, failed = [time.perf_counter()], 0
            how = batch_size, pool, lambda key, source: None
            for _, error in encode(encoder, sample, Path(folder), *how):
                times.append(time.perf_counter())
                failed += error is not None
        seconds = (times[-1] - times[0]) / len(sample) * len(todo)
        print(
            f"estimated time   {hours(seconds)}, from {len(sample)} timed clips including start-up"
        )
        if failed:
            print(f"failed           {failed} of the {len(sample)} timed clips")
    return DONE


def hours(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds:.0f} s"


def nearest_folder(path):
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def report(ok, failed, missing):
    """Print the totals over all processes and return the exit code."""
    parts = distributed.all_gather((ok, failed, missing))
    ok = sum(part[0] for part in parts)
    failed = {key: error for part in parts for key, error in part[1].items()}
    missing = [key for part in parts for key in part[2]]
    reasons = Counter(reason for reason, _ in failed.values())
    text = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    print(
        f"{ok:,} ok, {len(failed):,} failed{f' ({text})' if text else ''}, {len(missing):,} missing"
    )
    if missing:
        note(f"missing: {', '.join(i for _, i in missing[:5])}{' …' if len(missing) > 5 else ''}")
    if not ok and (failed or missing):
        return FAILED
    if ranks.launched():
        return DONE  # torchrun would treat any other code as a crash and kill the other processes
    return PARTIAL if failed or missing else DONE


def verify(features, keys, paths, known, workers):
    """Check the feature files of all keys (split, id) for damage, wrong shapes and NaN.

    paths: {key: path} of the clips to compare with `known`, the recorded {key: `Source`}.
    Returns exit code 1 if any file is damaged or missing or any clip has changed, else 0.
    """
    settings = load_manifest(features).settings

    def check(key):
        try:
            load_features(feature_file(features, *key), key[1], settings)
        except UserError as error:
            return "damaged", str(error)
        if key in comparable and sources.has_changed(paths[key], known[key]):
            path = paths[key]
            return "changed", f"clip {key[1]}: {path} has changed since its features were computed"

    have = complete(features, dict.fromkeys(keys))
    comparable = have & paths.keys() & known.keys()
    bad = []
    with ThreadPoolExecutor(max(1, workers)) as threads, progress(len(have), "file") as bar:
        for problem in threads.map(check, sorted(have)):
            bar.update()
            if problem:
                bad.append(problem)
    bad = [problem for part in distributed.all_gather(bad) for problem in part]
    for _, text in bad[:20]:
        note(text)
    if len(bad) > 20:
        note(f"… and {len(bad) - 20} more")
    counts = distributed.sums(len(have), len(keys), len(comparable), len(paths))
    have, wanted, compared, found = map(int, counts)
    if found and compared < have:
        note(
            f"{have - compared:,} clips were not compared with their files, which are not in --videos or"
            " were not recorded when the clip was encoded"
        )
    damaged, changed = (sum(kind == k for kind, _ in bad) for k in ("damaged", "changed"))
    text = f"{have - len(bad):,} intact, {damaged:,} damaged, {wanted - have:,} missing"
    print(text + (f", {changed:,} changed" if found else ""))
    return FAILED if bad or have < wanted else DONE


def progress(total, unit):
    return tqdm(total=total, unit=unit, smoothing=0.05, mininterval=1)


if __name__ == "__main__":
    cli.run(main)
