"""List folders, compare names of files, and make ids of clips. Standard library only."""

import hashlib
import os
import unicodedata
from pathlib import Path

ID_BYTES = 200  # limit for clip ids; a file name may have 255 bytes, and suffixes are added
RESERVED = frozenset('/\\:*?"<>|')  # characters that Windows does not allow in file names


def visible(folder):
    """Return the entries (os.DirEntry) of a folder that are not hidden, sorted by name, or [].

    macOS leaves a hidden `._x.json` beside x.json on foreign disks, and our own unfinished files are
    hidden too.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(shown, key=lambda entry: entry.name)


def list_names(folder, *endings):
    """Return the names of the visible regular files of a folder, sorted. Links to files count.

    endings: such as ".json", in lower case; a name may have any of them, in any case. Default: all files.
    """
    return [
        entry.name
        for entry in visible(folder)
        if entry.name.lower().endswith(endings or "") and entry.is_file()
    ]


def list_files(folder, *endings):
    """Return the paths of the files in `list_names`."""
    return [Path(folder, name) for name in list_names(folder, *endings)]


def first_few(names, count=3):
    """Join the first names with commas, and add "…" if there are more."""
    return ", ".join([*names[:count], "…"] if len(names) > count else names)


def counted(number, one, many=None):
    """Return a number with its noun, such as "1 clip" or "2 clips". many: the plural, if not one + "s"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def file_size(count):
    """Return a number of bytes in the largest fitting unit, such as "4.2 MB"; 1 KB is 1,000 bytes."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds):
    """Return a time to read, such as "40 s", "12 min" or "3.2 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def id_problem(name):
    """Describe why `name` cannot be the id of a clip or the name of a split, or return None.

    Such a name is used as a file name. It cannot leave its folder and is not hidden.
    """
    if not isinstance(name, str) or not name:
        return "is empty or not a string"
    if name.startswith("."):
        return "starts with a dot"
    if not (name.isprintable() and RESERVED.isdisjoint(name)):
        return f"contains {next(filter(_is_unsafe, name))!r}"
    if (size := len(name.encode())) > ID_BYTES:
        return f"has {size} bytes, but the limit is {ID_BYTES}"
    return None


def _is_unsafe(character):
    return character in RESERVED or not character.isprintable()


def safe_id(name, add_hash=False):
    """Return `name` as a clip id: unsafe characters become "_", and a long name is shortened.

    The end of a shortened name is replaced by a hash of the name. add_hash: always add the hash, for
    names that would have the same id.
    """
    name = normal_form(name)
    safe = "".join("_" if _is_unsafe(c) else c for c in name).lstrip(".") or "_"
    if add_hash or len(safe.encode()) > ID_BYTES:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        start = safe.encode()[: ID_BYTES - 1 - len(digest)].decode(errors="ignore")
        safe = f"{start}-{digest}"
    return safe


def normal_form(name):
    """Return a name in Unicode normal form C, in which names are compared.

    macOS writes é as two characters, e and an accent (form D), where most software writes one.
    """
    return unicodedata.normalize("NFC", name)


def to_utf8(name):
    """Return a file name as it is on disk, in UTF-8. JSON files contain such names.

    In another locale, Python decodes it differently: in an ASCII locale, é is two lone surrogates.
    """
    return os.fsencode(name).decode(errors="surrogateescape")


def from_utf8(name):
    """Return the name with which Python opens the file, the inverse of `to_utf8`."""
    return os.fsdecode(name.encode(errors="surrogateescape"))
