"""Open video files and read their packets without decoding them. This needs PyAV.

`open_video` accepts regular files in known containers only. `scan_packets` finds what a file really contains,
because headers can be wrong and decoders do not report damage. Times are seconds from the first frame.
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

from runtime.errors import VideoError

# The header of a second film, where `cat a.mp4 b.mp4 > c.mp4` joined them. Only MP4, FLV and ASF are not read
# beyond it; ASF is the container of .wmv.
HEADER = re.compile(
    rb"\0\0\0[\x08-\xff]ftyp[ -~]{4}|FLV\x01[\x01\x04\x05]\0\0\0\x09\0\0\0\0"
    rb"|0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel"
)
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # contains the size of the file
UNFINISHED = "it has no index (moov), as after an interrupted download or recording"
TAIL = 16 * 2**20  # bytes after the last packet in which it is looked for; more than most indexes

# FFmpeg opens only these containers, whatever the file's name. Others refer to further files (hls, dash,
# concat, sdp, image2) or are no videos (images, text).
CONTAINERS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,live_flv,asf,ogg,gif,apng,mxf,rm,nut,ivf,obu,av1,h261,h263"
    ",h264,hevc,vvc,m4v,vc1,vc1test,dv,dirac,dnxhd,mjpeg,yuv4mpegpipe,wtv,ty,pva,nsv,gxf,lxf,swf,dhav"
)


@dataclass(frozen=True)
class Scan:
    """The result of `scan_packets`. There may be fewer frames than packets."""

    times: np.ndarray  # seconds from the first frame, ascending
    keys: list  # pts of keyframes, ascending
    first: int | None  # pts of the first frame, or None if the file has no timestamps
    tick: Fraction  # seconds per pts unit
    rate: float  # frames per second
    covered: float  # seconds from the start of the first frame to the end of the last
    corrupt: list  # seconds at which a packet is corrupt
    incomplete: bool  # True if the last packet is
    declared: float  # seconds according to the header, or 0
    plain_vp9: bool  # True if decord finds the same frames as PyAV, or raises an error
    width: int  # pixels
    height: int
    last: int  # the byte after the last packet
    largest: int  # bytes of the largest packet

    @property
    def end(self):
        """A file without damage has no packets after this byte."""
        return self.last + self.largest

    @property
    def ends_early(self):
        # Comparing the frame count to duration x rate would reject intact clips of variable frame rate.
        return self.declared - self.covered > max(0.25, 0.05 * self.declared)

    @property
    def duration(self):
        # a corrupt header can claim a thousand years, or less than the file contains
        plausible = self.declared <= 60 + 2 * self.covered
        return max(self.covered, self.declared if plausible else 0.0)

    def time(self, frame, ordinal):
        if self.first is None or frame.pts is None:
            return ordinal / self.rate
        return float((frame.pts - self.first) * self.tick)


@contextmanager
def open_video(path):
    """Context manager for (container, video stream) of PyAV.

    Raises VideoError, also for PyAV's errors in the block, with the reason unreadable, no_video or empty.
    """
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
            if not streams and _lacks_index(path):
                raise VideoError("unreadable", f"{path} cannot be read as a video: {UNFINISHED}")
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
        if isinstance(error, av.InvalidDataError) and _lacks_index(path):
            why = UNFINISHED
        raise VideoError("unreadable", f"{path} cannot be read as a video: {why}") from None


def _video_streams(container):
    from av.stream import Disposition

    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _declared_duration(container, stream, first):
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


def scan_packets(path):
    """Read all packets of a file without decoding them, into a `Scan`. Raises VideoError."""
    import av

    packets, failed = [], False
    with open_video(path) as (container, stream):
        context = stream.codec_context
        # decord and PyAV differ in chroma scaling at odd heights, and may choose different streams.
        plain_vp9 = (
            (context.codec.canonical_name, context.pix_fmt) == ("vp9", "yuv420p")
            and context.height % 2 == 0
            and len(_video_streams(container)) == 1
        )
        try:
            for p in read_packets(container, stream):
                if p.size and not p.is_discard:
                    plain_vp9 = plain_vp9 and (bool(packets) or _is_upright(p))
                    end = (p.pos or 0) + p.size
                    times = p.pts, p.dts, p.duration or 0
                    packets.append(_Packet(*times, p.is_keyframe, p.is_corrupt, end, p.size))
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
        declared = _declared_duration(container, stream, float((first or 0) * tick))
        cut = _is_cut(path, container.format.name)
        # Where MPEG-TS files were joined, FFmpeg calls the last packet of the first file, or the one before,
        # corrupt, because the packet counters do not continue.
        joints = {m for n in _jumps_back(packets, tick) for m in (n - 1, n, n + 1)}
    return Scan(
        times=np.sort(clock),
        keys=keys,
        first=first,
        tick=tick,
        rate=rate,
        covered=max(clock) + rest,
        declared=declared,
        corrupt=[clock[n] for n, p in enumerate(packets) if p.is_corrupt and n not in joints],
        incomplete=failed or packets[-1].is_corrupt or cut,
        last=max(p.end for p in packets),
        largest=max(p.size for p in packets),
        plain_vp9=plain_vp9,
        width=context.width,
        height=context.height,
    )


def _has_clock(packets, tick):
    """Return whether the packets have usable timestamps.

    Raw streams have none, and in files that were joined, or are corrupt, they go back by seconds.
    """
    return all(p.pts is not None for p in packets) and not _jumps_back(packets, tick)


def _jumps_back(packets, tick):
    """Return the indices of the packets, in the order of the file, after which time goes back by over 1 s."""
    clock = [p.pts if p.dts is None else p.dts for p in packets]
    pairs = enumerate(pairwise(clock))
    return [n for n, (a, b) in pairs if None not in (a, b) and (a - b) * tick > 1]


def _is_cut(path, container):
    """Return whether a file ends before its container does, in formats where FFmpeg does not notice.

    Packets of MPEG-TS have 188 bytes and start with a G; cuts in its variants with longer packets are not
    detected. ASF (.wmv) declares the size of the file, and a GIF ends in a semicolon.
    """
    with open(path, "rb") as file:
        head, size = file.read(1 << 16), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 188 - size % 188))
        tail = file.read()
    if container == "mpegts" and head[:189:188] == b"GG":
        return not any(tail) or (size % 188 > 0 and tail[188:189] == b"G")
    if container == "asf" and (start := head.find(ASF_PROPERTIES)) >= 0:
        return size < int.from_bytes(head[start + 40 : start + 48], "little")
    return container == "gif" and tail.rstrip(b"\0")[-1:] != b";"


def _lacks_index(path):
    """Return whether a file is an MP4 without all of the box "moov", which many programs write last."""
    whole, position = [], 0
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        while position < length and len(whole) < 1000:
            file.seek(position)
            header = file.read(16)
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if size == 1:  # the size follows in 64 bits
                size = int.from_bytes(header[8:], "big")
            position += size if size >= 8 else length  # 0: up to the end of the file
            whole += [kind] if position <= length else []
    return whole[:1] == [b"ftyp"] and b"moov" not in whole


def continues_after(path, end):
    """Return whether a file contains data after the byte `end`, other than a tail of zeros."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        return size > end + 4096 and any(file.read())


def next_film(path, last):
    """Return the size of another film that follows the byte `last`, the end of the last packet, or 0.

    Players and FFmpeg do not read it.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(last)
        header = HEADER.search(file.read(TAIL))
    return size - last - header.start() if header else 0


def _is_upright(packet):
    """Decode the first packet. decord rotates MP4, but not WebM."""
    import av

    try:
        return not any(frame.rotation for frame in packet.decode())
    except av.FFmpegError:
        return False


def read_packets(container, stream):
    """Yield the packets of a stream.

    If another stream first appears in the middle of the file, as MPEG allows, PyAV can raise IndexError after
    the last packet.
    """
    with suppress(IndexError):
        yield from container.demux(stream)


def read_frames(container, stream):
    """Yield the frames in display order, and None for each decoding error."""
    import av

    packets = read_packets(container, stream)
    while True:
        try:
            frames = next(packets).decode()
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError:  # after a decoder error, the next packet follows; otherwise the end
            yield None
            continue
        yield from frames
