"""Decode a video file into F upright uint8 RGB frames, evenly spread over the frames it contains.

decord decodes short VP9 clips, such as those of SSv2, because it is faster there. PyAV decodes
everything else. On VP9 both return the same bytes. Corrupt and truncated files are detected and
reported, which decoders do not do by themselves: decord conceals or repeats corrupt frames, and every
decoder returns the first half of a half-downloaded file without an error.

Shapes: F frames, H and W the upright height and width. Times are seconds from the first frame.
"""

import os
from dataclasses import dataclass

import numpy as np

from runtime import sources
from runtime.containers import continues_after, next_film, open_video, read_frames, scan_packets
from runtime.errors import VideoError

# Frames whose shorter edge is at least 2 x ENOUGH pixels are downscaled by an integer factor. 32 frames
# of 4K would take 0.8 GB, and V-JEPA 2 only needs 256 x 256.
ENOUGH = 512

# Largest accepted aspect ratio. Scaling the shorter edge of a longer strip to the encoder's size would
# run out of memory.
STRIP = 32

# If a file whose header declares no duration is cut, damage begins within its last frames, at most this many.
LAST_FRAMES = 16

# Limit for decord, in bytes of all decoded frames of a clip, because it decodes ahead without a limit.
DECORD_BYTES = 256 * 2**20


# ---- frames --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """The decoded frames of a video, or of a part of it.

    frames: uint8 (F, H, W, 3), downscaled by an integer factor if the shorter edge is at least
        2 x `ENOUGH` pixels.
    decoder: decord or pyav.
    duration: the length of the whole video in seconds.
    damage: None if all frames are intact, else (reason, sentence). The reason is truncated if the file
        ends early, or corrupt. `frames` are then taken from the frames that could be decoded.
    """

    frames: np.ndarray
    decoder: str
    duration: float
    damage: tuple | None


@dataclass(frozen=True)
class Info:
    """Properties of a video.

    duration: seconds, the longer of what the header declares and what the file contains; implausible
        headers are ignored.
    width, height: pixels, upright. rotation: degrees.
    """

    duration: float
    width: int
    height: int
    rotation: int


def frame_indices(num_decoded, num_frames):
    """Return the indices of the frames at the centres of F equal bins, int64 (F,).

    If there are exactly F frames, each is returned once. If there are fewer, some are repeated. Raises
    ValueError if a number is less than 1.
    """
    if num_decoded < 1 or num_frames < 1:
        raise ValueError(f"cannot choose {num_frames} of {num_decoded} frames")
    return (2 * np.arange(num_frames, dtype=np.int64) + 1) * num_decoded // (2 * num_frames)


def window_spans(duration, window, stride):
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
    with open_video(path) as (container, stream):
        frame = next((f for f in read_frames(container, stream) if f is not None), None)
        if frame is None:
            raise VideoError("empty", f"{path} has no decodable frame")
        width, height = frame.width, frame.height
        if frame.rotation % 180 == 90:
            width, height = height, width
    return Info(scan_packets(path).duration, width, height, frame.rotation % 360)


def decode(path, num_frames, start=None, end=None, backend="auto"):
    """Decode `num_frames` frames, evenly spread over the frames in [start, end), into a `Clip`.

    start, end: seconds; None means the start or end of the file. If no frame starts in this window, the
    frame before it is used.
    backend: auto, decord or pyav.
    Raises VideoError with the reason unreadable, no_video, empty, truncated or corrupt.
    """
    scan = scan_packets(path)
    low, high = _bounds(path, scan, start, end)
    chosen = np.flatnonzero((scan.times >= low) & (scan.times < high))
    frames, decoder = None, "decord"
    corrupt = min((t for t in scan.corrupt if low <= t < high), default=np.inf)
    if backend == "decord" or (backend == "auto" and _suits_decord(scan)):
        picks = chosen[frame_indices(len(chosen), num_frames)]
        frames = _decode_decord(path, picks, len(scan.times))
        if frames is None and backend == "decord":
            raise VideoError("unreadable", f"decord cannot decode {path}")
    if frames is None:
        decoder = "pyav"
        frames, corrupt_frames = _decode_pyav(path, scan, low, high, len(chosen), num_frames)
        corrupt = min(corrupt, corrupt_frames)
    damage = _damage(path, scan, corrupt, reads_end=high >= scan.covered)
    height, width = frames.shape[1:3]
    if max(height, width) > STRIP * min(height, width):
        raise VideoError(
            "unreadable",
            f"{path} has frames of {width} x {height} pixels; the aspect ratio may not exceed"
            f" {STRIP}:1",
        )
    return Clip(frames, decoder, scan.duration, damage)


def _damage(path, scan, corrupt, reads_end):
    """Return `Clip.damage`.

    corrupt: seconds at which the first corrupt frame is, or infinity. reads_end: whether the end of the file
    is read.
    """
    at_end = not scan.declared and scan.times[-LAST_FRAMES:][0] <= corrupt < np.inf
    if not (reads_end and (scan.ends_early or scan.incomplete or at_end)):
        if corrupt < np.inf:
            return "corrupt", "the file is corrupt: some of its frames cannot be decoded"
        size = next_film(path, scan.last) if reads_end else 0
        text = f"the file contains another film after its first, which ends at {scan.covered:.2f} s; the"
        text += f" last {size / 1e6:,.2f} MB are not read, so split it into one file per film"
        return ("corrupt", text) if size else None
    declared = f", but its header declares {scan.declared:,.2f} s" if scan.ends_early else ""
    if continues_after(path, scan.end):
        text = f"the file is corrupt: it cannot be read after {scan.covered:.2f} s{declared}"
        return "corrupt", text
    return "truncated", f"the file is truncated: it ends at {scan.covered:.2f} s{declared}"


def decode_source(path, span, num_frames):
    """Return the `Source` of a clip, and its `Clip` with F frames. Raises VideoError like `decode`.

    span: (start, end) in seconds, or None for the whole file.
    """
    try:
        # before decoding: if the file is replaced meanwhile, its date will differ from the source's
        source = sources.identify(path)
    except OSError as error:
        raise VideoError("unreadable", f"{path} cannot be read: {error.strerror}") from None
    return source._replace(span=span), decode(path, num_frames, *(span or ()))


def stream(path, rate=None):
    """Yield all frames of a file in display order, as (seconds, uint8 (H, W, 3)).

    rate: the maximum number of frames per second, or None for all. Corrupt frames are skipped, and
    large frames are downscaled as in `decode`. Raises VideoError with the reason unreadable, no_video
    or empty.
    """
    scan, upright, due = scan_packets(path), _Upright(), None
    with open_video(path) as (container, track):
        shown = (frame for frame in read_frames(container, track) if frame is not None)
        for ordinal, frame in enumerate(shown):
            time = scan.time(frame, ordinal)
            if due is None or time >= due - 1e-3:
                due = max(due or 0.0, time - 1 / rate) + 1 / rate if rate else 0.0
                yield time, upright(frame)
    if due is None:
        raise VideoError("empty", f"{path} has no decodable frame")


def _bounds(path, scan, start, end):
    low, high = start or 0.0, np.inf if end is None else end
    if ((scan.times >= low) & (scan.times < high)).any():
        return low, high
    if low >= max(scan.covered, scan.declared):
        raise VideoError("empty", f"{path} ends at {scan.covered:.2f} s, before {low:g}-{high:g} s")
    if not 0 <= low < min(high, scan.covered):
        raise VideoError("truncated", f"{path} has no frame in {low:g}-{high:g} s")
    return float(scan.times[scan.times <= low].max()), high


def _suits_decord(scan):
    """Return whether decord returns the same bytes as PyAV, or an error, without using much memory."""
    small = min(scan.width, scan.height) < 2 * ENOUGH
    fits = len(scan.times) * scan.width * scan.height * 3 <= DECORD_BYTES
    # it raises an error for corrupt VP9 frames, but conceals them in other codecs
    return scan.plain_vp9 and small and fits and not scan.corrupt


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
        # An absolute path, because FFmpeg would parse "concat:…" and others as protocols.
        # fault_tol: raise an error instead of replacing a corrupt frame with its neighbour
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
        return reader.get_batch(picks).asnumpy() if len(reader) == count else None
    except Exception:  # decord does not document its exceptions; PyAV tries again
        return None


def _decode_pyav(path, scan, low, high, count, num_frames):
    """Decode with PyAV into (frames, seconds at which the first corrupt one is, or infinity).

    Repeats the pass if [low, high) contains another number of frames than `count`.
    """
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
        elif high - low < scan.covered:
            raise VideoError("corrupt", f"{path} has no decodable frame in {low:g}-{high:g} s")
        else:
            raise VideoError("empty", f"{path} has no decodable frame")


def _pyav_pass(path, scan, low, high, count, num_frames, seek):
    """Decode [low, high) and keep only the selected frames, because a whole 4K clip does not fit."""
    picks, upright = frame_indices(count, num_frames), _Upright()
    output, found, corrupt, time = None, 0, np.inf, low
    with open_video(path) as (container, stream):
        if seek is not None:
            container.seek(seek, stream=stream)
        for ordinal, frame in enumerate(read_frames(container, stream)):
            if frame is None:
                corrupt = min(corrupt, time)
                continue
            time = scan.time(frame, ordinal)
            if time >= high:
                break
            if time < low:
                continue
            if frame.is_corrupt:
                corrupt = min(corrupt, time)
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
