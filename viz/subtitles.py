"""Encode a clip with its captions below the picture, as a GIF or an MP4.

viz.films and viz.gallery call this in decode workers, so it must not import torch.
"""

import io
import tempfile
from bisect import bisect
from collections import deque
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import video
from runtime.containers import open_video, read_packets
from runtime.errors import VideoError
from viz.draw_text import BLACK, GREY, panel

NARROWEST = 240  # pixels: minimum width, for legible captions

GIF_RATE, GIF_FRAMES = (
    10,
    240,
)  # frames per second; maximum number of frames, so long films have a lower rate
GIF_AREA = 320 * 240  # pixels per frame
GIF_BYTES = 230_000  # per second of film, so that 4 s take less than 1 MB
TRIAL = 5  # frames encoded to estimate the size of a film
LONGEST = 655.35  # seconds: the longest duration of a frame in a GIF

IN_MP4 = (
    "aac",
    "mp3",
    "ac3",
    "eac3",
    "opus",
    "flac",
    "alac",
)  # codecs of sound that players support
H264 = {"crf": "20", "preset": "veryfast", "bf": "0"}  # without B-frames, timestamps are in order
MILLISECOND = Fraction(1, 1000)


class Subtitles:
    """Draws the captions of one clip below its frames, followed by its reference if it has one.

    result: see `windows.description`, with an optional "reference". size: (width, height) of a frame.
    """

    def __init__(self, result, size):
        self.size = size
        spans = result["windows"]
        self.starts = [span["start"] for span in spans]
        self.ends = [span["end"] for span in spans[:-1]] + [float("inf")]
        reference = [(f"reference: {result['reference']}", GREY)] if "reference" in result else []
        self.texts = [[(span["caption"], BLACK), *reference] for span in spans]
        self.letters = max(14, round(size[0] / 25))
        height = max(panel(text, size[0], self.letters).height for text in self.texts)
        self.height = height + (size[1] + height) % 2  # H.264 needs even sizes
        self.canvas = size[0], size[1] + self.height
        self.drawn = None, None  # index of the last text, and its panel

    def __call__(self, time, image):
        """Draw the caption at `time` (seconds) below a PIL image. Returns a new image."""
        from PIL import Image

        n = max(0, bisect(self.starts, time) - 1)
        n = n if time <= self.ends[n] else None  # no caption for windows that could not be decoded
        if self.drawn[1] is None or self.drawn[0] != n:
            texts = [] if n is None else self.texts[n]
            self.drawn = n, panel(texts, self.size[0], self.letters, self.height)
        canvas = Image.new("RGB", self.canvas)
        canvas.paste(image, (0, 0))
        canvas.paste(self.drawn[1], (0, self.size[1]))
        return canvas


def film(path, result, ending):
    """Encode a captioned clip as "gif" or "mp4". Returns bytes. result: see `Subtitles`."""
    return {"gif": gif, "mp4": mp4}[ending](path, result)


def resized(picture, area, narrowest):
    """Resize uint8 (H, W, 3) or a PIL image to about `area` pixels. Returns a PIL image.

    Its width and height are even, and it is at least `narrowest` pixels wide.
    """
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    factor = max((area / (image.width * image.height)) ** 0.5, narrowest / image.width)
    size = [max(2, round(edge * factor / 2) * 2) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def gif(path, result=None, area=GIF_AREA, rate=GIF_RATE, bytes_per_second=GIF_BYTES):
    """Encode a clip as a GIF that plays at the clip's speed. Returns bytes.

    result: see `Subtitles`, or None for no captions. All frames share one palette, because a palette per
    frame would take 768 bytes and cause flicker. A film that exceeds `bytes_per_second` is scaled down;
    at the minimum width, every second frame is dropped. Raises VideoError.
    """
    rate = min(rate, GIF_FRAMES / max(video.probe(path).duration, 1e-3))
    narrowest = NARROWEST if result else 1
    frames = [(time, resized(p, area, narrowest)) for time, p in video.stream(path, rate)]
    times, images = zip(*frames, strict=True)
    limit = bytes_per_second * max(1.0, times[-1] + 1 / rate)

    def encoded(first=0, count=None):
        """Encode `count` frames as a GIF. Returns bytes."""
        draw = Subtitles(result, images[0].size) if result else lambda _, image: image
        some = slice(first, None if count is None else first + count)
        drawn = [draw(t, i) for t, i in zip(times[some], images[some], strict=True)]
        return encode_gif(drawn, times[some], 1 / rate)

    while True:
        # estimate the size from a few frames: the first is stored whole, the others as differences
        middle = max(0, len(images) // 2 - TRIAL)
        one, few = (len(encoded(middle, count)) for count in (1, TRIAL))
        size = one + (few - one) * (len(images) - 1) / (TRIAL - 1)
        if size <= limit or len(images) <= TRIAL:
            data = encoded()
            size = len(data)
            if size <= limit or len(images) == 1:
                return data
        width, height = images[0].size
        if width <= narrowest:
            images, times = images[::2], times[::2]
        images = [resized(i, width * height * 0.9 * limit / size, narrowest) for i in images]


def encode_gif(images, times, last):
    """Encode PIL images as a GIF. Returns bytes.

    times: when each image appears, in seconds. last: the duration of the last image in seconds.
    """
    from PIL import Image

    # one palette, from a montage of eight frames
    few = [i.resize((i.width // 3, i.height // 3), 0) for i in images[:: -(-len(images) // 8)]]
    montage = Image.new("RGB", (few[0].width, sum(i.height for i in few)))
    for n, image in enumerate(few):
        montage.paste(image, (0, n * image.height))
    palette = montage.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]

    # GIF durations are in hundredths of a second; browsers slow down frames shorter than two of them
    ends = [*times[1:], times[-1] + last]
    spans = (min(LONGEST, b - a) for a, b in zip(times, ends, strict=True))
    milliseconds = [max(20, 10 * round(100 * span)) for span in spans]

    data = io.BytesIO()
    table = bytes(palette.getpalette())  # otherwise Pillow writes a palette per frame
    options = {"duration": milliseconds, "loop": 0, "optimize": False, "palette": table}
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], **options)
    return data.getvalue()


def mp4(path, result):
    """Encode all frames of a captioned clip as an MP4 (H.264). Returns bytes. Raises VideoError.

    Its first sound track is copied, see `add_sound`.
    """
    import av

    frames = video.stream(path)
    first = next(frames)
    height, width = first[1].shape[:2]
    area = max(width * height, GIF_AREA)
    subtitles = Subtitles(result, resized(first[1], area, NARROWEST).size)
    options = {"movflags": "+faststart"}  # plays while it downloads; needs a seekable file
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "film.mp4")
        with av.open(str(target), "w", options=options) as container:
            track = container.add_stream("libx264", options=H264)
            sound = add_sound(path, container)
            track.pix_fmt, track.codec_context.time_base = "yuv420p", MILLISECOND
            track.width, track.height = subtitles.canvas
            written = -1
            for time, picture in chain([first], frames):
                milliseconds = round(1000 * time)
                if milliseconds <= written:  # more than 1000 frames per second
                    continue
                written = milliseconds
                image = subtitles(time, resized(picture, area, NARROWEST))
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = milliseconds, MILLISECOND
                container.mux(track.encode(frame))
                while sound and sound[0].pts * sound[0].time_base <= time:
                    container.mux(sound.popleft())
            container.mux(track.encode())
            container.mux(sound)
        return target.read_bytes()


def add_sound(path, container):
    """Add the first sound track of a clip to an MP4. Returns a deque of its packets, in order.

    It is empty if there is no sound, or its codec is not in IN_MP4. Damaged sound ends early. Time 0 is that
    of the first picture.
    """
    scan, found, stream, last = video.scan_packets(path), deque(), None, -1
    with suppress(VideoError), open_video(path) as (source, _):
        for track in source.streams.audio[:1]:
            if track.codec_context and track.codec_context.codec.canonical_name in IN_MP4:
                stream = container.add_stream_from_template(track)
        for packet in read_packets(source, track) if stream else ():
            if packet.dts is None or packet.pts is None:  # the end
                continue
            shift = round((scan.first or 0) * scan.tick / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            if packet.pts >= 0 and packet.dts > last:
                packet.stream, last = stream, packet.dts
                found.append(packet)
    return found
