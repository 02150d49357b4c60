"""Draw what was said about clips: a filmstrip each, with reference and caption beneath.

    python -m viz.films --predictions results/demo/predictions_validation.json \\
        --annotations data/toy/annotations --videos data/toy/videos --output strips.png

Needs Pillow and matplotlib: pip install -e '.[viz]'. Films with captions are made by infer.py --gif and --video.
"""

import runtime.start

import importlib.util
import io
import tempfile
from bisect import bisect
from fractions import Fraction
from itertools import chain
from pathlib import Path

import video
from dataset import VALIDATION, by_hash, load_records
from evaluate import read_predictions
from runtime import cli
from runtime.cli import note
from runtime.errors import UserError, VideoError
from runtime.files import write_atomic

FRAMES, HEIGHT, MARGIN = 8, 72, 8  # frames a strip; pixels
BLACK, GREY, GREEN, RED = "#000000", "#555555", "#136313", "#a31515"

GIF_RATE, GIF_FRAMES = 10, 240  # frames a second; in all: a long film shows fewer a second
TRIAL = 5  # pictures encoded to guess how large a film will be
GIF_AREA = 320 * 240  # pixels of the picture
GIF_BYTES = 230_000  # a second of film: 4 s stay under 1 MB
NARROWEST = 240  # pixels: a caption needs room
H264 = {
    "crf": "20",
    "preset": "veryfast",
    "bf": "0",
}  # frames in order: their times are what they say
MILLISECOND = Fraction(1, 1000)
LONGEST = 655.35  # seconds that a GIF can show a picture


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--predictions", nargs="+", required=True, help="files of evaluate.py")
    parser.add_argument("--annotations", default=cli.ANNOTATIONS, help="of prepare_annotations.py")
    parser.add_argument("--videos", default=cli.VIDEOS, help="clips' folder")
    parser.add_argument("--split", default=VALIDATION, help="split of the predictions")
    parser.add_argument("--num-samples", type=cli.whole(1), default=4, help="clips to draw")
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="seed of the choice")
    parser.add_argument("--output", required=True, help="picture to write, .png")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    require()
    output = Path(args.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output} must name a picture, .png")

    predictions = read_predictions(args.predictions)
    records = {r["id"]: r for r in load_records(args.annotations, args.split)}
    chosen = by_hash(predictions.keys() & records.keys(), args.seed)[: args.num_samples]
    if not chosen:
        raise UserError(f"no prediction is of a clip of split {args.split!r}")
    paths, _ = video.find_files(Path(args.videos), {i: records[i] for i in chosen})
    strips = []
    for i in (i for i in chosen if i in paths):
        try:
            strips.append(strip(paths[i], records[i]["label"], predictions[i]))
        except VideoError as error:
            note(str(error))
    if not strips:
        raise UserError("none of the clips could be drawn", code=1)
    cli.output_folder(output.parent, "--output")
    data = io.BytesIO()
    stacked(strips).save(data, "PNG", optimize=True)
    note(f"{len(strips)} clips drawn: {save(output, data.getvalue())}")


def require():
    """Raises UserError where what draws pictures is not installed."""
    for name in ("PIL", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"pictures need {name}: pip install -e '.[viz]'", code=1)


def stacked(pictures):
    """PIL images one under the other."""
    from PIL import Image

    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    whole, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def strip(path, reference, caption):
    """One clip: frames from left to right in time, then two lines of text."""
    from PIL import Image

    frames = [Image.fromarray(f) for f in video.decode(path, FRAMES).frames]
    frames = [f.resize((round(f.width * HEIGHT / f.height), HEIGHT)) for f in frames]
    right = GREEN if reference == caption else RED
    lines = [(f"reference  {reference}", BLACK), (f"caption     {caption}", right)]
    text = max(font(14).getlength(line) for line, _ in lines)
    width = int(max(sum(f.width + 2 for f in frames), text)) + 2 * MARGIN
    beneath = panel(lines, width, 14)
    picture = Image.new("RGB", (width, MARGIN + HEIGHT + beneath.height), "white")
    left = MARGIN
    for f in frames:
        picture.paste(f, (left, MARGIN))
        left += f.width + 2
    picture.paste(beneath, (0, MARGIN + HEIGHT))
    return picture


# ---- text ----------------------------------------------------------------------------------


def font(size):
    """DejaVu Sans, which matplotlib brings and which has more than Latin letters."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, size)


def wrap(text, width, letters):
    """Break a text into lines of at most `width` pixels: between words, within one only if it must be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and letters.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def panel(texts, width, size, height=0):
    """A white picture of `width` pixels with texts [(text, colour)] one under the other, wrapped.

    As high as they need, and at least `height`.
    """
    from PIL import Image, ImageDraw

    letters = font(size)
    lines = [(line, c) for text, c in texts for line in wrap(text, width - 2 * MARGIN, letters)]
    step = round(size * 1.35)
    height = max(height, step * len(lines) + 2 * MARGIN)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for n, (line, colour) in enumerate(lines):
        draw.text((MARGIN, MARGIN + n * step), line, font=letters, fill=colour)
    return picture


# ---- films ---------------------------------------------------------------------------------


class Subtitles:
    """The captions of one file of infer.py beneath its pictures, with its reference if there is one.

    result: see `infer.caption_files`; size: (width, height) of the picture in pixels.
    """

    def __init__(self, result, size):
        self.size = size
        spans = result.get("windows") or [{"start": 0.0, "caption": result["caption"]}]
        self.starts = [span["start"] for span in spans]
        self.ends = [span["end"] for span in spans[:-1]] + [float("inf")]
        beneath = [(f"reference: {result['reference']}", GREY)] if result.get("reference") else []
        self.texts = [[(span["caption"], BLACK), *beneath] for span in spans]
        self.letters = max(14, round(size[0] / 25))
        height = max(panel(text, size[0], self.letters).height for text in self.texts)
        self.height = height + (size[1] + height) % 2  # H.264 wants even sizes
        self.whole = size[0], size[1] + self.height
        self.shown = None, None  # the number of a text, and its picture

    def __call__(self, time, image):
        """An image shown at `time` -> the same with the caption of that time beneath."""
        from PIL import Image

        n = max(0, bisect(self.starts, time) - 1)
        n = n if time <= self.ends[n] else None  # a window that could not be read has no caption
        if self.shown[1] is None or self.shown[0] != n:
            text = [] if n is None else self.texts[n]
            self.shown = n, panel(text, self.size[0], self.letters, self.height)
        whole = Image.new("RGB", self.whole)
        whole.paste(image, (0, 0))
        whole.paste(self.shown[1], (0, self.size[1]))
        return whole


def resized(picture, area, narrowest):
    """uint8 (H, W, 3) or a PIL image -> one of about `area` pixels, even, at least `narrowest` wide."""
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    factor = max((area / (image.width * image.height)) ** 0.5, narrowest / image.width)
    size = [max(2, round(edge * factor / 2) * 2) for edge in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def gif(path, result=None, area=GIF_AREA, rate=GIF_RATE, bytes_a_second=GIF_BYTES):
    """A film as the bytes of a GIF that plays at its own speed, with its captions if there is `result`.

    One palette for all pictures: a palette each would cost 768 bytes and flicker. A film that does
    not compress is made smaller, then loses every second picture. Raises VideoError.
    """
    rate = min(rate, GIF_FRAMES / max(video.probe(path).duration, 1e-3))
    narrowest = NARROWEST if result else 1
    film = [(time, resized(p, area, narrowest)) for time, p in video.stream(path, rate)]
    times, images = zip(*film, strict=True)
    limit = bytes_a_second * max(1.0, times[-1] + 1 / rate)

    def encoded(first=0, count=None):
        """The bytes of some of the pictures as a GIF."""
        draw = Subtitles(result, images[0].size) if result else lambda _, image: image
        some = slice(first, None if count is None else first + count)
        drawn = [draw(t, i) for t, i in zip(times[some], images[some], strict=True)]
        return encode_gif(drawn, times[some], 1 / rate)

    while True:
        # what a few tell of all: the first is stored whole, of the others what has changed
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
    """PIL images shown from `times` in seconds, the last for `last` -> the bytes of a GIF."""
    from PIL import Image

    few = [i.resize((i.width // 3, i.height // 3), 0) for i in images[:: -(-len(images) // 8)]]
    montage = Image.new("RGB", (few[0].width, sum(i.height for i in few)))
    for n, image in enumerate(few):
        montage.paste(image, (0, n * image.height))
    palette = montage.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [i.quantize(palette=palette, dither=Image.Dither.NONE) for i in images]
    ends = [*times[1:], times[-1] + last]
    # a GIF counts hundredths of a second, and browsers slow down what is under two
    spans = (min(LONGEST, b - a) for a, b in zip(times, ends, strict=True))
    shown = [max(20, 10 * round(100 * span)) for span in spans]
    data = io.BytesIO()
    # without `palette` each picture would be written with one of its own
    table = bytes(palette.getpalette())
    options = {"duration": shown, "loop": 0, "optimize": False, "palette": table}
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], **options)
    return data.getvalue()


def mp4(path, result):
    """A film of infer.py with its captions, as the bytes of an MP4 (H.264). Raises VideoError."""
    import av

    frames = video.stream(path)
    first = next(frames)
    height, width = first[1].shape[:2]
    area = max(width * height, GIF_AREA)
    subtitles = Subtitles(result, resized(first[1], area, NARROWEST).size)
    options = {"movflags": "+faststart"}  # plays before it is there as a whole; needs a real file
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "film.mp4")
        with av.open(str(target), "w", options=options) as container:
            track = container.add_stream("libx264", options=H264)
            track.pix_fmt, track.codec_context.time_base = "yuv420p", MILLISECOND
            track.width, track.height = subtitles.whole
            shown = -1
            for time, picture in chain([first], frames):
                if (
                    round(1000 * time) <= shown
                ):  # of more than 1000 frames a second some are left out
                    continue
                shown = round(1000 * time)
                image = subtitles(time, resized(picture, area, NARROWEST))
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = shown, MILLISECOND
                container.mux(track.encode(frame))
            container.mux(track.encode())
        return target.read_bytes()


def save(path, data):
    """Write a picture or film whole, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return path


if __name__ == "__main__":
    cli.run(main)
