"""Which files are clips: the videos below a folder, and the files of annotated clips."""

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath

from runtime.cli import note
from runtime.errors import UserError, refuse_file
from runtime.names import counted, first_few, normal_form, to_utf8, visible

# Endings that decide without opening a file. With any other, the first bytes decide: a .ts file, for
# example, is MPEG or TypeScript.
VIDEO_EXTENSIONS = (
    *(".webm", ".mp4", ".mkv", ".mov", ".avi", ".m4v", ".gif", ".wmv", ".mpg", ".mpeg", ".flv"),
    *(".m2ts", ".mts", ".vob", ".3gp", ".ogv", ".asf", ".f4v", ".mxf", ".rmvb"),
)
OTHER_FILES = re.compile(
    r".*\.(txt|md|json|jsonl|csv|tsv|xml|html|srt|vtt|log|pdf|py|sh|zip|tar|gz|7z|pt|pth|npy|npz"
    r"|safetensors|jpe?g|png|webp|bmp|tiff?|heic|avif|wav|mp3|m4a|aac|flac|ogg|opus|m3u8?|mpd|sdp)",
    re.IGNORECASE,
)
# folders that the file systems of Linux and Windows keep for themselves on a disk
UNREADABLE = ("lost+found", "System Volume Information", "$RECYCLE.BIN")
FIRST_BYTES = re.compile(
    rb"\x1aE\xdf\xa3|....(ftyp|moov|mdat|wide|free)|RIFF....(AVI |CDXA)|\0\0\x01[\xb3\xba]|FLV\x01|0&\xb2u"
    rb"|nut/multimedia|OggS|GIF8|\.RMF|\x06\x0e\+4|DKIF|YUV4MPEG2|G.{187}G|....G.{191}G",
    re.DOTALL,
)


def is_video(path):
    """Return whether a file is a video, by its ending or else by its first bytes."""
    if OTHER_FILES.fullmatch(path.name):
        return False
    if path.suffix.lower() in VIDEO_EXTENSIONS:
        return True
    try:
        if not path.is_file():  # opening a pipe could block
            return False
        with open(path, "rb") as file:
            return FIRST_BYTES.match(file.read(200)) is not None
    except OSError:
        return False


def videos_below(folder):
    """Return the sorted paths of the videos and of the other files in a folder and its subfolders.

    Links to folders are followed, but no folder is searched twice. Hidden files and folders are left out,
    and UNREADABLE ones. Raises UserError if another folder cannot be read.
    """
    folders, links, seen, videos, others = [folder], [], set(), [], []
    while folders or links:
        folder = Path(folders.pop() if folders else links.pop())
        try:
            status, entries = os.stat(folder), visible(folder)
        except OSError as error:
            if folder.name in UNREADABLE or isinstance(error, FileNotFoundError):
                continue
            raise UserError(
                f"folder {folder} cannot be read: {error.strerror}; change its permissions, or give"
                " the other folders instead"
            ) from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.is_symlink() and os.path.isdir(entry):
                links.append(entry)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry)
            else:
                (videos if is_video(Path(entry)) else others).append(Path(entry))
    return sorted(videos), sorted(others)


def find_clips(names):
    """Return the paths of all videos in a list of files and folders, each path once.

    Folders are searched recursively. Prints how many files of the folders are not videos. Raises UserError
    if a path does not exist, or a folder contains no videos or cannot be read.
    """
    paths, others = [], []
    for path in map(Path, names):
        if path.is_dir():
            inside, rest = videos_below(path)
            if not inside:
                raise UserError(f"folder {path} contains no videos{_examples(rest, ', but ')}")
            paths += inside
            others += rest
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"clip not found: {path}")
    if others:
        note(f"passed over{_examples(others, ' ')}")
    unique = {}
    for path in paths:
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values())


def _examples(paths, before):
    files = counted(len(paths), "file that is not a video", "files that are not videos")
    names = first_few([path.name for path in paths])
    return f"{before}{files}: {names}" if paths else ""


# ---- annotated clips -----------------------------------------------------------------------


def file_names(record):
    """Return the possible file names of an annotated clip, relative to the video folder."""
    video = record["video"]
    given = [video, video.replace("\\", "/")] if video else []
    return [*given, *(record["id"] + ending for ending in (*VIDEO_EXTENSIONS, ".ts"))]


def file_finder(videos):
    """Return a function from the record of a clip to its file in the folder `videos`, or None.

    Names are compared in Unicode normal form C and with endings in lower case; a file that is named
    exactly like the record wins. Each folder is listed once, because SSv2 would need 220,847 stat calls.
    """

    @cache
    def listed(folder):
        entries = visible(folder)
        forms = {to_utf8(e.name): e for e in entries}
        return {_folded(name): e for name, e in forms.items()} | {e.name: e for e in entries}

    def locate(name):
        if "/" in name and (videos / name).is_file():
            return videos / name
        folder, entry = videos, None
        for part in PurePosixPath(name).parts:
            entry = listed(folder).get(part) or listed(folder).get(_folded(part))
            if entry is None:
                return None
            folder = folder / entry.name
        return folder if entry and entry.is_file() else None

    return lambda record: next(filter(None, map(locate, file_names(record))), None)


def _folded(name):
    stem, ending = os.path.splitext(name)
    return normal_form(stem + ending.lower())


def find_files(videos, records):
    """Find the files of annotated clips. Returns ({key: path}, [keys without a file]).

    videos: the video folder; records: {key: record}. Raises UserError if no clip has a file.
    """
    refuse_file(videos, "--videos")
    if not videos.is_dir():
        raise UserError(
            f"--videos not found: {videos}. This must be the folder that contains the clips,"
            " <id>.webm or <id>.mp4."
        )
    find = file_finder(videos)
    found = {key: find(record) for key, record in records.items()}
    paths = {key: path for key, path in found.items() if path}
    missing = [key for key in found if key not in paths]
    if not paths and missing:
        first, entries = records[missing[0]]["id"], visible(videos)
        some = first_few([entry.name for entry in entries])
        inside = f"contains {counted(len(entries), 'other file')}, for example {some}"
        folders = [entry.name for entry in entries if entry.is_dir()]
        raise UserError(
            f"none of the {counted(len(missing), 'clip')} is in --videos {videos}: looked for {first}.webm,"
            f" {first}.mp4, …, but the folder {inside if entries else 'is empty'}"
            + (f"; subfolders such as {folders[0]} are not searched" if folders else "")
        )
    return paths, missing
