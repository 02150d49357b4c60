"""JSON lines about clips, kept beside a feature cache: failures.jsonl and sources.jsonl.

Each process appends to its own file, <name>_part<i>of<n>.jsonl for part i of n, so that a kill loses no
line and shards do not conflict. At the end, rank 0 merges the files of its --shard into one sorted file.
A run over all clips merges the files of all shards into <name>.jsonl.
"""

from contextlib import contextmanager, suppress
from operator import itemgetter

from runtime import distributed, ranks
from runtime.cli import note
from runtime.files import in_shard, json_line, parse_json_lines, write_atomic
from runtime.names import counted, id_problem


def read(features, name, part):
    """Return {(split, id): entry} of the clips in a part, given as (i, n).

    Lines that are not valid are skipped with a warning, except for an unfinished last line, which a kill
    leaves. If a clip has several entries, the last one in the most recently modified file counts.
    """
    files = []
    for path in (features / f"{name}.jsonl", *features.glob(f"{name}_part*of*.jsonl")):
        with suppress(FileNotFoundError):  # another shard may merge and delete its files meanwhile
            files.append((path.stat().st_mtime_ns, path, path.read_bytes()))
    entries = {}
    for _, path, data in sorted(files, key=itemgetter(0)):
        found, damaged = parse(data)
        if damaged:
            lines = counted(damaged, "damaged line")
            note(f"WARNING: skipped {lines} in {path}; what they say about clips is lost")
        entries |= found
    return {key: entry for key, entry in entries.items() if in_shard(key[1], *part)}


def parse(data):
    """Parse the bytes of a file. Returns ({(split, id): entry}, the number of finished lines not valid)."""
    entries, valid = {}, 0
    for entry in parse_json_lines(data):
        key = entry.get("split"), entry.get("id")
        if not any(map(id_problem, key)):
            entries[key] = entry
            valid += 1
    return entries, max(0, data.count(b"\n") - valid)


@contextmanager
def appending(features, name, shard, part, entries):
    """Yield a function that appends an entry, a dict with `split` and `id`.

    shard: the value of --shard, as (i, n). part: the part that this process handles, as (i, n).
    entries: what the file contains at the start, the result of `read` for this part with any changes.
    It must include all entries to keep, because this file is now the most recently modified one.
    """
    process_log, shard_log = (log_path(features, name, *p) for p in (part, shard))
    others = [*features.glob(f"{name}_part*of*.jsonl")] if shard == (0, 1) else []
    write_atomic(process_log, "".join(map(json_line, entries.values())))
    with open(process_log, "a", encoding="utf-8") as file:

        def append(entry):
            file.write(json_line(entry))
            file.flush()

        yield append
    logs = distributed.all_gather(process_log.read_bytes())
    if ranks.rank() == 0:
        merged = {key: entry for log in logs for key, entry in parse(log)[0].items()}
        write_atomic(shard_log, "".join(sorted(map(json_line, merged.values()))))
    distributed.all_gather(None)  # barrier: the merged log is on disk before its parts are deleted
    for log in {process_log, *others} - {shard_log}:
        log.unlink(missing_ok=True)


def log_path(features, name, part, parts):
    return features / (f"{name}.jsonl" if parts == 1 else f"{name}_part{part}of{parts}.jsonl")
