"""Find the videos in folders. Standard library only."""

import os
import re
from pathlib import Path

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
FIRST_BYTES = re.compile(
    rb"\x1aE\xdf\xa3|....(ftyp|moov|mdat|wide|free)|RIFF....AVI |\0\0\1[\xb3\xba]|FLV\1|0&\xb2u"
    rb"|OggS|GIF8|\.RMF|\x06\x0e\+4|DKIF|YUV4MPEG2|G.{187}G|....G.{191}G",
    re.DOTALL,
)


def is_video(path):
    """Return whether a file is a video, by its ending or else by its first bytes. Hidden files are not."""
    if path.name.startswith(".") or OTHER_FILES.fullmatch(path.name):
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
    such as the `._clip.mp4` that macOS writes beside `clip.mp4`. A folder that cannot be read is one of
    the other files.
    """
    folders, links, seen, videos, others = [folder], [], set(), [], []
    while folders or links:
        folder = Path(folders.pop() if folders else links.pop())
        try:
            status, entries = os.stat(folder), list(os.scandir(folder))
        except OSError:
            others.append(folder)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and os.path.isdir(entry):
                links.append(entry)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry)
            else:
                (videos if is_video(Path(entry)) else others).append(Path(entry))
    return sorted(videos), sorted(others)
