"""Decode a video file into F upright uint8 RGB frames, evenly spread over the frames it contains.

decord decodes short VP9 clips, such as those of SSv2, because it is faster there. PyAV decodes
everything else. On VP9 both return the same bytes. Corrupt and truncated files are detected and
reported, which decoders do not do by themselves: decord conceals or repeats corrupt frames, and every
decoder returns the first half of a half-downloaded file without an error.

Shapes: F frames, H and W the upright height and width. Times are seconds from the first frame.
"""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np

from runtime import sources
from runtime.errors import UserError, VideoError
from runtime.names import normal_form, visible

VIDEO_EXTENSIONS = (".webm", ".mp4", ".mkv", ".mov", ".avi", ".m4v", ".gif")

# Frames whose shorter edge is at least 2 x ENOUGH pixels are downscaled by an integer factor. 32 frames
# of 4K would take 0.8 GB, and V-JEPA 2 only needs 256 x 256.
ENOUGH = 512

# Largest accepted aspect ratio. Scaling the shorter edge of a longer strip to the encoder's size would
# run out of memory.
STRIP = 32

# Limit for decord, in bytes of all decoded frames of a clip, because it decodes ahead without a limit.
DECORD_BYTES = 256 * 2**20


# ---- which files are clips -----------------------------------------------------------------


def file_names(record):
    """Return the possible file names of an annotated clip, relative to the video folder."""
    video = record["video"] or ""
    on_windows = video.replace("\\", "/")
    names = video, on_windows, f"{record['id']}.webm", f"{record['id']}.mp4"
    return [*filter(None, dict.fromkeys(names))]


def file_finder(videos):
    """Return a function from the record of a clip to its file in the folder `videos`, or None.

    Names are compared in Unicode normal form C; of two names that differ only in the form, the one that
    is written like the record wins. Each folder is listed once, because SSv2 would need 220,847 stat calls.
    """

    @cache
    def listed(folder):
        entries = visible(folder)
        # on disk names are UTF-8, also if the locale has another encoding
        forms = {os.fsencode(e.name).decode(errors="surrogateescape"): e for e in entries}
        return {normal_form(f): e for f, e in forms.items()} | {e.name: e for e in entries}

    def locate(name):
        if "/" in name and (videos / name).is_file():
            return videos / name
        folder, entry = videos, None
        for part in PurePosixPath(name).parts:
            entry = listed(folder).get(part) or listed(folder).get(normal_form(part))
            if entry is None:
                return None
            folder = folder / entry.name
        return folder if entry and entry.is_file() else None

    return lambda record: next(filter(None, map(locate, file_names(record))), None)


def find_clips(names):
    """Return the paths of all videos in a list of files and folders, which are searched recursively.

    Raises UserError if a path does not exist or a folder contains no videos.
    """
    paths = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and is_video(p))
            if not inside:
                raise UserError(f"folder {path} contains no videos ({' '.join(VIDEO_EXTENSIONS)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"clip not found: {path}")
    return paths


def is_video(path):
    return path.suffix.lower() in VIDEO_EXTENSIONS


def find_files(videos, records):
    """Find the files of annotated clips. Returns ({key: path}, [keys without a file]).

    videos: the video folder; records: {key: record}. Raises UserError if no clip has a file.
    """
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
        first = records[missing[0]]["id"]
        names = [entry.name for entry in visible(videos)]
        raise UserError(
            f"none of the {len(missing)} clips is in --videos {videos}: looked for {first}.webm,"
            f" {first}.mp4, …, but the folder "
            + (
                f"contains {len(names)} other files, for example {', '.join(names[:3])}"
                if names
                else "is empty"
            )
        )
    return paths, missing


# ---- frames --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """The decoded frames of a video, or of a part of it.

    frames: uint8 (F, H, W, 3), downscaled by an integer factor if the shorter edge is at least
        2 x `ENOUGH` pixels.
    decoder: decord or pyav.
    duration: the length of the whole video in seconds.
    truncated: True if the file ends early or contains corrupt frames. `frames` are then taken from the
        frames that could be decoded.
    """

    frames: np.ndarray
    decoder: str
    duration: float
    truncated: bool


@dataclass(frozen=True)
class Info:
    """Properties of a video from its header.

    duration: seconds; if the header's value is implausible, the length of the data in the file.
    rate: frames per second. width, height: pixels, upright. rotation: degrees.
    """

    duration: float
    rate: float
    width: int
    height: int
    rotation: int


@dataclass(frozen=True)
class _Scan:
    """The result of a pass over the packets without decoding. There may be fewer frames than packets."""

    times: np.ndarray  # seconds from the first frame, ascending
    keys: list  # pts of keyframes, ascending
    first: int | None  # pts of the first frame, or None if the file has no timestamps
    tick: Fraction  # seconds per pts unit
    rate: float  # frames per second
    covered: float  # seconds from the start of the first frame to the end of the last
    corrupt: bool
    claimed: float | None  # seconds, according to the header
    plain_vp9: bool  # True if decord returns the same bytes as PyAV, or an error
    size: int  # bytes of one RGB frame

    @property
    def duration(self):
        return self.claimed or self.covered

    def time(self, frame, ordinal):
        if self.first is None or frame.pts is None:
            return ordinal / self.rate
        return float((frame.pts - self.first) * self.tick)


def frame_indices(num_decoded, num_frames):
    """Return the indices of the frames at the centres of F equal bins, int64 (F,).

    If there are exactly F frames, each is returned once. If there are fewer, some are repeated. Raises
    ValueError if a number is less than 1.
    """
    if num_decoded < 1 or num_frames < 1:
        raise ValueError(f"cannot choose {num_frames} of {num_decoded} frames")
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * num_decoded // (2 * num_frames)


def windows(duration, window, stride):
    """Split a video of `duration` seconds into windows, a list of (start, end) in seconds.

    Each window is `window` seconds long, and one starts every `stride` seconds. If stride <= window
    there are no gaps. The last window always ends at `duration`. If less than half a window remains at
    the end, the window before it is extended. If more remains, which happens only if stride > window,
    a full window is added at the end. Raises ValueError unless window and stride are positive.
    """
    if not (window > 0 and stride > 0):
        raise ValueError(f"window {window} and stride {stride} must be positive")
    spans = [(0.0, min(window, duration))]
    while spans[-1][1] < duration and len(spans) * stride < duration:
        start = len(spans) * stride
        spans.append((start, min(start + window, duration)))
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < window / 2:
        spans.pop()
    rest = duration - spans[-1][1]
    if 0 < rest < window / 2:
        spans[-1] = (spans[-1][0], duration)
    elif rest > 0:
        spans.append((duration - window, duration))
    return spans


# ---- one clip ------------------------------------------------------------------------------


def probe(path):
    """Return the `Info` of a file, from its header, packets and first frame.

    Raises VideoError with the reason unreadable, no_video or empty.
    """
    with _open(path) as (container, stream):
        frame = next((f for f in _frames(container, stream) if f is not None), None)
        if frame is None:
            raise VideoError("empty", f"{path} has no decodable frame")
        width, height = frame.width, frame.height
        if frame.rotation % 180 == 90:
            width, height = height, width
        duration = _claimed_duration(container, stream)
        rate = float(stream.average_rate or 0)
    covered = _scan(path).covered
    # a corrupt header can claim a thousand years
    if duration is None or duration > 60 + 2 * covered:
        duration = covered
    return Info(duration, rate, width, height, frame.rotation % 360)


def decode(path, num_frames, start=None, end=None, backend="auto"):
    """Decode `num_frames` frames, evenly spread over the frames in [start, end), into a `Clip`.

    start, end: seconds; None means the start or end of the file. If no frame starts in this window, the
    frame before it is used.
    backend: auto, decord or pyav.
    Raises VideoError with the reason unreadable, no_video, empty or truncated.
    """
    scan = _scan(path)
    low, high = _bounds(path, scan, start, end)
    chosen = np.flatnonzero((scan.times >= low) & (scan.times < high))
    frames, decoder, corrupt = None, "decord", scan.corrupt
    # decord raises an error for corrupt VP9 frames, but conceals them in other codecs.
    use_decord = scan.plain_vp9 and not corrupt and len(scan.times) * scan.size <= DECORD_BYTES
    if backend == "decord" or (backend == "auto" and use_decord):
        picks = chosen[frame_indices(len(chosen), num_frames)]
        frames = _decode_decord(path, picks, len(scan.times))
        if frames is None and backend == "decord":
            raise VideoError("unreadable", f"decord cannot decode {path}")
    if frames is None:
        decoder = "pyav"
        frames, corrupt_frames = _decode_pyav(path, scan, low, high, len(chosen), num_frames)
        corrupt = corrupt or corrupt_frames
    # Comparing the frame count to duration x rate would reject intact clips of variable frame rate.
    short = scan.covered < scan.duration - max(0.25, 0.05 * scan.duration)
    reaches_gap = min(high, scan.duration) > scan.covered + 0.25
    height, width = frames.shape[1:3]
    if max(height, width) > STRIP * min(height, width):
        raise VideoError(
            "unreadable",
            f"{path} has frames of {width} x {height} pixels; the aspect ratio may not exceed"
            f" {STRIP}:1",
        )
    return Clip(frames, decoder, scan.duration, bool(corrupt or (short and reaches_gap)))


def decode_source(path, num_frames):
    """Return (the `Source` of a file, `decode(path, num_frames)`). Raises VideoError like `decode`."""
    try:
        # before decoding: if the file is replaced meanwhile, its date will differ from the source's
        source = sources.identify(path)
    except OSError as error:
        raise VideoError("unreadable", f"{path} cannot be read: {error.strerror}") from None
    return source, decode(path, num_frames)


def stream(path, rate=None):
    """Yield all frames of a file in display order, as (seconds, uint8 (H, W, 3)).

    rate: the maximum number of frames per second, or None for all. Corrupt frames are skipped, and
    large frames are downscaled as in `decode`. Raises VideoError with the reason unreadable, no_video
    or empty.
    """
    scan, upright, due = _scan(path), _Upright(), None
    with _open(path) as (container, track):
        shown = (frame for frame in _frames(container, track) if frame is not None)
        for ordinal, frame in enumerate(shown):
            time = scan.time(frame, ordinal)
            if due is None or time >= due - 1e-3:
                due = max(due or 0.0, time - 1 / rate) + 1 / rate if rate else 0.0
                yield time, upright(frame)
    if due is None:
        raise VideoError("empty", f"{path} has no decodable frame")


@contextmanager
def _open(path):
    import av

    path = Path(path)
    try:
        # A file is read several times, which a pipe does not allow, and opening a pipe could block.
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "does not exist"
            raise VideoError("unreadable", f"{path} {what}")
        if path.stat().st_size == 0:
            raise VideoError("empty", f"{path} is an empty file")
        # Without "file:", ffmpeg would parse a name that contains a colon as a protocol.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            streams = _video_streams(container)
            if not streams:
                raise VideoError("no_video", f"{path} has no video stream")
            if streams[0].codec_context is None:
                raise VideoError("unreadable", f"{path} uses a codec that this build of PyAV lacks")
            # Clips are decoded in parallel, so one thread per clip is 5x faster than AUTO.
            streams[0].codec_context.thread_count = 1
            streams[0].codec_context.thread_type = "NONE"
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        why = error.strerror or type(error).__name__
        raise VideoError("unreadable", f"{path} cannot be read as a video: {why}") from None


def _video_streams(container):
    from av.stream import Disposition

    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _claimed_duration(container, stream):
    """Return the duration of the video stream in seconds from the file's headers, or None."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    seconds = tag and int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    if not seconds and len(container.streams) == 1 and container.duration:
        seconds = container.duration / 1_000_000
    if seconds and "matroska" in container.format.name and (stream.start_time or 0) > 0:
        seconds -= float(stream.start_time * stream.time_base)  # Matroska includes the start time
    return seconds or None


def _scan(path):
    import av

    pts, keys, corrupt, shown = [], [], False, {}
    with _open(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    pts.append(packet.pts)
                    shown[packet.pts] = packet.duration or 0
                    corrupt |= packet.is_corrupt
                    if packet.is_keyframe:
                        keys.append(packet.pts)
        except av.FFmpegError:
            corrupt = True
        if not pts:
            raise VideoError("empty", f"{path} has no decodable frame")
        rate, tick = float(stream.average_rate or 25), stream.time_base
        context = stream.codec_context
        if None in pts:  # AVI and raw streams have no timestamps
            times, keys, first, last = np.arange(len(pts)) / rate, [], None, 1 / rate
        else:
            first = min(pts)
            times = np.array([float((p - first) * tick) for p in sorted(pts)])
            last = max(float(shown[max(pts)] * tick), times[-1] / max(1, len(pts) - 1))
        covered = float(times[-1] + last)
        # decord and PyAV differ in chroma scaling at odd heights, and may choose different streams.
        plain_vp9 = (
            (context.codec.canonical_name, context.pix_fmt) == ("vp9", "yuv420p")
            and context.height % 2 == 0
            and min(context.width, context.height) < 2 * ENOUGH
            and len(_video_streams(container)) == 1
        )
        claimed, size = _claimed_duration(container, stream), context.width * context.height * 3
    return _Scan(times, sorted(keys), first, tick, rate, covered, corrupt, claimed, plain_vp9, size)


def _bounds(path, scan, start, end):
    low, high = start or 0.0, np.inf if end is None else end
    if ((scan.times >= low) & (scan.times < high)).any():
        return low, high
    if not 0 <= low < min(high, scan.covered):
        raise VideoError("truncated", f"{path} has no frame in {low:g}-{high:g} s")
    return float(scan.times[scan.times <= low].max()), high


def _decode_decord(path, picks, count):
    """Decode with decord into uint8 (F, H, W, 3).

    Returns None if decord is not installed, fails, or finds another number of frames than PyAV.
    """
    try:
        import decord
    except (ImportError, OSError):  # there is no wheel for macOS or Linux on ARM
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # fault_tol: raise an error instead of replacing a corrupt frame with its neighbour
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        return reader.get_batch(picks).asnumpy() if len(reader) == count else None
    except Exception:  # decord does not document its exceptions; PyAV tries again
        return None


def _decode_pyav(path, scan, low, high, count, num_frames):
    """Decode with PyAV. Repeats the pass if [low, high) contains another number of frames than `count`."""
    before = [key for key in scan.keys if (key - scan.first) * scan.tick <= low]
    seek = before[-1] if before and before[-1] > scan.first else None
    while True:
        frames, found, corrupt = _pyav_pass(path, scan, low, high, count, num_frames, seek)
        if found == count:
            return frames, corrupt
        if seek is not None:  # the seek may have gone past `low`
            seek = None
        elif found:  # some packets contain no frame (VP8 alt-ref), or are corrupt
            count = found
        else:
            raise VideoError("empty", f"{path} has no decodable frame")


def _pyav_pass(path, scan, low, high, count, num_frames, seek):
    """Decode [low, high) and keep only the selected frames, because a whole 4K clip does not fit."""
    picks, upright = frame_indices(count, num_frames), _Upright()
    output, found, corrupt = None, 0, False
    with _open(path) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for ordinal, frame in enumerate(_frames(container, stream)):
            if frame is None:
                corrupt = True
                continue
            time = scan.time(frame, ordinal)
            if time >= high:
                break
            if time < low:
                continue
            corrupt |= frame.is_corrupt
            if found in picks:
                rgb = upright(frame)
                if output is None:
                    output = np.empty((num_frames, *rgb.shape), np.uint8)
                output[picks == found] = rgb
            found += 1
    return output, found, corrupt


class _Upright:
    """Converts the frames of a file to upright uint8 (H, W, 3).

    All are scaled to the size of the first, which is downscaled if it is large (see `ENOUGH`).
    """

    def __init__(self):
        from av.video.reformatter import VideoReformatter

        self.convert = VideoReformatter().reformat  # frame.to_ndarray creates a new one each time
        self.size = None

    def __call__(self, frame):
        from av.video.reformatter import Interpolation

        if self.size is None:  # set once, because the frame size can change within a file
            k = max(1, min(frame.width, frame.height) // ENOUGH)
            self.size = {"width": frame.width // k, "height": frame.height // k}
            if k > 1:
                self.size["interpolation"] = Interpolation.AREA
        rgb = self.convert(frame, format="rgb24", **self.size).to_ndarray()  # (H, W, 3)
        if frame.rotation % 90 == 0:
            rgb = np.rot90(rgb, frame.rotation // 90)  # PyAV and NumPy both count counter-clockwise
        return rgb


def _frames(container, stream):
    """Yield the frames in display order, and None for each decoding error."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:  # after a decoder error, the next packet follows; otherwise the end
            yield None
            continue
        yield from frames
