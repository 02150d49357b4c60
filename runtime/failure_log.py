"""failures.jsonl of a feature cache: one line per clip that failed, with its id, path and reason.

Each process appends to its own file, so that a kill loses no line and shards do not conflict. At the
end, rank 0 merges the files of its --shard into one sorted file. A run over all clips also merges the
files of earlier shards. At the start, entries are dropped for clips that are about to be processed again
and for clips that have features by now.
"""

import json
from contextlib import contextmanager

from runtime import distributed, ranks
from runtime.files import write_atomic
from runtime.names import is_clip_id


@contextmanager
def failure_log(features, shard, part, clips):
    """Yield a function (split, id, path, reason, detail) that appends a line to the log.

    shard: the value of --shard, as (i, n). part: the part that this process handles, as (i, n).
    clips: the set of (split, id) that this process is about to handle.
    """
    process_log, shard_log = (log_path(features, *p) for p in (part, shard))
    other_logs = [p for p in features.glob("failures_part*.jsonl") if shard == (0, 1)]
    clips = {key for keys in distributed.all_gather(clips) for key in keys}
    lines = {}
    if ranks.rank() == 0:
        lines = {key: line for p in (shard_log, *other_logs) for key, line in read(p).items()}
        lines = {
            (split, i): line
            for (split, i), line in lines.items()
            if (split, i) not in clips and not (features / split / f"{i}.pt").exists()
        }
    distributed.all_gather(None)  # barrier: rank 0 reads the old logs before any is overwritten
    write_atomic(process_log, "".join(lines.values()))
    with open(process_log, "a", encoding="utf-8") as file:

        def write(split, clip_id, path, reason, detail):
            entry = {"id": clip_id, "split": split, "path": str(path)}
            file.write(json.dumps(entry | {"reason": reason, "detail": detail}) + "\n")
            file.flush()

        yield write
    logs = distributed.all_gather([*read(process_log).values()])
    if ranks.rank() == 0:
        write_atomic(shard_log, "".join(sorted(line for log in logs for line in log)))
    distributed.all_gather(None)  # barrier: the merged log is on disk before its parts are deleted
    for log in {process_log, *other_logs} - {shard_log}:
        log.unlink(missing_ok=True)


def log_path(features, part, parts):
    return features / ("failures.jsonl" if parts == 1 else f"failures_part{part}of{parts}.jsonl")


def read(path):
    """Read a log as {(split, id): line}, without invalid lines, such as one truncated by a kill."""
    lines = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if is_clip_id(entry["split"]) and is_clip_id(entry["id"]):
                    lines[entry["split"], entry["id"]] = line
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return lines
