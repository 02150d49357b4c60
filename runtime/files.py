"""Files that neither a kill, a full disk nor a stranger can spoil: whole writes, wary reads, locks.

torch is imported inside functions, so that a script's --help need not wait for it.
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.cli import note
from runtime.errors import UserError, out_of_files, out_of_memory

JSON_BYTES = 2 << 30  # SSv2's annotations with all paraphrases are 0.3 GB
HASHES = 1 << 32  # values of a clip's hash


# ---- writing -------------------------------------------------------------------------------


def write_atomic(path, data, keep=None):
    """Write `data` (bytes or str) so that `path` is either absent, old and whole, or new and whole.

    keep: a second name for the old file, from when the new one is on the disk.
    """
    with _temporary(path, data) as temporary:
        if keep and Path(path).exists():
            _link(path, keep)
        os.replace(temporary, path)


def temporary_name(path):
    """A hidden name beside a path; at random, for processes in containers share their numbers."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _link(path, keep):
    """Give a file the name `keep` too, whatever has it now."""
    link = temporary_name(keep)
    try:
        os.link(path, link)
        os.replace(link, keep)
    except OSError:  # a file system without links
        os.replace(path, keep)
    link.unlink(missing_ok=True)  # it stays where both were the same file


@contextmanager
def _temporary(path, data):
    """`data` on the disk, under a name beside `path` that is gone after the block."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        error.filename = str(path)  # a full disk does not say what it was full for
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder, ours=lambda name: True):
    """Delete the temporary files that killed writes left, of files whose name is `ours`.

    Only for who holds the folder's `lock`: nobody else may be writing them now.
    """
    for entry in os.scandir(folder):
        left = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", entry.name)
        if left and ours(left[1]):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def write_new(path, data):
    """Write a file that is not there; False if another process was first. As whole as `write_atomic`."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(temporary, path)
    return True


def write_json(path, value):
    """Write `value` atomically; NaN, which is not JSON, raises ValueError."""
    write_atomic(path, json_bytes(value))


def json_bytes(value):
    """UTF-8; what is no character, as in some file names, as the JSON escape that it prints as."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")


def torch_bytes(value):
    """Serialise like torch.save, to bytes that do not depend on the file's name."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ---- reading -------------------------------------------------------------------------------


def read_text(path, what, encoding="utf-8"):
    """The text of a file of at most 2 GiB. Raises UserError naming `what` and the file."""
    try:
        if (size := os.path.getsize(path)) > JSON_BYTES:
            raise UserError(
                f"{what} {path} has {size / 1e9:.1f} GB; files above {JSON_BYTES / 1e9:.1f} GB are"
                " not read as text. Is it an archive?"
            )
        return Path(path).read_text(encoding=encoding)
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read as UTF-8 text: {error}") from None


def read_json(path, what):
    """Parse a JSON file. Raises UserError naming `what` and the file."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} cannot be read as JSON: {error}") from None


def read_torch(path, verify=True, mmap=False):
    """Load what `torch_bytes` made: tensors and plain values. Nothing in it is ever executed.

    verify: compare the checksum of every part, which torch itself never does; without it a flipped
    byte in a tensor goes unnoticed. Raises ValueError saying what is wrong with the file, OSError
    and MemoryError where that is not known.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            if mmap:
                read_ahead(file)
            with zipfile.ZipFile(file) as archive:
                # torch compresses nothing; a stranger's 4 MB may unpack to 4 GB
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("it is compressed, which no file of ours is")
                if verify and (bad := archive.testzip()):
                    raise ValueError(f"the checksum of its part {bad} is wrong")
        return torch.load(str(path), weights_only=True, mmap=mmap, map_location="cpu")
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile and torch raise whatever the damage happens to trip over
        if out_of_memory(error) or out_of_files(error):
            raise
        raise ValueError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        ) from None


def read_ahead(file):
    """Ask the kernel, if it takes such advice, to start reading the whole open file.

    Otherwise an mmap reads a file that is not in memory in small pieces: 10.3 ms instead of 6.6 ms for
    4.2 MB.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # some file systems take no advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def is_clip_id(name):
    """True if `name` is a plain file name: it can neither leave a folder nor hide in one."""
    return (
        isinstance(name, str)
        and not name.startswith(".")
        and not any(c in '/\\:*?"<>|' or not c.isprintable() for c in name)
        # bytes: a file name may have 255, and gets suffixes; unprintable ones may have none
        and 0 < len(name.encode()) <= 200
    )


# ---- shards and locks ----------------------------------------------------------------------


def hash_range(part, parts):
    """The interval [start, end) of clip hashes that is part `part` (from 0) of `parts`."""
    return part * HASHES // parts, (part + 1) * HASHES // parts


def in_shard(clip_id, part, parts):
    """True for the clips of part `part` (from 0) of `parts`, by a stable hash of the id.

    Parts are intervals: cutting each into n gives the parts of parts * n.
    """
    start, end = hash_range(part, parts)
    value = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4])
    return start <= value < end


@contextmanager
def lock(folder, told, part=0, parts=1):
    """Hold `folder`, or a shard of the clips in it, against other processes while in the block.

    Raises UserError with the sentence `told` if another process holds any of the same clips: byte n
    of <folder>/.lock stands for the clips of hash n, and a shard is an interval of hashes. These
    locks end with their process however it ends, pass to no forked worker, and reach other machines
    where the file system's locks do. The folder is made, and taken away again if it stays empty
    while all of it is held.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"{folder} cannot be written to ({why}); name another folder") from None
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    start, end = hash_range(part, parts)
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, end - start, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(told, code=1) from None
            note(f"{folder} cannot be locked ({error.strerror}): run nothing else on it meanwhile")
        try:  # its last holder may have found nothing to keep, and another made it anew
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock"))
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(told, code=1)
        try:
            yield
        finally:
            if parts == 1 and os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                folder.rmdir()
