"""failures.jsonl of a cache: a line for each clip that could not be used, with id, path and reason.

Each process writes a file of its own, so that a kill loses no line and shards do not meet. In the end
rank 0 puts those of its --shard into one, sorted, and a run over all clips gathers the shards'. Lines of
the clips that are asked for again are dropped first, for they may succeed now, and so are those of clips
that did.
"""

import json
from contextlib import contextmanager

from runtime import distributed, ranks
from runtime.files import is_clip_id, write_atomic


@contextmanager
def failure_log(features, shard, part, asked):
    """Yields a function (split, id, path, reason, detail) that writes a line.

    shard: what was asked for, i of n; part: what this process does of it; asked: its (split, id).
    """
    ours, whole = (log_of(features, *p) for p in (part, shard))
    others = [p for p in features.glob("failures_part*.jsonl") if shard == (0, 1)]
    asked = {key for keys in distributed.all_gather(asked) for key in keys}
    lines = {}
    if ranks.rank() == 0:
        lines = {key: line for p in (whole, *others) for key, line in read(p).items()}
        lines = {
            (split, i): line
            for (split, i), line in lines.items()
            if (split, i) not in asked and not (features / split / f"{i}.pt").exists()
        }
    distributed.all_gather(None)  # all are read, so they may go
    write_atomic(ours, "".join(lines.values()))
    with open(ours, "a", encoding="utf-8") as file:

        def write(split, clip_id, path, reason, detail):
            entry = {"id": clip_id, "split": split, "path": str(path)}
            file.write(json.dumps(entry | {"reason": reason, "detail": detail}) + "\n")
            file.flush()

        yield write
    lines = [line for part in distributed.all_gather([*read(ours).values()]) for line in part]
    if ranks.rank() == 0:
        write_atomic(whole, "".join(sorted(lines)))
    distributed.all_gather(None)  # what is gathered is on the disk
    for other in {ours, *others} - {whole}:
        other.unlink(missing_ok=True)


def log_of(features, part, parts):
    return features / ("failures.jsonl" if parts == 1 else f"failures_part{part}of{parts}.jsonl")


def read(path):
    """{(split, id): line} of failures.jsonl; a line cut short by a kill is dropped."""
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
