"""A clip on disk -> F upright uint8 RGB frames, evenly spread over what can really be decoded.

decord reads what it is good at (short VP9 clips, which is what SSv2 consists of), PyAV everything
else; on VP9 both give the same bytes. Damage is reported, never papered over: decord alone would
return concealed or repeated frames, and every decoder returns half a file without an error.
Shapes: F frames, H and W the upright height and width. Times are seconds from the first frame.
"""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from runtime.errors import UserError, VideoError

VIDEO_EXTENSIONS = (".webm", ".mp4", ".mkv", ".mov", ".avi", ".m4v", ".gif")

# Shorter edge, in pixels, above twice of which a picture is reduced by a whole factor: 32 frames of 4K
# would take 0.8 GB, and V-JEPA 2 looks at 256
ENOUGH = 512

# Times as wide as high, or the reverse: no picture, and enlarged by its shorter edge it fills memory
STRIP = 32

# decord decodes in the background without bound, so it only gets clips that fit here as a whole.
DECORD_BYTES = 256 * 2**20


# ---- which files are clips -----------------------------------------------------------------


def file_names(record):
    """The names that the file of an annotated clip may have, inside the videos' folder."""
    return [*filter(None, (record["video"], f"{record['id']}.webm", f"{record['id']}.mp4"))]


def find_clips(names):
    """The clips meant by names of files and folders, recursively. Raises UserError if one is missing."""
    paths = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and is_video(p))
            if not inside:
                raise UserError(f"folder {path} has no videos ({' '.join(VIDEO_EXTENSIONS)})")
            paths += inside
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"clip not found: {path}")
    return paths


def is_video(path):
    return path.suffix.lower() in VIDEO_EXTENSIONS


def find_files(videos, records):
    """The files of annotated clips. Returns ({key: path}, [keys without a file]).

    videos: their folder; records: {key: record}. Raises UserError if none is there.
    """
    if not videos.is_dir():
        raise UserError(
            f"--videos not found: {videos}. It is the folder of the clips, <id>.webm or <id>.mp4."
        )
    names = {entry.name for entry in os.scandir(videos)}
    paths, missing = {}, []
    for key, record in records.items():
        for name in file_names(record):
            # one listing instead of 220,847 stat calls; sub-folders are asked for one by one
            if name in names or ("/" in name and (videos / name).is_file()):
                paths[key] = videos / name
                break
        else:
            missing.append(key)
    if not paths and missing:
        first = records[missing[0]]["id"]
        raise UserError(
            f"none of the {len(missing)} clips is in --videos {videos}: looked for {first}.webm,"
            f" {first}.mp4, …; the folder has {len(names)} files, for example"
            f" {', '.join(sorted(names)[:3]) or 'none'}"
        )
    return paths, missing


# ---- frames --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """`frames` uint8 (F, H, W, 3); `decoder` decord or pyav; `duration` of the video in seconds.

    Pictures whose shorter edge is 2 x `ENOUGH` and more come reduced by a whole factor.
    `truncated`: the file ends early or a frame inside is damaged; `frames` show what is there.
    """

    frames: np.ndarray
    decoder: str
    duration: float
    truncated: bool


@dataclass(frozen=True)
class Info:
    """What a file says of itself: seconds (unless absurd: of what is there), frames per second,
    upright size in pixels, degrees."""

    duration: float
    rate: float
    width: int
    height: int
    rotation: int


@dataclass(frozen=True)
class _Scan:
    """What a pass over the packets, without decoding, finds out. Frames may yet be fewer."""

    times: np.ndarray  # seconds from the first frame, ascending
    keys: list  # pts of keyframes, ascending
    first: int | None  # pts of the first frame; None: the file has no timestamps, count frames
    tick: Fraction  # seconds per pts unit
    rate: float
    covered: float  # seconds from the first frame to the end of the last
    damaged: bool
    claimed: float | None  # duration in the header
    plain_vp9: bool  # what decord decodes to the same bytes as PyAV, or fails on
    size: int  # bytes of one frame in RGB

    @property
    def duration(self):
        return self.claimed or self.covered

    def time(self, frame, ordinal):
        if self.first is None or frame.pts is None:
            return ordinal / self.rate
        return float((frame.pts - self.first) * self.tick)


def frame_indices(num_decoded, num_frames):
    """Choose F of n frames: the centres of F equal bins, int64 (F,).

    Every frame once, in order, at n = F; repeats when n < F. Raises ValueError if n or F < 1.
    """
    if num_decoded < 1 or num_frames < 1:
        raise ValueError(f"cannot choose {num_frames} of {num_decoded} frames")
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * num_decoded // (2 * num_frames)


def windows(duration, window, stride):
    """Cut a video of `duration` seconds into a list of (start, end), each about `window` long.

    Windows start every `stride` seconds; with stride <= window they leave no gap. The last one ends
    at `duration`. A rest shorter than half a window would be a sliver: the window before it is
    stretched over it instead. If a stride above `window` leaves a longer rest, one whole window
    is put at the end. Raises ValueError unless window and stride are positive.
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
    """Read a file's header and first frame into an `Info`.

    Raises VideoError: unreadable, no_video or empty.
    """
    with _open(path) as (container, stream):
        frame = next((f for f in _frames(container, stream) if f is not None), None)
        if frame is None:
            raise VideoError("empty", f"{path} has no frame that can be decoded")
        width, height = frame.width, frame.height
        if frame.rotation % 180 == 90:
            width, height = height, width
        duration = _claimed_duration(container, stream)
        rate = float(stream.average_rate or 0)
    covered = _scan(path).covered
    if duration is None or duration > 60 + 2 * covered:  # a header may claim a thousand years
        duration = covered
    return Info(duration, rate, width, height, frame.rotation % 360)


def decode(path, num_frames, start=None, end=None, backend="auto"):
    """Decode `num_frames` frames, evenly spread over those shown in [start, end), into a `Clip`.

    A window in which no new frame appears gives the frame that is on screen. backend: auto, decord
    or pyav. Raises VideoError: unreadable, no_video, empty or truncated.
    """
    scan = _scan(path)
    low, high = _bounds(path, scan, start, end)
    chosen = np.flatnonzero((scan.times >= low) & (scan.times < high))
    frames, decoder, damaged = None, "decord", scan.damaged
    # On other codecs decord shows concealed damage as if it were intact; on VP9 it raises.
    suits = scan.plain_vp9 and not damaged and len(scan.times) * scan.size <= DECORD_BYTES
    if backend == "decord" or (backend == "auto" and suits):
        picks = chosen[frame_indices(len(chosen), num_frames)]
        frames = _decode_decord(path, picks, len(scan.times))
        if frames is None and backend == "decord":
            raise VideoError("unreadable", f"{path} cannot be decoded by decord")
    if frames is None:
        decoder = "pyav"
        frames, broken = _decode_pyav(path, scan, low, high, len(chosen), num_frames)
        damaged = damaged or broken
    # Not frames against duration x rate: that condemns intact clips of variable frame rate.
    short = scan.covered < scan.duration - max(0.25, 0.05 * scan.duration)
    reaches_gap = min(high, scan.duration) > scan.covered + 0.25
    height, width = frames.shape[1:3]
    if max(height, width) > STRIP * min(height, width):
        raise VideoError("unreadable", f"{path} shows a strip of {width} x {height} pixels")
    return Clip(frames, decoder, scan.duration, bool(damaged or (short and reaches_gap)))


def stream(path, rate=None):
    """A file from its beginning to its end: yields (seconds, uint8 (H, W, 3)) in the order of display.

    rate: at most so many frames a second. Damaged frames are left out, large pictures reduced as by
    `decode`. Raises VideoError: unreadable, no_video or empty.
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
        raise VideoError("empty", f"{path} has no frame that can be decoded")


@contextmanager
def _open(path):
    import av

    path = Path(path)
    try:
        # Reading takes several passes, so a pipe will not do, and opening one might wait for ever.
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "does not exist"
            raise VideoError("unreadable", f"{path} {what}")
        if path.stat().st_size == 0:
            raise VideoError("empty", f"{path} is an empty file")
        # "file:" keeps ffmpeg from taking a colon in the name for a protocol.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            streams = _video_streams(container)
            if not streams:
                raise VideoError("no_video", f"{path} has no video stream")
            if streams[0].codec_context is None:
                raise VideoError("unreadable", f"{path} has a codec this build cannot decode")
            streams[0].codec_context.thread_count = 1  # parallel over clips; AUTO is 5x slower
            streams[0].codec_context.thread_type = "NONE"
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        why = error.strerror or type(error).__name__
        raise VideoError("unreadable", f"{path} cannot be read as a video: {why}") from None


def _video_streams(container):
    from av.stream import Disposition

    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _claimed_duration(container, stream):
    """Seconds from first frame to end that the file claims for its video stream, or None."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    seconds = tag and int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    if not seconds and len(container.streams) == 1 and container.duration:
        seconds = container.duration / 1_000_000
    if seconds and "matroska" in container.format.name and (stream.start_time or 0) > 0:
        seconds -= float(stream.start_time * stream.time_base)  # Matroska counts from zero
    return seconds or None


def _scan(path):
    import av

    pts, keys, damaged, shown = [], [], False, {}
    with _open(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    pts.append(packet.pts)
                    shown[packet.pts] = packet.duration or 0
                    damaged |= packet.is_corrupt
                    if packet.is_keyframe:
                        keys.append(packet.pts)
        except av.FFmpegError:
            damaged = True
        if not pts:
            raise VideoError("empty", f"{path} has no frame that can be decoded")
        rate, tick = float(stream.average_rate or 25), stream.time_base
        context = stream.codec_context
        if None in pts:  # AVI and raw streams
            times, keys, first, last = np.arange(len(pts)) / rate, [], None, 1 / rate
        else:
            first = min(pts)
            times = np.array([float((p - first) * tick) for p in sorted(pts)])
            last = max(float(shown[max(pts)] * tick), times[-1] / max(1, len(pts) - 1))
        covered = float(times[-1] + last)
        # At odd heights the two scale chroma apart; of several streams it might take another.
        plain_vp9 = (
            (context.codec.canonical_name, context.pix_fmt) == ("vp9", "yuv420p")
            and context.height % 2 == 0
            and min(context.width, context.height) < 2 * ENOUGH
            and len(_video_streams(container)) == 1
        )
        claimed, size = _claimed_duration(container, stream), context.width * context.height * 3
    return _Scan(times, sorted(keys), first, tick, rate, covered, damaged, claimed, plain_vp9, size)


def _bounds(path, scan, start, end):
    low, high = start or 0.0, np.inf if end is None else end
    if ((scan.times >= low) & (scan.times < high)).any():
        return low, high
    if not 0 <= low < min(high, scan.covered):
        raise VideoError("truncated", f"{path} has no frame in {low:g}-{high:g} s")
    return float(scan.times[scan.times <= low].max()), high


def _decode_decord(path, picks, count):
    """uint8 (F, H, W, 3), or None where decord is missing, fails or sees other frames than PyAV."""
    try:
        import decord
    except (ImportError, OSError):  # no wheel for macOS and Linux on ARM
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # fault_tol: raise as soon as one frame would be replaced by its neighbour
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
        return reader.get_batch(picks).asnumpy() if len(reader) == count else None
    except Exception:  # decord documents no exceptions; whatever it is, PyAV has the last word
        return None


def _decode_pyav(path, scan, low, high, count, num_frames):
    """Decode until packets and frames agree on the number of frames in [low, high)."""
    before = [key for key in scan.keys if (key - scan.first) * scan.tick <= low]
    seek = before[-1] if before and before[-1] > scan.first else None
    while True:
        frames, found, damaged = _pyav_pass(path, scan, low, high, count, num_frames, seek)
        if found == count:
            return frames, damaged
        if seek is not None:  # the seek may have landed behind `low`
            seek = None
        elif found:  # packets without a frame of their own (VP8 alt-ref), or damaged ones
            count = found
        else:
            raise VideoError("empty", f"{path} has no frame that can be decoded")


def _pyav_pass(path, scan, low, high, count, num_frames, seek):
    """Keep only the frames that `frame_indices(count, F)` asks for: a 4K clip does not fit whole."""
    picks, upright = frame_indices(count, num_frames), _Upright()
    output, found, damaged = None, 0, False
    with _open(path) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for ordinal, frame in enumerate(_frames(container, stream)):
            if frame is None:
                damaged = True
                continue
            time = scan.time(frame, ordinal)
            if time >= high:
                break
            if time < low:
                continue
            damaged |= frame.is_corrupt
            if found in picks:
                rgb = upright(frame)
                if output is None:
                    output = np.empty((num_frames, *rgb.shape), np.uint8)
                output[picks == found] = rgb
            found += 1
    return output, found, damaged


class _Upright:
    """Turns frames into uint8 (H, W, 3), upright, all of the size of the first, reduced if large."""

    def __init__(self):
        from av.video.reformatter import VideoReformatter

        self.convert = VideoReformatter().reformat  # frame.to_ndarray would build one per frame
        self.size = None

    def __call__(self, frame):
        from av.video.reformatter import Interpolation

        if self.size is None:  # it may change within a file
            k = max(1, min(frame.width, frame.height) // ENOUGH)
            self.size = {"width": frame.width // k, "height": frame.height // k}
            if k > 1:
                self.size["interpolation"] = Interpolation.AREA
        rgb = self.convert(frame, format="rgb24", **self.size).to_ndarray()  # (H, W, 3)
        if frame.rotation % 90 == 0:
            rgb = np.rot90(rgb, frame.rotation // 90)  # counter-clockwise, both of them
        return rgb


def _frames(container, stream):
    """Yield the frames in the order of display, and None where the file is damaged."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:  # of the decoder: go on behind the packet; of the container: the end
            yield None
            continue
        yield from frames
