"""Decode a video file into F upright uint8 RGB frames, evenly spread over the frames it contains.

decord decodes short VP9 clips, such as those of SSv2, because it is faster there. PyAV decodes
everything else. On VP9 both return the same bytes. Corrupt and truncated files are detected and
reported, which decoders do not do by themselves: decord conceals or repeats corrupt frames, and every
decoder returns the first half of a half-downloaded file without an error.

Shapes: F frames, H and W the upright height and width. Times are seconds from the first frame.
"""

import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime import sources
from runtime.errors import VideoError

# FFmpeg opens only these containers, whatever the file's name. Others refer to further files (hls, dash,
# concat, sdp, image2) or are no videos (images, text).
CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,gif,apng,mxf,rm,nut,ivf,obu,av1,h261,h263"
    ",h264,hevc,vvc,m4v,vc1,vc1test,dv,dirac,dnxhd,mjpeg,yuv4mpegpipe,wtv,ty,pva,nsv,gxf,lxf,swf,dhav"
)

# Frames whose shorter edge is at least 2 x ENOUGH pixels are downscaled by an integer factor. 32 frames
# of 4K would take 0.8 GB, and V-JEPA 2 only needs 256 x 256.
ENOUGH = 512

# Largest accepted aspect ratio. Scaling the shorter edge of a longer strip to the encoder's size would
# run out of memory.
STRIP = 32

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
    corrupt: list  # seconds at which a packet is corrupt
    incomplete: bool  # True if the last packet is
    claimed: float  # seconds according to the header, or 0
    plain_vp9: bool  # True if decord returns the same bytes as PyAV, or an error
    size: int  # bytes of one RGB frame
    end: int  # a file without damage has no packets after this byte

    @property
    def ends_early(self):
        # Comparing the frame count to duration x rate would reject intact clips of variable frame rate.
        return self.claimed - self.covered > max(0.25, 0.05 * self.claimed)

    @property
    def duration(self):
        # a corrupt header can claim a thousand years, or less than the file contains
        plausible = self.claimed <= 60 + 2 * self.covered
        return max(self.covered, self.claimed if plausible else 0.0)

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
        rate = float(stream.average_rate or 0)
    return Info(_scan(path).duration, rate, width, height, frame.rotation % 360)


def decode(path, num_frames, start=None, end=None, backend="auto"):
    """Decode `num_frames` frames, evenly spread over the frames in [start, end), into a `Clip`.

    start, end: seconds; None means the start or end of the file. If no frame starts in this window, the
    frame before it is used.
    backend: auto, decord or pyav.
    Raises VideoError with the reason unreadable, no_video, empty, truncated or corrupt.
    """
    scan = _scan(path)
    low, high = _bounds(path, scan, start, end)
    chosen = np.flatnonzero((scan.times >= low) & (scan.times < high))
    frames, decoder, corrupt = None, "decord", any(low <= t < high for t in scan.corrupt)
    # decord raises an error for corrupt VP9 frames, but conceals them in other codecs.
    use_decord = scan.plain_vp9 and not scan.corrupt and len(scan.times) * scan.size <= DECORD_BYTES
    if backend == "decord" or (backend == "auto" and use_decord):
        picks = chosen[frame_indices(len(chosen), num_frames)]
        frames = _decode_decord(path, picks, len(scan.times))
        if frames is None and backend == "decord":
            raise VideoError("unreadable", f"decord cannot decode {path}")
    if frames is None:
        decoder = "pyav"
        frames, corrupt_frames = _decode_pyav(path, scan, low, high, len(chosen), num_frames)
        corrupt = corrupt or corrupt_frames
    damage = None
    if high >= scan.covered and (scan.ends_early or scan.incomplete):
        claim = f", but its header declares {scan.claimed:,.2f} s" if scan.ends_early else ""
        damage = "truncated", f"the file is truncated: it ends at {scan.covered:.2f} s{claim}"
        if _continues(path, scan.end):
            text = f"the file is corrupt: it cannot be read after {scan.covered:.2f} s{claim}"
            damage = "corrupt", text
    elif corrupt:
        damage = "corrupt", "the file is corrupt: some of its frames cannot be decoded"
    height, width = frames.shape[1:3]
    if max(height, width) > STRIP * min(height, width):
        raise VideoError(
            "unreadable",
            f"{path} has frames of {width} x {height} pixels; the aspect ratio may not exceed"
            f" {STRIP}:1",
        )
    return Clip(frames, decoder, scan.duration, damage)


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
        only = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", metadata_errors="replace", options=only) as container:
            streams = _video_streams(container)
            if not streams:
                raise VideoError("no_video", f"{path} has no video stream")
            if streams[0].codec_context is None:
                raise VideoError("unreadable", f"{path} uses a codec that this build of PyAV lacks")
            # Clips are decoded in parallel, so one thread per clip is 5x faster than AUTO.
            streams[0].codec_context.thread_count = 1
            streams[0].codec_context.thread_type = "NONE"
            yield container, streams[0]
    except av.ArgumentError:  # the container is not in the list
        raise VideoError(
            "unreadable",
            f"{path} is not in a supported video container; playlists, lists of files and images are not"
            " opened",
        ) from None
    except (av.FFmpegError, OSError) as error:
        why = error.strerror or type(error).__name__
        raise VideoError("unreadable", f"{path} cannot be read as a video: {why}") from None


def _video_streams(container):
    from av.stream import Disposition

    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _claimed_duration(container, stream, first):
    """Return the duration of the video stream in seconds from the file's headers, or 0.

    first: seconds from the start of the file to the first frame.
    """
    from av.format import Flags

    # MPEG and raw streams have no header that contains it, so that FFmpeg estimates it, often badly.
    if container.format.flags & (Flags.ts_discont | Flags.no_timestamps).value:
        return 0.0
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if stream.duration:
        seconds = float(stream.duration * stream.time_base)
    elif tag:
        seconds = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    else:
        seconds = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    # all but MP4 count from the start of the file
    return seconds if "mp4" in container.format.name else seconds - max(0.0, first)


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    duration: int
    is_keyframe: bool
    is_corrupt: bool
    end: int  # in bytes
    size: int


def _scan(path):
    import av

    packets, failed = [], False
    with _open(path) as (container, stream):
        context = stream.codec_context
        # decord and PyAV differ in chroma scaling at odd heights, and may choose different streams.
        plain_vp9 = (
            (context.codec.canonical_name, context.pix_fmt) == ("vp9", "yuv420p")
            and context.height % 2 == 0
            and min(context.width, context.height) < 2 * ENOUGH
            and len(_video_streams(container)) == 1
        )
        try:
            for p in _packets(container, stream):
                if p.size and not p.is_discard:
                    plain_vp9 = plain_vp9 and (bool(packets) or _is_upright(p))
                    end = (p.pos or 0) + p.size
                    packets.append(
                        _Packet(
                            p.pts, p.dts, p.duration or 0, p.is_keyframe, p.is_corrupt, end, p.size
                        )
                    )
        except av.FFmpegError:
            failed = True
        if not packets:
            raise VideoError("empty", f"{path} has no decodable frame")
        rate, tick = float(stream.average_rate or 25), stream.time_base
        if _has_clock(packets, tick):
            start, last = (choose(packets, key=lambda p: p.pts) for choose in (min, max))
            first = start.pts
            clock = [float((p.pts - first) * tick) for p in packets]
            keys = sorted(p.pts for p in packets if p.is_keyframe)
            rest = max(float(last.duration * tick), max(clock) / max(1, len(packets) - 1))
        else:
            first, clock, keys, rest = None, [n / rate for n in range(len(packets))], [], 1 / rate
        claimed = _claimed_duration(container, stream, float((first or 0) * tick))
    return _Scan(
        times=np.sort(clock),
        keys=keys,
        first=first,
        tick=tick,
        rate=rate,
        covered=max(clock) + rest,
        claimed=claimed,
        corrupt=[t for t, p in zip(clock, packets, strict=True) if p.is_corrupt],
        incomplete=failed or packets[-1].is_corrupt,
        end=packets[-1].end + max(p.size for p in packets),
        plain_vp9=plain_vp9,
        size=context.width * context.height * 3,
    )


def _has_clock(packets, tick):
    """Return whether the packets have usable timestamps.

    Raw streams have none, and in files that were joined, or are corrupt, they go back by seconds.
    """
    clock = [p.pts if p.dts is None else p.dts for p in packets]  # in the order of the file
    return all(p.pts is not None for p in packets) and all(
        (before - after) * tick <= 1 for before, after in pairwise(clock)
    )


def _continues(path, end):
    """Return whether a file contains data after the byte `end`, other than a tail of zeros."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        return size > end + 4096 and any(file.read())


def _is_upright(packet):
    """Decode the first packet. decord rotates MP4, but not WebM."""
    import av

    try:
        return not any(frame.rotation for frame in packet.decode())
    except av.FFmpegError:
        return False


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
        # An absolute path, because FFmpeg would parse "concat:…" and others as protocols.
        # fault_tol: raise an error instead of replacing a corrupt frame with its neighbour
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
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
        elif high - low < scan.covered:
            raise VideoError("corrupt", f"{path} has no decodable frame in {low:g}-{high:g} s")
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


def _packets(container, stream):
    """Yield the packets of a stream.

    If another stream first appears in the middle of the file, as MPEG allows, PyAV can raise IndexError after
    the last packet.
    """
    with suppress(IndexError):
        yield from container.demux(stream)


def _frames(container, stream):
    """Yield the frames in display order, and None for each decoding error."""
    import av

    packets = _packets(container, stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:  # after a decoder error, the next packet follows; otherwise the end
            yield None
            continue
        yield from frames
