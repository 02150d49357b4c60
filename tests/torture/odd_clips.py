"""Damaged and unusual video files, and what preprocess_ssv2.py must do with each.

Writing them needs PyAV's encoders.
"""

import struct
from fractions import Fraction

import numpy as np

LOSSLESS = {"lossless": "1", "cpu-used": "8", "deadline": "realtime"}
NOISY = {"b": "1M"}  # for noise, so that no part of the file is padding
QUIET = {"x265-params": "log-level=none"}
STALLING = [*(0, 33, 66, 100), *(800, 833, 866), *(1500, 1533, 1566, 1900)]  # milliseconds


def grey(i, width=64, height=48):
    """Return a frame whose brightness encodes its index."""
    return np.full((height, width, 3), 20 + 4 * i, np.uint8)


def noise(i, width=64, height=48):
    return np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)


def write(path, n=48, frame=grey, codec="libvpx-vp9", pix="yuv420p", options=None, pts=None, **box):
    """Write n frames at 12 per second, or at times `pts` in ms. Raise ValueError without an encoder."""
    import av

    options = LOSSLESS if options is None and codec == "libvpx-vp9" else options or {}
    av.codec.Codec(codec, "w")
    with av.open(str(path), "w", options=box) as container:
        stream = container.add_stream(codec, rate=12, options=options)
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.height, stream.width = frame(0).shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pix, 1
        for i in range(n):
            image = av.VideoFrame.from_ndarray(frame(i), format="rgb24")
            image.pts = i if pts is None else pts[i]
            image.time_base = Fraction(1, 12 if pts is None else 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def damage(path, begin, end, cut=False):
    """Zero the bytes between two fractions of a file, or truncate it at the first."""
    data = bytearray(path.read_bytes())
    begin, end = int(begin * len(data)), int(end * len(data))
    if cut:
        del data[begin:]
    else:
        data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    return path


def rotate(path, degrees):
    """Set the display matrix of an MP4 to `degrees` clockwise, as a phone held sideways does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    c, s = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    matrix = (c * one, s * one, 0, -s * one, c * one, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    return path


def write_sound(path):
    """Write a file with an audio stream only."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def of_size(width, height):
    return lambda i: grey(i, width, height)


def noisy(path):
    return write(path, 24, noise, options=NOISY)


def h264(path, **kwargs):
    return write(path, **({"n": 24, "codec": "libx264"} | kwargs))


# name: (suffix, function that writes it, status in preprocess_ssv2.py, decoder that reads it)
CLIPS = {
    "VP9, as in SSv2": (".webm", lambda p: write(p, 24), "ok", "decord"),
    "empty file": (".webm", lambda p: p.touch(), "empty", None),
    "text": (".mp4", lambda p: p.write_text("not a video at all\n" * 100), "unreadable", None),
    "truncated at 10 %": (".webm", lambda p: damage(noisy(p), 0.1, 1, cut=True), "truncated", None),
    "truncated at 50 %": (".webm", lambda p: damage(noisy(p), 0.5, 1, cut=True), "truncated", None),
    "H.264 truncated at 50 %, index lost": (
        ".mp4",
        lambda p: damage(h264(p, frame=noise), 0.5, 1, cut=True),
        "unreadable",
        None,
    ),
    "zeroed tail": (".webm", lambda p: damage(noisy(p), 0.6, 1), "truncated", None),
    "zeroed middle": (".webm", lambda p: damage(noisy(p), 0.4, 0.6), "corrupt", None),
    "H.264 with a zeroed middle": (
        ".mp4",
        lambda p: damage(h264(p, frame=noise, movflags="faststart"), 0.4, 0.6),
        "corrupt",
        None,
    ),
    "audio only": (".mkv", write_sound, "no_video", None),
    "one frame": (".webm", lambda p: write(p, 1), "ok", "pyav"),
    "two frames": (".webm", lambda p: write(p, 2), "ok", "decord"),
    "odd width and height": (".webm", lambda p: write(p, 24, of_size(65, 47)), "ok", "pyav"),
    "rotated by 90 degrees": (".mp4", lambda p: rotate(h264(p), 90), "ok", "pyav"),
    "10-bit": (".mp4", lambda p: h264(p, pix="yuv420p10le"), "ok", "pyav"),
    "variable frame rate": (
        ".webm",
        lambda p: write(p, len(STALLING), pts=STALLING),
        "ok",
        "decord",
    ),
    "4K": (
        ".mp4",
        lambda p: h264(p, n=8, frame=of_size(3840, 2160), options={"preset": "ultrafast"}),
        "ok",
        "pyav",
    ),
    "AV1": (".mp4", lambda p: write(p, 24, codec="libsvtav1"), "ok", "pyav"),
    "H.264": (".mp4", h264, "ok", "pyav"),
    "HEVC": (".mp4", lambda p: write(p, 24, codec="libx265", options=QUIET), "ok", "pyav"),
    "animated GIF": (".gif", lambda p: write(p, 24, codec="gif", pix="rgb8"), "ok", "pyav"),
}
