"""Atomic writes, validated reads and file locks."""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shlex
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.cli import note
from runtime.errors import FAILED, UserError, out_of_files, out_of_memory

JSON_BYTES = 2 << 30  # limit for text files; SSv2's annotations with all paraphrases take 0.3 GB
HASHES = 1 << 32  # a clip's hash is in [0, HASHES)
# longest first, because UTF-32's mark starts with UTF-16's
BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


# ---- writing -------------------------------------------------------------------------------


def write_atomic(path, data, keep=None):
    """Write `data` (bytes or str) atomically: after a kill, `path` is either unchanged or complete.

    keep: a path for the old file, which is kept under that name once the new data is on disk.
    """
    with _temporary(path, data) as temporary:
        if keep and Path(path).exists():
            _link(path, keep)
        os.replace(temporary, path)


def temporary_name(path):
    """Return a hidden temporary path next to `path`. It is random, because PIDs repeat in containers.

    It fits into the 255 bytes of a file name, even if the name of `path` has as many.
    """
    name = os.fsencode(path.name)[:220].decode(errors="ignore")
    return path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def _link(path, keep):
    """Hard-link `path` as `keep`, replacing any existing file of that name."""
    link = temporary_name(keep)
    try:
        os.link(path, link)
        os.replace(link, keep)
    except OSError:  # a file system without hard links
        os.replace(path, keep)
    link.unlink(missing_ok=True)  # os.replace does nothing if both are links to the same file


@contextmanager
def _temporary(path, data):
    """Write `data` to a temporary file next to `path`, which is deleted after the block."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        error.filename = str(path)  # the error for a full disk does not name the file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder, selects=lambda name: True):
    """Delete the temporary files of killed writes to the file names that `selects` accepts.

    The caller must hold the folder's `lock`, so that no other process is writing these files.
    """
    for entry in os.scandir(folder):
        match = re.fullmatch(r"\.(.+)\.[0-9a-f]+\.tmp", entry.name)
        if match and selects(match[1]):
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


def write_new(path, data):
    """Create a file atomically. Returns False, and writes nothing, if it already exists."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if os.path.exists(path):
                return False
            os.replace(temporary, path)
    return True


def write_json(path, value):
    """Write `value` as JSON, atomically. Raises ValueError for NaN, which is not valid JSON."""
    write_atomic(path, json_bytes(value))


def json_bytes(value):
    """Encode `value` as JSON in UTF-8. Lone surrogates, as in invalid file names, become JSON escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")


def torch_bytes(value):
    """Serialise like torch.save. Unlike torch.save to a path, the bytes do not depend on a file name."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ---- reading -------------------------------------------------------------------------------


def read_text(path, what):
    """Read a text file of at most 2 GiB, in UTF-8 with or without a byte order mark.

    Raises UserError naming `what` and the file. For another encoding it names the command that converts
    the file.
    """
    try:
        if (size := os.path.getsize(path)) > JSON_BYTES:
            raise UserError(
                f"{what} {path} has {size / 1e9:.1f} GB, but the limit for text files is"
                f" {JSON_BYTES / 1e9:.1f} GB. Is it an archive?"
            )
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} not found: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{what} {path} is a folder, but must be a file") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, what, error.object, error.start) from None
    if "\0" in text[:2]:  # UTF-16 without a byte order mark can be valid UTF-8
        raise _not_utf8(path, what, text[:4].encode(), 0)
    return text


def _not_utf8(path, what, data, start):
    """Return a UserError about the bytes `data` of a text, which are not UTF-8 from `start` on."""
    marked = [name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)]
    if marked:
        encoding = marked[0]
    elif b"\0" in data[:2]:
        encoding = "UTF-16BE" if data.startswith(b"\0") else "UTF-16LE"
    elif b"\0" in data[:1000]:
        return UserError(f"{what} {path} is not a text file")
    else:
        encoding = "WINDOWS-1252"  # Latin-1 with more characters
    line = data.count(b"\n", 0, start) + 1
    place = f"{data[start]:#04x} in line {line}"
    # with text in another script, the command for WINDOWS-1252 would write nonsense
    guess = encoding + (" if its language is West European" if encoding == "WINDOWS-1252" else "")
    return UserError(
        f"{what} {path} is not UTF-8 text (byte {place}) but probably {guess}. Convert it:"
        f" iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > new{Path(path).suffix}"
    )


def read_json(path, what):
    """Parse a JSON file. Raises UserError naming `what` and the file."""
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{what} {path} cannot be read as JSON: {error}") from None


def json_line(entry):
    """Encode a dict as a line of a JSON lines file."""
    return json.dumps(entry) + "\n"


def parse_json_lines(data):
    """Parse the bytes of a JSON lines file. Returns a list of dicts.

    Lines that are not a JSON object, such as one that a kill has truncated, are skipped.
    """
    entries = []
    for line in data.splitlines():
        try:
            entries.append(parse_json(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def parse_json(text):
    """`json.loads(text)`. Raises ValueError also if the values are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_path(value):
    """Return True for a string that is the name of a file, existing or not, in UTF-8 (see `to_utf8`)."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate
        return False


def read_torch(path, verify=True, mmap=False):
    """Load a file written by `torch_bytes`: tensors and plain values. No code in it is executed.

    verify: check the CRC of every archive member. torch does not, so otherwise a flipped byte in a
    tensor goes unnoticed. mmap: map the file into memory instead of reading it.
    Raises ValueError, with the reason, for an invalid file, or one with anything but plain values and
    tensors (see `is_plain`). OSError and out-of-memory errors propagate.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            if mmap:
                read_ahead(file)
            with zipfile.ZipFile(file) as archive:
                # torch writes uncompressed archives; an untrusted 4 MB file could unpack to 4 GB
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("it is a compressed archive, which torch.save never writes")
                if verify and (bad := archive.testzip()):
                    raise ValueError(f"the checksum of {bad} in it is wrong")
        value = torch.load(str(path), weights_only=True, mmap=mmap, map_location="cpu")
        check_plain(value)
        return value
    except (OSError, ValueError):
        raise
    except Exception as error:  # a corrupt file can raise almost anything in zipfile and torch
        if out_of_memory(error) or out_of_files(error):
            raise
        raise ValueError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        ) from None


def check_plain(value, depth=20):
    """Raise ValueError unless `value` consists of plain tensors and values, at most `depth` levels deep."""
    if depth == 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        for pair in value.items():
            check_plain(pair, depth - 1)
    elif isinstance(value, list | tuple):
        for part in value:
            check_plain(part, depth - 1)
    elif isinstance(value, torch.Tensor):
        if not is_plain(value):
            raise ValueError("a tensor in it is not a plain one (for example sparse or nested)")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"it contains a {type(value).__name__}")


def is_plain(tensor):
    """Return True for a dense, contiguous tensor on the CPU that does not require a gradient.

    torch.load also returns others. With a sparse, nested or quantised one, most functions raise an error,
    and an expanded one can have more elements than fit in memory.
    """
    return (
        type(tensor) is torch.Tensor
        and not tensor.is_nested
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and not (tensor.is_quantized or tensor.requires_grad or tensor.is_neg() or tensor.is_conj())
        and tensor.is_contiguous()
    )


def read_ahead(file):
    """Ask the kernel to start reading the entire file, where it supports that.

    Without this, mmap reads an uncached file in small pieces: 10.3 ms instead of 6.6 ms for 4.2 MB.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # some file systems do not support it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


# ---- shards and locks ----------------------------------------------------------------------


def hash_range(part, parts):
    """Return the interval [start, end) of clip hashes for part `part` (from 0) of `parts`."""
    return part * HASHES // parts, (part + 1) * HASHES // parts


def in_shard(clip_id, part, parts):
    """Return True if a clip belongs to part `part` (from 0) of `parts`, by a stable hash of its id.

    Parts are intervals of hashes, so splitting each of them into n gives the parts of parts * n.
    """
    start, end = hash_range(part, parts)
    data = clip_id.encode(errors="surrogatepass")  # a file name may not be UTF-8
    value = int.from_bytes(hashlib.sha256(data).digest()[:4])
    return start <= value < end


@contextmanager
def lock(folder, busy_message, part=0, parts=1):
    """Lock `folder`, or one shard of its clips, against other processes for the duration of the block.

    Raises UserError(busy_message) if another process has locked any of the same clips. Byte n of
    <folder>/.lock represents the clips with hash n, so a shard locks an interval of bytes. The operating
    system releases the lock when the process ends, even if it is killed. Forked workers do not inherit
    the lock. It works across machines if the file system supports locks. The folder is created if
    necessary. A folder that is locked as a whole is deleted if it is empty at the end.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "ab")  # noqa: SIM115 (closed below)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"{folder} is not writable ({why}); choose another folder") from None
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
                raise UserError(busy_message, code=FAILED) from None
            note(
                f"WARNING: {folder} cannot be locked ({error.strerror}); do not run another command on"
                " it at the same time"
            )
        try:  # the previous process may have deleted the empty folder, and another recreated it
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock"))
        except FileNotFoundError:
            same = False
        if not same:
            raise UserError(busy_message, code=FAILED)
        try:
            yield
        finally:
            if parts == 1 and os.listdir(folder) == [".lock"]:
                os.unlink(folder / ".lock")
                folder.rmdir()
