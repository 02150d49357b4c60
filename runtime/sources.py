"""Which video file the features of a clip were computed from, to notice if the file has changed.

sources.jsonl beside the features has one line per clip (see clip_log.py) with its `Source`. Decode workers
import this module, so it uses only the standard library.
"""

import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from runtime.cli import note
from runtime.names import counted

BLOCK, BLOCKS = 64 << 10, 16  # bytes and number of the blocks of a file that its digest covers
SHA256 = re.compile("[0-9a-f]{64}")
THREADS = 16  # for network file systems, where a stat call takes a millisecond


class Source(NamedTuple):
    """A video file as it was when its clip was encoded.

    size: bytes. mtime_ns: time of the last modification in nanoseconds. digest: see `identify`; None if
    the clip was encoded before sources were recorded. span: (start, end) in seconds if the clip is a part
    of the file.
    """

    size: int
    mtime_ns: int
    digest: str | None
    span: tuple | None = None

    @classmethod
    def parse(cls, entry):
        """Return the `Source` in an entry of sources.jsonl, or None if it is not valid."""
        size, mtime_ns, digest = entry.get("size"), entry.get("mtime_ns"), entry.get("digest")
        span = entry.get("span")
        valid = digest is None or (isinstance(digest, str) and SHA256.fullmatch(digest))
        valid = valid and type(size) is type(mtime_ns) is int
        if span is not None:
            valid = valid and isinstance(span, list) and all(type(t) in (int, float) for t in span)
            span = tuple(span) if valid else None
        return cls(size, mtime_ns, digest, span) if valid else None


def identify(path):
    """Return the `Source` of a file. Its digest is the sha256 of its size and of its bytes.

    Of a file of more than 1 MiB, 16 blocks of 64 KiB count, evenly spread from its first to its last byte, so
    that a part that was missing and has been filled in is noticed. Raises OSError if it cannot be read or is
    not a regular file.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # opening a pipe could block
        raise OSError(None, "not a regular file", str(path))
    size = found.st_size
    digest = hashlib.sha256(f"{size}:".encode())
    with open(path, "rb") as file:
        if size <= BLOCK * BLOCKS:
            digest.update(file.read())
        else:
            for n in range(BLOCKS):
                file.seek((size - BLOCK) * n // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return Source(size, found.st_mtime_ns, digest.hexdigest())


def compare(paths, known):
    """Find the files that have changed since their clips were encoded.

    paths: {key: path}. known: {key: `Source`}. Returns ({keys of changed files}, {key: `Source`}), where
    the second has what to record: files of another date that have the same digest, and files without a
    source, which are assumed to be unchanged and have no digest. Only files of another date are opened.
    Files that cannot be read are in neither.
    """
    changed, record, unsure = set(), {}, {}
    with ThreadPoolExecutor(THREADS) as threads:
        keys = list(paths)
        shares = threads.map(lambda n: status(paths, keys[n::THREADS]), range(THREADS))
        for key, now in (pair for share in shares for pair in share):
            then = known.get(key)
            if then is None:
                record[key] = now
            elif now.size != then.size:
                changed.add(key)
            elif now.mtime_ns != then.mtime_ns:
                unsure[key] = paths[key]
        if unsure:
            clips = counted(len(unsure), "clip whose file has", "clips whose files have")
            note(f"comparing the contents of {clips} another date")
        found = threads.map(identify_if_readable, unsure.values())
        for key, now in zip(unsure, found, strict=True):
            if now and now.digest == known[key].digest:
                record[key] = now._replace(span=known[key].span)
            elif now:
                changed.add(key)
    return changed, record


def has_changed(path, source):
    """Return True if a file is not its recorded `Source`, by digest, or by size and date without one.

    A file that cannot be read counts as changed.
    """
    now = identify_if_readable(path)
    if now is None:
        return True
    return now.digest != source.digest if source.digest else now[:2] != source[:2]


def status(paths, keys):
    """Return [(key, `Source` without a digest)] of the files that exist."""
    found = []
    for key in keys:
        with suppress(OSError):
            now = os.stat(paths[key])
            found.append((key, Source(now.st_size, now.st_mtime_ns, None)))
    return found


def identify_if_readable(path):
    with suppress(OSError):
        return identify(path)
